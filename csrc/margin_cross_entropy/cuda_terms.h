// The scalars of one row: its slots, the sums over its columns, its outputs and its record.
#pragma once

#include <algorithm>
#include <cmath>

#include "../common/cuda/elements.h"
#include "../common/cuda/reductions.h"
#include "cuda_call.h"

namespace ltk::cuda {
namespace {

// ------------------------------------------------------------------------------------------------------- row arguments

// u = a x + b with one rounding, in every kernel. The compiler would fuse the product with the next addition, with the
// bias in one kernel and with -peak in another. An exponential would then lose the rounding of u, which matters where
// |u| is some hundred.
template <class A>
LTK_DEVICE A shift_logit(A x, A a, A b) {
  return multiply_add(x, a, b);
}

template <class A>
LTK_DEVICE A load_scale(const Call<A>& call) {
  return call.learned_scale ? call.scale * *call.learned_scale : call.scale;
}

template <class A>
LTK_DEVICE A load_coefficient(const Call<A>& call, int i) {
  return call.coefficient ? call.coefficient[i] : A(1);
}

template <class A>
LTK_DEVICE A load_class_scale(const Call<A>& call, int column) {
  return call.class_scale ? call.class_scale[column] : A(1);
}

template <class A>
LTK_DEVICE A load_weight(const Call<A>& call, int column) {
  return call.weight ? call.weight[column] : A(1);
}

template <class A>
LTK_DEVICE A load_smooth_weight(const Call<A>& call, int column) {
  return call.smooth_weight ? call.smooth_weight[column] : A(1);
}

template <class A>
LTK_DEVICE A load_bias(const Call<A>& call, int column) {
  return call.class_bias ? call.class_bias[column] : A(0);
}

template <class A>
LTK_DEVICE A load_probability(const Call<A>& call, int64_t offset) {
  switch (call.q_dtype) {
    case kBFloat16:
      return BFloat16::get(static_cast<const uint16_t*>(call.q)[offset]);
    case kHalf:
      return Half::get(static_cast<const uint16_t*>(call.q)[offset]);
    case kDouble:
      return static_cast<A>(static_cast<const double*>(call.q)[offset]);
    default:
      return static_cast<const float*>(call.q)[offset];
  }
}

template <class A>
LTK_DEVICE void store_probability_gradient(const Call<A>& call, int64_t offset, A value) {
  switch (call.q_dtype) {
    case kBFloat16:
      static_cast<uint16_t*>(call.grad_q)[offset] = BFloat16::put(static_cast<float>(value));
      break;
    case kHalf:
      static_cast<uint16_t*>(call.grad_q)[offset] = Half::put(static_cast<float>(value));
      break;
    case kDouble:
      static_cast<double*>(call.grad_q)[offset] = static_cast<double>(value);
      break;
    default:
      static_cast<float*>(call.grad_q)[offset] = static_cast<float>(value);
  }
}

// What a column has for weights: of its probability, and of its smoothing.
template <class A>
struct Weights {
  A own, smooth;
};

template <class A>
LTK_DEVICE Weights<A> load_weights_of(const Call<A>& call, int column) {
  return {call.q ? load_weight(call, column) : A(1), load_smooth_weight(call, column)};
}

// w_j ((1 - smoothing) q_j + smoothing / C), as classes are smoothed
template <class A>
LTK_DEVICE A soft_weight(const Call<A>& call, A q, const Weights<A>& w) {
  const A own = w.own * ((A(1) - call.smoothing) * q);
  return call.smoothing > A(0) ? own + call.smooth_share * w.smooth : own;
}

// The terms of an ordinary column's gradients: du = slope exp(u - peak) - subtracted(...), and d/d(q) =
// differentiate_probability(...).
template <class A>
LTK_DEVICE A subtracted(const Call<A>& call, A smooth, A soft, const Weights<A>& w, A q) {
  return call.q ? soft * soft_weight(call, q, w) : smooth * w.smooth;
}
template <class A>
LTK_DEVICE A differentiate_probability(const Call<A>& call, A soft, A w, A log_inverse) {
  return soft * (A(1) - call.smoothing) * w * log_inverse;
}

// Returns the class of a row's target i: -1 where it is ignored or (then *bad) out of range.
template <class A>
LTK_DEVICE int find_column(const Call<A>& call, int64_t row, int i, bool* bad) {
  const int64_t* classes = i == 0 ? call.target : call.mixed;
  if (classes == nullptr) return -1;
  const int64_t column = classes[row];
  if (column == call.ignore_index) return -1;
  if (column >= 0 && column < call.classes) return static_cast<int>(column);
  *bad = true;
  return -1;
}

template <class A>
struct LoadedSlots {
  RowSlots<A> row;
  bool bad;  // a class out of range: everything of this row is NaN
};

// x: the row's first logit
template <class T, class A>
LTK_DEVICE LoadedSlots<A> load_slots(const Call<A>& call, int64_t row, const typename T::Stored* x) {
  LoadedSlots<A> slots = {};
  RowSlots<A>& r = slots.row;
  r.smoothing = call.smoothing;
  r.smooth_share = call.smooth_share;
  r.smooth_total = call.smooth_total ? *call.smooth_total : static_cast<A>(call.classes);
  r.masks = call.masks;
  r.count = call.target == nullptr ? 0 : call.mixed ? 2 : 1;
  const A scale = load_scale(call);
  const A share = call.mixed ? call.share[row * call.share_stride] : A(1);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (i >= r.count) continue;
    Slot<A>& slot = r.slot[i];
    bool bad = false;
    const int column = find_column(call, row, i, &bad);
    slot.column = column;
    slot.factor = bad ? not_a_number<A>() : load_coefficient(call, i) * A(0);  // NaN where the mean is over no weight
    slots.bad |= bad;
    if (column < 0) continue;
    slot.factor = load_coefficient(call, i) * (i == 0 ? share : A(1) - share);
    slot.weight = load_weight(call, column);
    slot.smooth_weight = load_smooth_weight(call, column);
    slot.x = T::get(x[column * call.x_c]);
    const A class_scale = load_class_scale(call, column), bias = load_bias(call, column);
    Margin<A> margin = call.margin;
    if (call.class_margin) {
      margin.value = call.class_margin[column];
      if (call.angular)
        margin.cosine = call.class_margin[int64_t{call.classes} + column],
        margin.sine = call.class_margin[int64_t{2} * call.classes + column];
    }
    set_slot(slot, shift_logit(slot.x, scale * class_scale, bias), class_scale * slot.x, scale, bias, margin,
             call.angular);
  }
  return slots;
}

// ---------------------------------------------------------------------------------------------------------------- sums

template <class A>
LTK_DEVICE Sums<A> empty_sums() {
  return {-infinity<A>(), 0, 0, 0, -infinity<A>(), kNoColumn};
}

template <class A>
LTK_DEVICE void take_better(Sums<A>& s, A best, int column) {
  const bool nan = best != best, held_nan = s.best != s.best;
  const bool same = best == s.best || (nan && held_nan);
  if ((nan && !held_nan) || best > s.best || (same && column < s.best_column)) s.best = best, s.best_column = column;
}

// Adds columns with shifted logits u; kGeneral: with weights w for the weighted sum.
template <bool kGeneral, int kCount, class A>
LTK_DEVICE void add(Sums<A>& s, const A (&u)[kCount], const A (&w)[kCount], bool masks) {
  A high = u[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) high = std::fmax(high, u[i]);
  if (high > s.peak) {
    s.total *= fast_exp(s.peak - high);  // 0 before the first column
    if constexpr (kGeneral) s.weighted += s.weight * (reference(s.peak) - high);
    s.peak = high;
  }
  const A base = reference(s.peak);
  A total = 0, weight = 0, weighted = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    total += fast_exp(u[i] - base);
    if constexpr (kGeneral) weight += w[i], weighted += times_weight(w[i], u[i] - base, masks);
  }
  s.total += total;
  if constexpr (kGeneral) s.weight += weight, s.weighted += weighted;
}

