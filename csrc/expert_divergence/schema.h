// Defines the operators; cpu.cpp includes it, so that a library has them once.
#pragma once

#include "../common/registration.h"

TORCH_LIBRARY_FRAGMENT(LTK_LIBRARY, m) {
  m.def("expert_divergence_fwd(Tensor[] logits, Tensor? temperature, bool pairwise) -> (Tensor value, Tensor saved)");
  m.def(
      "expert_divergence_bwd(Tensor grad, Tensor saved, Tensor[] logits, Tensor? temperature, bool pairwise, "
      "bool detach) -> Tensor");
}
