// Defines the operators; cpu.cpp includes it, so that a library has them once.
#pragma once

#include "arguments.h"

TORCH_LIBRARY_FRAGMENT(LTK_LIBRARY, m) {
  m.def("expert_fusion(Tensor[] logits" LTK_FUSION_SCHEMA
        ", int k, bool with_log_probs) -> (Tensor values, Tensor classes, Tensor mass, Tensor log_probs)");
}
