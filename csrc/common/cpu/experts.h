// The experts' logits and their gradients on the CPU, for kernels that run along classes.
#pragma once

#include "../experts.h"
#include "memory.h"

namespace ltk {

struct ExpertRows {
  int64_t experts, rows, classes;
  std::vector<Tensor> each;       // [N, C] with contiguous classes: copies where they are not
  std::vector<const void*> x;     // their first elements
  std::vector<int64_t> x_stride;  // from row to row, in elements

  explicit ExpertRows(at::TensorList logits) : each(experts_of(logits)) {
    const auto shape = expert_shape(logits);
    experts = shape[0], rows = shape[1], classes = shape[2];
    for (Tensor& expert : each) {
      if (classes > 1 && expert.stride(1) != 1) expert = expert.contiguous();
      x.push_back(expert.const_data_ptr());
      x_stride.push_back(expert.stride(0));
    }
  }
};

// The gradients of all experts, and where kernels write them.
struct ExpertGradient {
  Tensor result;   // [E, N, C], laid out like logits that are one tensor
  Tensor written;  // the same tensor, or another whose classes are contiguous
  std::vector<void*> out;
  std::vector<int64_t> out_stride;

  ExpertGradient(at::TensorList logits, const ExpertRows& rows) {
    const std::vector<int64_t> shape = {rows.experts, rows.rows, rows.classes};
    result =
        logits[0].dim() == 3 ? MemoryPool::empty_like(logits[0]) : MemoryPool::empty(shape, logits[0].scalar_type());
    const bool fits = rows.classes == 1 || result.stride(2) == 1;
    written = fits ? result : MemoryPool::empty(shape, result.scalar_type());
    auto* first = static_cast<char*>(written.mutable_data_ptr());
    for (int64_t e = 0; e < rows.experts; ++e) {
      out.push_back(first + e * written.stride(0) * static_cast<int64_t>(written.element_size()));
      out_stride.push_back(written.stride(1));
    }
  }

  Tensor finish() {
    if (!written.is_same(result)) result.copy_(written);
    return result;
  }
};

}  // namespace ltk
