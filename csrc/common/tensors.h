// Tensors as the operators' host code takes them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "dtypes.h"
#include "inline.h"

namespace ltk {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16:
      return kBFloat16;
    case at::kHalf:
      return kHalf;
    case at::kDouble:
      return kDouble;
    default:
      return kFloat;
  }
}

template <class V>
constexpr at::ScalarType dtype_of() {
  return c10::CppTypeToScalarType<V>::value;
}

// Keeps the tensors alive that a kernel's arguments point into.
struct KeptTensors {
  std::vector<Tensor> kept;

  Tensor keep(Tensor t) {
    kept.push_back(t);
    return t;
  }

  // The first of t's values as V, contiguous; null without t.
  template <class V>
  const V* pointer(const OptionalTensor& t) {
    if (!t.has_value()) return nullptr;
    const bool fits = t->scalar_type() == dtype_of<V>() && t->is_contiguous();
    return keep(fits ? *t : t->to(dtype_of<V>()).contiguous()).template const_data_ptr<V>();
  }
};

}  // namespace ltk