// Makes the sums relative to a peak at least as high.
template <bool kGeneral, class A>
LTK_DEVICE void move_peak(Sums<A>& s, A peak) {
  if (s.peak != -infinity<A>()) s.total *= std::exp(s.peak - reference(peak));
  if constexpr (kGeneral) s.weighted += s.weight * (reference(s.peak) - reference(peak));
  s.peak = peak;
}

template <bool kGeneral, class A>
LTK_DEVICE void merge(Sums<A>& s, Sums<A> other) {
  const A peak = std::fmax(s.peak, other.peak);
  move_peak<kGeneral>(s, peak);
  move_peak<kGeneral>(other, peak);
  s.total += other.total;
  if constexpr (kGeneral) {
    s.weight += other.weight, s.weighted += other.weighted;
    take_better(s, other.best, other.best_column);
  }
}

// Merges the sums of all lanes of a warp, in every lane.
template <bool kGeneral, class A>
LTK_DEVICE void merge_lanes(Sums<A>& s) {
  A peak = s.peak;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) peak = std::fmax(peak, shuffle_xor(peak, mask));
  move_peak<kGeneral>(s, peak);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    s.total += shuffle_xor(s.total, mask);
    if constexpr (kGeneral) {
      s.weight += shuffle_xor(s.weight, mask), s.weighted += shuffle_xor(s.weighted, mask);
      const A best = shuffle_xor(s.best, mask);
      take_better(s, best, shuffle_xor(s.best_column, mask));
    }
  }
}

