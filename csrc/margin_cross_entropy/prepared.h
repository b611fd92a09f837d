// The part of a call of the rows kernel that the host prepares alike for every device.
#pragma once

#include <ATen/core/List.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <tuple>
#include <utility>
#include <vector>

#include "../common/row_options.h"
#include "layout.h"

namespace ltk {

// loss, lse, prediction, rest, grad_input
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Positions of the gradients in `needs` and in what backward returns.
enum { kInput, kTarget, kClassBias, kClassScale, kClassMargin, kLearnedScale };

// Fills in the fields that the calls of all devices share by name, and owns the tensors that they point into.
template <class A, class Call>
struct PreparedRows : KeptTensors {
  Layout layout;
  Call call = {};

  PreparedRows(const Tensor& input, const RowOptions& o) : layout(input) {
    call.classes = static_cast<decltype(call.classes)>(layout.classes);
    call.rows = layout.rows, call.k = layout.k;
    call.x = layout.input.const_data_ptr();
    layout.strides(layout.input, &call.x_n, &call.x_c, &call.x_k);
    call.take(o, *this);
  }

  void set_probabilities(const Tensor& given) {
    const Tensor q = keep(layout.fits(given) ? given : layout.fitting(given).copy_(given));
    call.q = static_cast<decltype(call.q)>(q.const_data_ptr());
    layout.strides(q, &call.q_n, &call.q_c, &call.q_k);
    call.q_dtype = kernel_dtype(q.scalar_type());
  }

  // Returns the tensor that kernels write in place of `wanted`, until copy_back().
  Tensor set_grad(const Tensor& wanted) {
    const Tensor grad = written_for(wanted, wanted.scalar_type());
    call.grad = grad.mutable_data_ptr();
    layout.strides(grad, &call.grad_n, &call.grad_c, &call.grad_k);
    return grad;
  }

  void set_grad_probabilities(const Tensor& wanted, at::ScalarType dtype) {
    const Tensor grad = written_for(wanted, dtype);
    call.grad_q = static_cast<decltype(call.grad_q)>(grad.mutable_data_ptr());
    layout.strides(grad, &call.grad_q_n, &call.grad_q_c, &call.grad_q_k);
  }

  void copy_back() {
    for (const auto& [wanted, written] : copies_) wanted.copy_(written);
  }

  // Allocates the outputs and calls run(tensor that the kernels write the gradient to, undefined without one).
  template <class Run>
  ForwardResult forward(const Tensor& input, bool with_prediction, bool with_grad, const OptionalTensor& out,
                        Tensor (*empty_like)(const Tensor&), const Run& run) {
    const int64_t n = input.size(0), k = input.size(2);
    const auto options = input.options().dtype(dtype_of<A>());
    const Tensor loss = at::empty({n, k}, options), lse = at::empty({n, k}, options);
    const Tensor rest = at::empty({2, n, k}, options);
    const auto classes = options.dtype(at::kLong);
    const Tensor prediction = with_prediction ? at::empty({n, k}, classes) : at::empty({0}, classes);
    const Tensor result = with_grad && !out.has_value() ? empty_like(input) : at::empty({0}, input.options());
    if (layout.rows > 0) {
      call.loss = loss.mutable_data_ptr<A>();
      call.lse = lse.mutable_data_ptr<A>();
      set_rest(rest);
      call.prediction = with_prediction ? prediction.mutable_data_ptr<int64_t>() : nullptr;
      run(with_grad ? set_grad(out.has_value() ? *out : result) : Tensor());
      copy_back();
    }
    return {loss, lse, prediction, rest, result};
  }

  // Points the call at the saved statistics and at the upstream gradients.
  void set_upstream(const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& rest) {
    set_rest(keep(rest.contiguous()));
    call.grad_loss = upstream(grad_loss, &call.grad_loss_stride);
    if (grad_lse.has_value()) call.grad_lse = upstream(*grad_lse, &call.grad_lse_stride);
  }

 private:
  std::vector<std::pair<Tensor, Tensor>> copies_;  // wanted, written

  void set_rest(const Tensor& rest) {
    call.peak = const_cast<A*>(rest.const_data_ptr<A>());
    call.total = call.peak + layout.rows;
  }

  Tensor written_for(const Tensor& wanted, at::ScalarType dtype) {
    const bool same = wanted.scalar_type() == dtype;
    const Tensor written = keep(layout.fitting(same ? wanted : at::empty_like(wanted, wanted.options().dtype(dtype))));
    if (!written.is_same(wanted)) copies_.emplace_back(wanted, written);
    return written;
  }

  // Returns one value for all rows, with stride 0, or one per row.
  const A* upstream(const Tensor& grad, int64_t* stride) {
    const bool single = grad.dim() == 0 || (grad.numel() > 0 && grad.stride(0) == 0 && grad.stride(1) == 0);
    *stride = single ? 0 : 1;
    return pointer<A>(single && grad.dim() > 0 ? grad.select(0, 0).select(0, 0) : grad);
  }
};

// Returns backward's results as they are before its kernels run: [0] where not needed.
inline std::vector<Tensor> empty_gradients(const Tensor& input, const Tensor& target, const c10::List<bool>& needs,
                                           const OptionalTensor& out, at::ScalarType dtype,
                                           Tensor (*empty_like)(const Tensor&)) {
  std::vector<Tensor> grads(needs.size());
  for (Tensor& grad : grads) grad = at::empty({0}, input.options().dtype(dtype));
  if (needs.get(kInput) && !out.has_value()) grads[kInput] = empty_like(input);
  if (needs.get(kTarget)) grads[kTarget] = at::empty_like(target);
  return grads;
}

inline void zero_options(std::vector<Tensor>& grads, const c10::List<bool>& needs, int64_t classes) {
  const auto options = grads[kLearnedScale].options();
  for (const int i : {kClassBias, kClassScale, kClassMargin})
    if (needs.get(i)) grads[i] = at::zeros({classes}, options);
  if (needs.get(kLearnedScale)) grads[kLearnedScale] = at::zeros({}, options);
}

}  // namespace ltk
