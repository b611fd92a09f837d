// The arguments of lt_kernels/ops/expert_cross_entropy/arguments.py, in its order, and what its forward returns. On
// CUDA the operator is the rows kernel, expert by expert (lt_kernels/ops/expert_cross_entropy/looped.py).
#pragma once

#include <tuple>

#include "../margin_cross_entropy/arguments.h"

#define LTK_EXPERT_CROSS_ENTROPY_SCHEMAS(m)                                                                         \
  m.def(                                                                                                            \
      "expert_cross_entropy_fwd(Tensor[] logits, Tensor target, Tensor? mixed_target, Tensor? mix_lambda, Tensor? " \
      "weight, Tensor? class_bias, Tensor? class_scale, Tensor? class_margin, Tensor? learned_scale, Tensor? "      \
      "log_prior, Tensor? coefficient, Tensor? ensemble_coefficient, float[] taus, float scale, float margin, "     \
      "bool angular, int ignore_index, float label_smoothing, bool with_ensemble, bool with_grad) -> (Tensor "      \
      "loss, Tensor rest, Tensor ensemble_loss, Tensor ensemble_prediction, Tensor grad_logits)")

#define LTK_EXPERT_CROSS_ENTROPY_PARAMETERS                                                                          \
  at::TensorList logits, const Tensor &target, const OptionalTensor &mixed_target, const OptionalTensor &mix_lambda, \
      const OptionalTensor &weight, const OptionalTensor &class_bias, const OptionalTensor &class_scale,             \
      const OptionalTensor &class_margin, const OptionalTensor &learned_scale, const OptionalTensor &log_prior,      \
      const OptionalTensor &coefficient, const OptionalTensor &ensemble_coefficient, at::ArrayRef<double> taus,      \
      double scale, double margin, bool angular, int64_t ignore_index, double label_smoothing, bool with_ensemble,   \
      bool with_grad

namespace ltk {

using ExpertForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

ExpertForwardResult expert_cross_entropy_fwd_cpu(LTK_EXPERT_CROSS_ENTROPY_PARAMETERS);

}  // namespace ltk