// A row's peak and sum of exp(u - peak), as backward finds them.
template <class A>
struct Rest {
  A peak, total;
};

template <class A>
LTK_DEVICE Rest<A> make_rest(const LoadedSlots<A>& slots, const Sums<A>& s) {
  return {reference(s.peak), slots.bad ? not_a_number<A>() : s.total};
}

template <class A>
LTK_DEVICE void write_row(const Call<A>& call, int64_t row, const LoadedSlots<A>& slots, const Sums<A>& s) {
  const Rest<A> rest = make_rest(slots, s);
  const A log_total = std::log(rest.total);
  if (call.q) {
    call.loss[row] = load_coefficient(call, 0) * (s.weight * log_total - s.weighted);
    call.lse[row] = rest.peak + log_total;
  } else {
    call.loss[row] = compute_loss(slots.row, rest.peak, log_total, s.weighted);
    call.lse[row] = rest.peak + sum_term(slots.row, 0, rest.peak, log_total).total;
  }
  call.peak[row] = rest.peak;
  call.total[row] = rest.total;
  if (call.prediction) call.prediction[row] = s.best_column;
}

// soft_mass: sum of the row's soft weights, read with class probabilities only.
template <class A>
LTK_DEVICE Record<A> make_record(const Call<A>& call, const LoadedSlots<A>& slots, const Rest<A>& rest, A soft_mass,
                                 A grad_loss, A grad_lse) {
  const A log_total = std::log(rest.total);
  Record<A> r = {rest.peak, 0, 0, 0, {-1, -1}, {-1, -1}, {0, 0}, {0, 0}, {0, 0}, 0, log_total};
  if (call.q) {
    r.soft = grad_loss * load_coefficient(call, 0);
    r.slope = (r.soft * soft_mass + grad_lse) / rest.total;
    return r;
  }
  const RowGradient<A> g = compute_gradient(slots.row, rest.peak, log_total, grad_loss, grad_lse);
  r.slope = g.slope, r.smooth = g.smooth, r.soft = g.soft, r.z = g.z;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    r.column[i] = static_cast<int>(g.column[i]);
    r.target[i] = i < slots.row.count ? static_cast<int>(slots.row.slot[i].column) : -1;
    r.du[i] = g.du[i], r.dc[i] = g.dc[i], r.dm[i] = g.dm[i];
  }
  return r;
}

template <class A>
LTK_DEVICE Record<A> make_backward_record(const Call<A>& call, int64_t row, const LoadedSlots<A>& slots, A soft_mass) {
  const Rest<A> rest = {call.peak[row], call.total[row]};
  const A grad_lse = call.grad_lse ? call.grad_lse[row * call.grad_lse_stride] : A(0);
  return make_record(call, slots, rest, soft_mass, call.grad_loss[row * call.grad_loss_stride], grad_lse);
}

}  // namespace
}  // namespace ltk::cuda
