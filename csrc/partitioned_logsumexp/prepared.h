// A block's arguments, as the host code of every device prepares them.
#pragma once

#include <ATen/core/List.h>
#include <c10/util/Exception.h>

#include "block.h"

namespace ltk {

// Fills in the fields that the calls of all devices share by name, and owns the memory that they point to.
template <class A, class Call>
struct PreparedBlock : KeptTensors {
  Call call = {};

  explicit PreparedBlock(const Block& block) {
    const int64_t columns = block.z.size(1);
    const Tensor z = keep(columns > 1 && block.z.stride(1) != 1 ? block.z.contiguous() : block.z);
    call.rows = z.size(0), call.columns = static_cast<decltype(call.columns)>(columns);
    call.z = z.const_data_ptr(), call.z_stride = z.stride(0);
    call.query_label = pointer<int32_t>(block.query_label), call.key_label = pointer<int32_t>(block.key_label);
    call.exclude = pointer<int32_t>(block.exclude);
    call.first = block.first;
    call.key_bias = pointer<A>(block.key_bias), call.key_scale = pointer<A>(block.key_scale);
  }

  // Points the call at the upstream gradients and, if it is wanted, at the gradient of z.
  void set_upstream(const Tensor& terms, const c10::List<bool>& needs, const OptionalTensor& out) {
    const Tensor upstream = keep(call.rows > 1 && terms.stride(1) != 1 ? terms.contiguous() : terms);
    call.terms = upstream.template const_data_ptr<A>(), call.terms_stride = upstream.stride(0);
    if (!needs.get(0)) return;
    TORCH_INTERNAL_ASSERT(out.has_value() && (call.columns == 1 || out->stride(1) == 1));
    call.out = out->mutable_data_ptr(), call.out_stride = out->stride(0);
  }
};

}  // namespace ltk
