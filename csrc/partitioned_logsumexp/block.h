// A block of similarities and what belongs to it: Block of lt_kernels/ops/partitioned_logsumexp/arguments.py.
#pragma once

#include <type_traits>

#include "../common/registration.h"
#include "../common/tensors.h"

#define LTK_BLOCK(X)                                 \
  X(const Tensor&, "Tensor", query_label)            \
  X(const Tensor&, "Tensor", key_label)              \
  X(const OptionalTensor&, "Tensor?", exclude)       \
  X(int64_t, "int", first)                           \
  X(const OptionalTensor&, "Tensor?", key_bias)      \
  X(const OptionalTensor&, "Tensor?", key_scale)     \
  X(const OptionalTensor&, "Tensor?", learned_scale) \
  X(double, "float", scale)

#define LTK_BLOCK_SCHEMA LTK_BLOCK(LTK_SCHEMA)

namespace ltk {

struct Block {
  Tensor z;
  LTK_BLOCK(LTK_FIELD)
};

}  // namespace ltk
