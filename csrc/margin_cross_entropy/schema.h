// Defines the operators; cpu.cpp includes it, so that a library has them once.
#pragma once

#include "../common/row_options.h"

TORCH_LIBRARY_FRAGMENT(LTK_LIBRARY, m) {
  // The gradient of input is written to `out`, which may be input itself; [0] is then returned in its place.
  m.def("margin_cross_entropy_fwd(Tensor input" LTK_ROW_OPTIONS_SCHEMA
        ", bool with_prediction, bool with_grad, Tensor(a!)? out=None) -> (Tensor loss, Tensor lse, Tensor prediction, "
        "Tensor rest, Tensor grad_input)");
  m.def("margin_cross_entropy_bwd(Tensor grad_loss, Tensor? grad_lse, Tensor rest, Tensor input" LTK_ROW_OPTIONS_SCHEMA
        ", bool[] needs, Tensor(a!)? out=None) -> Tensor[]");
  // factor / total class weight of the targets that are not ignored, [1], or [2] with mixed_target; CPU only
  m.def(
      "mean_coefficient(Tensor target, Tensor? mixed_target, Tensor? weight, int ignore_index, int classes, "
      "ScalarType dtype, float factor) -> Tensor");
  // the sum of all values, 0-dim, always in the same order; CPU only
  m.def("ordered_sum(Tensor values) -> Tensor");
  // gradient *= factor (0-dim); memory is not touched where that is 1
  m.def("scale_gradient_(Tensor(a!) gradient, Tensor factor) -> ()");
}
