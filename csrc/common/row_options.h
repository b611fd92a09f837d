// The options of a row's loss, in the order of lt_kernels/ops/_rows/options.py.
#pragma once

#include <type_traits>

#include "registration.h"
#include "tensors.h"

#define LTK_ROW_OPTIONS(X)                           \
  X(const Tensor&, "Tensor", target)                 \
  X(const OptionalTensor&, "Tensor?", mixed_target)  \
  X(const OptionalTensor&, "Tensor?", mix_lambda)    \
  X(const OptionalTensor&, "Tensor?", weight)        \
  X(const OptionalTensor&, "Tensor?", smooth_weight) \
  X(const OptionalTensor&, "Tensor?", class_bias)    \
  X(const OptionalTensor&, "Tensor?", class_scale)   \
  X(const OptionalTensor&, "Tensor?", class_margin)  \
  X(const OptionalTensor&, "Tensor?", learned_scale) \
  X(const OptionalTensor&, "Tensor?", coefficient)   \
  X(double, "float", scale)                          \
  X(double, "float", margin)                         \
  X(bool, "bool", angular)                           \
  X(int64_t, "int", ignore_index)                    \
  X(double, "float", label_smoothing)

#define LTK_ROW_OPTIONS_SCHEMA LTK_ROW_OPTIONS(LTK_SCHEMA)
#define LTK_VISIT(type, schema, name) visit(name);

namespace ltk {

struct RowOptions {
  LTK_ROW_OPTIONS(LTK_FIELD)

  // Calls visit(field) for every field in their order.
  template <class Visit>
  void each(Visit&& visit) {
    LTK_ROW_OPTIONS(LTK_VISIT)
  }

  bool soft() const { return target.is_floating_point(); }

  // Whether classes of no weight may have logits of -inf: they then add 0.
  bool masks() const { return smooth_weight.has_value() || (soft() && class_bias.has_value() && weight.has_value()); }
};

}  // namespace ltk
