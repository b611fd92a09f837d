// The scalars and vectors of one row on the CPU: its class vectors, its slots, its outputs and its gradient.
#pragma once

#include "../common/cpu/vectors.h"
#include "cpu_call.h"

namespace ltk {
namespace LTK_ISA {
namespace {

template <class A>
LTK_INLINE int64_t row_offset(const Call<A>& call, int64_t row, int64_t stride_n, int64_t stride_k) {
  return (row / call.k) * stride_n + (row % call.k) * stride_k;
}

// A row's first logit, and the first elements of its gradient and probabilities, or null.
template <class T, class A>
LTK_INLINE const T* row_pointer(const Call<A>& call, int64_t row) {
  return static_cast<const T*>(call.x) + row_offset(call, row, call.x_n, call.x_k);
}
template <class T, class A>
LTK_INLINE T* gradient_pointer(const Call<A>& call, int64_t row) {
  return call.grad ? static_cast<T*>(call.grad) + row_offset(call, row, call.grad_n, call.grad_k) : nullptr;
}
template <class A>
LTK_INLINE const A* probabilities_of(const Call<A>& call, int64_t row) {
  return call.q ? call.q + row_offset(call, row, call.q_n, call.q_k) : nullptr;
}

template <class A>
LTK_INLINE A scale_of(const Call<A>& call, int64_t column) {
  return call.class_scale ? call.class_scale[column] : call.scale;
}

template <class A>
LTK_INLINE A bias_of(const Call<A>& call, int64_t column) {
  return call.class_bias ? call.class_bias[column] : A(0);
}

template <class A>
LTK_INLINE A weight_of(const Call<A>& call, int64_t column) {
  return call.weight ? call.weight[column] : A(1);
}

template <class A>
LTK_INLINE A coefficient_of(const Call<A>& call, int i) {
  return call.coefficient ? call.coefficient[i] : A(1);
}

// The same vectors at W columns from j on, `count` of which exist.
template <class A>
LTK_ALWAYS_INLINE static Vec<A> scales_of(const Call<A>& call, int64_t j, int64_t count) {
  return call.class_scale ? get_some<A>(call.class_scale + j, count, A(0)) : splat(call.scale);
}

template <class A>
LTK_ALWAYS_INLINE static Vec<A> biases_of(const Call<A>& call, int64_t j, int64_t count) {
  return call.class_bias ? get_some<A>(call.class_bias + j, count, A(0)) : Vec<A>{};
}

template <class A>
LTK_ALWAYS_INLINE static Vec<A> weights_of(const Call<A>& call, int64_t j, int64_t count) {
  return call.weight ? get_some<A>(call.weight + j, count, A(0)) : splat(A(1));
}

// Loads the slots of a row whose logits start at x, columns `stride` apart.
template <class T, class A>
LTK_INLINE RowSlots<A> load_slots(const Call<A>& call, int64_t row, const T* x, int64_t stride) {
  RowSlots<A> r = {};
  r.smoothing = call.smoothing;
  r.smoothing_share = call.smoothing / static_cast<A>(call.classes);
  r.total_weight = call.total_weight;
  if (!call.target) return r;
  r.count = call.mixed ? 2 : 1;
  const A share = call.mixed ? call.share[row * call.share_stride] : A(1);
  for (int i = 0; i < r.count; ++i) {
    Slot<A>& slot = r.slot[i];
    const int64_t column = (i ? call.mixed : call.target)[row];
    slot.column = column == call.ignore_index ? -1 : column;
    slot.factor = coefficient_of(call, i) * A(0);  // NaN where the mean is over no weight at all, as in torch
    if (slot.column < 0) continue;
    slot.factor = coefficient_of(call, i) * (i ? A(1) - share : share);
    slot.weight = weight_of(call, column);
    slot.x = IO<T>::get(x + column * stride);
    const A a = scale_of(call, column), bias = bias_of(call, column);
    const A m = call.class_margin ? call.class_margin[column] : call.margin;
    const Margin<A> margin = {m, call.angular ? std::cos(m) : A(1), call.angular ? std::sin(m) : A(0)};
    const A cosine = call.class_scale ? call.cosine_scale[column] * slot.x : slot.x;
    set_slot(slot, affine(slot.x, a, bias), cosine, call.scale, bias, margin, call.angular);
  }
  return r;
}

// Calls f(i, j) for each slot i whose target is one of `count` columns from `begin`: column begin + j.
template <class A, class Function>
LTK_INLINE void each_target(const RowSlots<A>& slots, int64_t begin, int64_t count, Function f) {
  for (int i = 0; i < slots.count; ++i) {
    const int64_t j = slots.slot[i].column - begin;
    if (slots.slot[i].column >= 0 && j >= 0 && j < count) f(i, j);
  }
}

// Writes a row's loss and statistics from its sums; returns its gradient for an upstream gradient of 1.
template <class A>
LTK_INLINE RowGradient<A> finish_row(const Call<A>& call, const RowSlots<A>& slots, int64_t row, const PartSums<A>& s) {
  const A log_total = std::log(s.total);
  call.peak[row] = s.peak;
  call.total[row] = s.total;
  if (call.prediction) call.prediction[row] = s.best_column;
  if (call.q) {
    const A k = coefficient_of(call, 0);
    call.loss[row] = k * (static_cast<A>(s.weight) * log_total - static_cast<A>(s.weighted));
    call.lse[row] = s.peak + log_total;
    const A share = call.smoothing / static_cast<A>(call.classes);
    return {
        s.peak, k * static_cast<A>(s.weight) / s.total, k * share, k * (A(1) - call.smoothing), {-1, -1}, {}, {}, {},
        0};
  }
  call.loss[row] = compute_loss(slots, s.peak, log_total, static_cast<A>(s.weighted));
  call.lse[row] = s.peak + sum_term(slots, 0, s.peak, log_total).total;
  if (!call.grad) return {};
  return compute_gradient(slots, s.peak, log_total, A(1), A(0));
}

template <class T, class A>
void compute_gradients(const Call<A>& call, int64_t begin, int64_t end, RowGradient<A>* out) {
  for (int64_t row = begin; row < end; ++row) {
    const A peak = call.peak[row], total = call.total[row];
    const A grad_loss = call.grad_loss[row * call.grad_loss_stride];
    const A grad_lse = call.grad_lse ? call.grad_lse[row * call.grad_lse_stride] : A(0);
    if (call.q) {
      const A share = call.smoothing / static_cast<A>(call.classes), kept = A(1) - call.smoothing;
      const A* q = probabilities_of(call, row);
      double weights = 0;
      for (int64_t c = 0; c < call.classes; ++c) weights += weight_of(call, c) * (kept * q[c * call.q_c] + share);
      const A k = grad_loss * coefficient_of(call, 0);
      out[row] = {peak, (k * static_cast<A>(weights) + grad_lse) / total, k * share, k * kept, {-1, -1}, {}, {}, {}, 0};
    } else {
      const T* x = row_pointer<T>(call, row);
      out[row] = compute_gradient(load_slots(call, row, x, call.x_c), peak, A(std::log(total)), grad_loss, grad_lse);
    }
  }
}

}  // namespace
}  // namespace LTK_ISA
}  // namespace ltk
