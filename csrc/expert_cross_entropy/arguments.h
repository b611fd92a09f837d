// The arguments of lt_kernels/ops/expert_cross_entropy/arguments.py, in its order, and what its forward returns. On
// CUDA the operator is the rows kernel, expert by expert (lt_kernels/ops/expert_cross_entropy/looped.py).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#define LTK_EXPERT_CROSS_ENTROPY_SCHEMAS(m)                                                                         \
  m.def(                                                                                                            \
      "expert_cross_entropy_fwd(Tensor[] logits, Tensor target, Tensor? mixed_target, Tensor? mix_lambda, Tensor? " \
      "weight, Tensor? class_bias, Tensor? class_scale, Tensor? class_margin, Tensor? learned_scale, Tensor? "      \
      "log_prior, Tensor? coefficient, Tensor? ensemble_coefficient, float[] taus, float scale, float margin, "     \
      "bool angular, int ignore_index, float label_smoothing, bool with_ensemble, bool with_grad) -> (Tensor "      \
      "loss, Tensor rest, Tensor ensemble_loss, Tensor ensemble_prediction, Tensor grad_logits)")

namespace ltk {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> expert_cross_entropy_fwd_cpu(
    at::TensorList logits, const at::Tensor& target, const std::optional<at::Tensor>& mixed_target,
    const std::optional<at::Tensor>& mix_lambda, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& class_bias, const std::optional<at::Tensor>& class_scale,
    const std::optional<at::Tensor>& class_margin, const std::optional<at::Tensor>& learned_scale,
    const std::optional<at::Tensor>& log_prior, const std::optional<at::Tensor>& coefficient,
    const std::optional<at::Tensor>& ensemble_coefficient, at::ArrayRef<double> taus, double scale, double margin,
    bool angular, int64_t ignore_index, double label_smoothing, bool with_ensemble, bool with_grad);

}  // namespace ltk
