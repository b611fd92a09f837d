// The arguments of the experts' fusion: Arguments of lt_kernels/ops/expert_fusion/arguments.py.
#pragma once

#include <tuple>
#include <type_traits>

#include "../common/registration.h"
#include "../common/tensors.h"

#define LTK_FUSION(X)                                \
  X(const OptionalTensor&, "Tensor?", expert_weight) \
  X(const OptionalTensor&, "Tensor?", class_shift)   \
  X(const OptionalTensor&, "Tensor?", learned_scale) \
  X(at::ArrayRef<double>, "float[]", weights)        \
  X(double, "float", scale)                          \
  X(bool, "bool", normalize)

#define LTK_FUSION_SCHEMA LTK_FUSION(LTK_SCHEMA)

namespace ltk {

struct FusionArguments {
  at::TensorList logits;
  LTK_FUSION(LTK_FIELD)
};

// values, classes, mass, log_probs
using FusionResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

}  // namespace ltk
