// Defines the operators; cpu.cpp includes it, so that a library has them once.
#pragma once

#include "../common/registration.h"

TORCH_LIBRARY_FRAGMENT(LTK_LIBRARY, m) {
  m.def(
      "expert_fusion(Tensor[] logits, Tensor? expert_weight, Tensor? class_shift, Tensor? learned_scale, "
      "float[] weights, float scale, int k, bool with_log_probs) -> (Tensor values, Tensor classes, Tensor mass, "
      "Tensor log_probs)");
}
