// The operator of lt_kernels/ops/expert_fusion/op.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#define LTK_EXPERT_FUSION_SCHEMAS(m)                                                                               \
  m.def(                                                                                                           \
      "expert_fusion(Tensor[] logits, Tensor? expert_weight, Tensor? class_shift, Tensor? learned_scale, "         \
      "float[] weights, float scale, int k, bool with_log_probs) -> (Tensor values, Tensor classes, Tensor mass, " \
      "Tensor log_probs)")

namespace ltk {

#define LTK_DECLARE(device)                                                                         \
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> expert_fusion_##device(                \
      at::TensorList logits, const std::optional<at::Tensor>& expert_weight,                        \
      const std::optional<at::Tensor>& class_shift, const std::optional<at::Tensor>& learned_scale, \
      at::ArrayRef<double> weights, double scale, int64_t k, bool with_log_probs);
LTK_DECLARE(cpu)
LTK_DECLARE(cuda)
#undef LTK_DECLARE

}  // namespace ltk
