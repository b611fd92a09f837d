// Arguments of the CUDA kernel of the experts' fusion.
#pragma once

#include "../common/cuda/experts.h"

namespace ltk::cuda {

template <class A>
struct FusionCall {
  ExpertRows x;
  TileShape tile;
  A weight[kFewExperts];   // more experts: all in expert_weight
  const A* expert_weight;  // [experts], or null: 1
  const A* class_shift;    // [classes], or null: 0
  const A* learned_scale;  // 0-dim factor of scale, or null
  A scale;

  int k;  // how many of the largest classes are written
  A* values;
  int64_t* chosen;  // [rows, k] like values
  A* mass;          // [rows]
  bool normalize;   // probabilities for values, and the log-sum-exp for mass
  bool keep;        // u of the row, for k > 1 or log_probs: in shared memory where u is null
  A* u;             // [rows, classes] or null
  A* log_probs;     // the same; may be u
};

template <class A>
device::Error expert_fusion(const FusionCall<A>&, Dtype, size_t, device::Stream);

}  // namespace ltk::cuda
