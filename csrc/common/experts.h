// Logits of several experts: one [E, N, C] tensor, or E tensors [N, C].
#pragma once

#include "tensors.h"

namespace ltk {

// Returns the experts' logits, each [N, C]: views of one tensor.
inline std::vector<Tensor> experts_of(at::TensorList logits) {
  return logits[0].dim() == 3 ? logits[0].unbind(0) : logits.vec();
}

inline std::vector<int64_t> expert_shape(at::TensorList logits) {  // E, N, C
  const Tensor& first = logits[0];
  if (first.dim() == 3) return first.sizes().vec();
  return {static_cast<int64_t>(logits.size()), first.size(0), first.size(1)};
}

}  // namespace ltk
