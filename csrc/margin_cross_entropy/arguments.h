// The arguments of the rows kernel, in the order of lt_kernels/ops/margin_cross_entropy/arguments.py.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace ltk {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

#define LTK_MARGIN_CROSS_ENTROPY_SCHEMA                                                                         \
  "Tensor input, Tensor target, Tensor? mixed_target, Tensor? mix_lambda, Tensor? weight, Tensor? class_bias, " \
  "Tensor? class_scale, Tensor? class_margin, Tensor? learned_scale, Tensor? coefficient, float scale, float "  \
  "margin, bool angular, int ignore_index, float label_smoothing"

#define LTK_MARGIN_CROSS_ENTROPY_PARAMETERS                                                                        \
  const Tensor &input, const Tensor &target, const OptionalTensor &mixed_target, const OptionalTensor &mix_lambda, \
      const OptionalTensor &weight, const OptionalTensor &class_bias, const OptionalTensor &class_scale,           \
      const OptionalTensor &class_margin, const OptionalTensor &learned_scale, const OptionalTensor &coefficient,  \
      double scale, double margin, bool angular, int64_t ignore_index, double label_smoothing

#define LTK_MARGIN_CROSS_ENTROPY_ARGUMENTS                                                                            \
  input, target, mixed_target, mix_lambda, weight, class_bias, class_scale, class_margin, learned_scale, coefficient, \
      scale, margin, angular, ignore_index, label_smoothing

// loss, lse, prediction, rest, grad_input
// out: where the gradient of input is written, which may be input itself; what is returned in its place is then [0].
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

#define LTK_MARGIN_CROSS_ENTROPY_SCHEMAS(m)                                                                          \
  m.def("margin_cross_entropy_fwd(" LTK_MARGIN_CROSS_ENTROPY_SCHEMA                                                  \
        ", bool with_prediction, bool with_grad, Tensor(a!)? out=None) -> (Tensor loss, Tensor lse, Tensor "         \
        "prediction, Tensor rest, "                                                                                  \
        "Tensor grad_input)");                                                                                       \
  m.def("margin_cross_entropy_bwd(Tensor grad_loss, Tensor? grad_lse, Tensor rest, " LTK_MARGIN_CROSS_ENTROPY_SCHEMA \
        ", bool[] needs, Tensor(a!)? out=None) -> Tensor[]");                                                        \
  m.def("scale_gradient_(Tensor(a!) gradient, Tensor factor) -> ()")

#define LTK_DECLARE(device)                                                                                      \
  ForwardResult margin_cross_entropy_fwd_##device(LTK_MARGIN_CROSS_ENTROPY_PARAMETERS, bool with_prediction,     \
                                                  bool with_grad, const OptionalTensor& out);                    \
  std::vector<Tensor> margin_cross_entropy_bwd_##device(const Tensor& grad_loss, const OptionalTensor& grad_lse, \
                                                        const Tensor& rest, LTK_MARGIN_CROSS_ENTROPY_PARAMETERS, \
                                                        c10::List<bool> needs, const OptionalTensor& out);       \
  /* gradient *= factor (0-dim); memory is not touched where that is 1 */                                        \
  void scale_gradient_##device(Tensor& gradient, const Tensor& factor);
LTK_DECLARE(cpu)
LTK_DECLARE(cuda)
#undef LTK_DECLARE

}  // namespace ltk
