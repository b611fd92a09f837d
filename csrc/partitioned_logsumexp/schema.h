// Defines the operators; cpu.cpp includes it, so that a library has them once.
#pragma once

#include "block.h"

TORCH_LIBRARY_FRAGMENT(LTK_LIBRARY, m) {
  m.def("partitioned_logsumexp_fwd(Tensor z" LTK_BLOCK_SCHEMA ", bool with_slopes) -> Tensor");
  m.def("partitioned_logsumexp_bwd(Tensor z" LTK_BLOCK_SCHEMA
        ", Tensor terms, bool[] needs, Tensor(a!)? out) -> (Tensor sum, Tensor weighted_sum)");
}
