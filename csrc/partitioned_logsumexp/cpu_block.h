// The partitioned log-sum-exp of a block on the CPU, for the operators and for plain calls.
#pragma once

#include <ATen/core/List.h>

#include "block.h"

namespace ltk {

// Returns the statistics [6, N], or [8, N] with slopes, in the order of statistics.h.
Tensor run_statistics(const Block& block, bool with_slopes);

// Writes the gradient of the similarities to `out`, if it is needed; returns the sums over rows of G and of G times the
// similarity, [0] where they are not.
std::tuple<Tensor, Tensor> run_gradient(const Block& block, const Tensor& terms, const c10::List<bool>& needs,
                                        const OptionalTensor& out);

}  // namespace ltk
