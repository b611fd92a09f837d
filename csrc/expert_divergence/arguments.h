// The operators of lt_kernels/ops/expert_divergence/op.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#define LTK_EXPERT_DIVERGENCE_SCHEMAS(m)                                                                               \
  m.def("expert_divergence_fwd(Tensor[] logits, Tensor? temperature, bool pairwise) -> (Tensor value, Tensor saved)"); \
  m.def(                                                                                                               \
      "expert_divergence_bwd(Tensor grad, Tensor saved, Tensor[] logits, Tensor? temperature, bool pairwise, "         \
      "bool detach) -> Tensor")

namespace ltk {

#define LTK_DECLARE(device)                                                                                         \
  std::tuple<at::Tensor, at::Tensor> expert_divergence_fwd_##device(                                                \
      at::TensorList logits, const std::optional<at::Tensor>& temperature, bool pairwise);                          \
  at::Tensor expert_divergence_bwd_##device(const at::Tensor& grad, const at::Tensor& saved, at::TensorList logits, \
                                            const std::optional<at::Tensor>& temperature, bool pairwise, bool detach);
LTK_DECLARE(cpu)
LTK_DECLARE(cuda)
#undef LTK_DECLARE

}  // namespace ltk
