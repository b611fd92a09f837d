// Logits of several experts on a GPU: what the host does alike for all kernels.
#pragma once

#include <ATen/ops/stack.h>

#include <algorithm>
#include <limits>

#include "../experts.h"
#include "experts.h"
#include "host.h"

namespace ltk {

// The experts' rows, and the tensors that they point into.
struct Experts : KeptTensors {
  cuda::ExpertRows rows = {};
  Dtype dtype;
  at::ScalarType compute_dtype;
  int64_t itemsize;

  explicit Experts(at::TensorList logits)
      : dtype(kernel_dtype(logits[0].scalar_type())),
        compute_dtype(dtype == kDouble ? at::kDouble : at::kFloat),
        itemsize(logits[0].element_size()) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    const auto shape = expert_shape(logits);
    TORCH_CHECK_VALUE(shape[1] <= kMost && shape[2] <= kMost, "logits: got ", shape[1], " rows of ", shape[2],
                      " classes, expected at most 2147483647 of each");
    rows.count = static_cast<int>(shape[0]), rows.rows = shape[1], rows.classes = static_cast<int>(shape[2]);
    const bool few = shape[0] <= cuda::kFewExperts;
    for (const Tensor& x : logits) keep(x.size(-1) == 1 || x.stride(-1) == 1 ? x : x.contiguous());
    if (!few && kept.size() > 1) kept = {at::stack(kept)};
    if (!few) rows.expert_stride = kept[0].stride(0);
    const std::vector<Tensor> experts = experts_of(kept);
    for (size_t e = 0; e < (few ? experts.size() : 1); ++e) {
      rows.first[e] = experts[e].const_data_ptr();
      rows.row_stride[e] = experts[e].stride(0);
    }
  }
};

// Returns the shared memory of a block's tile that lets two blocks fit a processor.
inline int64_t room_of_two(const device::Facts& facts) {
  constexpr int64_t kReservedPerBlock = 1024;  // that the system takes
  return std::min(facts.shared_per_block, facts.shared_per_processor / 2 - kReservedPerBlock) - cuda::kTileScratch;
}

inline void check_room(int64_t bytes, const device::Facts& facts, int64_t experts) {
  TORCH_CHECK_VALUE(bytes <= facts.shared_per_block, "logits: got ", experts,
                    " experts, more than a block's shared memory holds (", facts.shared_per_block, " bytes)");
}

}  // namespace ltk
