// Arguments of the CUDA kernels of the experts' divergences.
#pragma once

#include "../common/cuda/experts.h"

namespace ltk::cuda {

template <class A>
struct DivergenceCall {
  ExpertRows x;
  TileShape tile;
  const A* temperature;  // [classes], or null: 1
  bool pairwise, detach;

  A* value;  // [experts, rows]
  A* saved;  // [3 experts + 2, rows]; see lt_kernels/ops/expert_divergence/op.py

  const A* grad;  // of value
  int chunks;     // blocks per row in backward, a tile each
  void* out;      // gradient of the logits; classes are contiguous
  int64_t out_expert, out_row;
};

template <class A>
device::Error divergence_forward(const DivergenceCall<A>&, Dtype, size_t, device::Stream);
template <class A>
device::Error divergence_backward(const DivergenceCall<A>&, Dtype, size_t, device::Stream);

}  // namespace ltk::cuda
