// Forward of the experts' cross-entropy on the CPU, for the operator and for plain calls.
#pragma once

#include "../common/row_options.h"

namespace ltk {

// Returns loss [E, N], rest [E, 2, N], the ensemble's loss and prediction [N] or [0], and the gradient of the logits
// [E, N, C] or [0].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run_experts_forward(at::TensorList logits, const RowOptions& o,
                                                                       const OptionalTensor& log_prior,
                                                                       const OptionalTensor& ensemble_coefficient,
                                                                       at::ArrayRef<double> taus, bool with_ensemble,
                                                                       bool with_grad);

}  // namespace ltk
