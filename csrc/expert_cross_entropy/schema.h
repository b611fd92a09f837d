// Defines the operator; cpu.cpp includes it, so that a library has it once. On CUDA the operator is the rows kernel,
// expert by expert (lt_kernels/ops/expert_cross_entropy/looped.py).
#pragma once

#include "../common/row_options.h"

TORCH_LIBRARY_FRAGMENT(LTK_LIBRARY, m) {
  m.def("expert_cross_entropy_fwd(Tensor[] logits" LTK_ROW_OPTIONS_SCHEMA
        ", Tensor? log_prior, Tensor? ensemble_coefficient, float[] taus, bool with_ensemble, bool with_grad) -> "
        "(Tensor loss, Tensor rest, Tensor ensemble_loss, Tensor ensemble_prediction, Tensor grad_logits)");
}
