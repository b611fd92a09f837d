// Scalars of a row of softmax cross-entropy with margins, for every native kernel (host and device).
//
// Two numbers summarise a row's columns except its targets': their maximum `peak` and `total` = sum of exp(u - peak).
// Everything below is relative to `peak`. See lt_kernels/ops/margin_cross_entropy/reference.py for the definition.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "inline.h"

namespace ltk {

// Sums over a part of one row.
template <class A>
struct PartSums {
  A peak, total;            // as for a row; total 0 and peak 0 if no ordinary column of the part is above -inf
  double weight, weighted;  // smoothing or probabilities: sum of the weights, and of weight * (u - peak)
  A best;                   // prediction: largest raw logit and its first column
  int64_t best_column;
};

// Merges the sums of consecutive parts of a row, in their order.
template <class A>
LTK_INLINE PartSums<A> merge(const PartSums<A>* parts, int64_t count) {
  PartSums<A> all = parts[0];
  for (int64_t i = 1; i < count; ++i) {
    const PartSums<A>& part = parts[i];
    if (part.total != A(0) && (all.total == A(0) || part.peak > all.peak)) all.peak = part.peak, all.total = A(1);
    const bool nan = std::isnan(part.best), held_nan = std::isnan(all.best);
    if (part.best > all.best || (nan && !held_nan)) all.best = part.best, all.best_column = part.best_column;
  }
  double total = 0, weight = 0, weighted = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double shift = static_cast<double>(parts[i].peak) - static_cast<double>(all.peak);
    if (parts[i].total != A(0)) total += static_cast<double>(parts[i].total) * std::exp(shift);
    weight += parts[i].weight;
    weighted += parts[i].weighted + parts[i].weight * shift;
  }
  all.total = static_cast<A>(total), all.weight = weight, all.weighted = weighted;
  return all;
}

template <class A>
struct Margin {
  A value, cosine, sine;  // cosine and sine are read where the margin is an angle
};

template <class A>
struct Shift {  // phi(cosine, margin) and its derivatives
  A phi, dphi_dc, dphi_dm;
};

template <class A>
LTK_INLINE Shift<A> shift_target(A cosine, const Margin<A>& margin, bool angular) {
  const A m = margin.value, sin_m = margin.sine, cos_m = margin.cosine;
  if (!angular) return {cosine - m, A(1), A(-1)};
  if (cosine < -cos_m)  // theta > pi - margin
    return {cosine - m * sin_m, A(1), -(sin_m + m * cos_m)};
  const A sin2 = A(1) - cosine * cosine;
  const A sine = std::sqrt(sin2 > A(0) ? sin2 : A(0));
  const A sine_floor = std::sqrt(sin2 > A(1e-7) ? sin2 : A(1e-7));  // the slope stays finite at cosine = +-1
  return {cosine * cos_m - sine * sin_m, cos_m + cosine * sin_m / sine_floor, -(sine * cos_m + cosine * sin_m)};
}

template <class A>
LTK_INLINE A log_add_exp(A a, A b) {
  const A high = a > b ? a : b, low = a > b ? b : a;
  if (std::isnan(a) || std::isnan(b)) return a + b;
  if (std::isinf(high)) return high;
  return high + std::log1p(std::exp(low - high));
}

template <class A>
struct Slot {           // one target of one row
  int64_t column;       // -1: ignored
  A factor;             // k_t; the row's loss where the column is -1
  A weight;             // w_y
  A smooth_weight;      // its factor in label smoothing
  A x, plain, shifted;  // raw logit; u_y and v_y
  A cosine;
  Shift<A> shift;
};

// An infinite logit makes its row NaN, as in torch. That of an ordinary column does so by its difference from the peak;
// a target's is in no peak, and its loss would be 0.
template <class A>
LTK_INLINE A show_overflow(A logit) {
  return logit == std::numeric_limits<A>::infinity() ? std::numeric_limits<A>::quiet_NaN() : logit;
}

// Fills in the fields that depend on the target's logit. cosine = class_scale x; plain = scale cosine + bias, as the
// row has it.
template <class A>
LTK_INLINE void set_slot(Slot<A>& slot, A plain, A cosine, A scale, A bias, const Margin<A>& margin, bool angular) {
  slot.plain = show_overflow(plain);
  slot.cosine = cosine;
  if (margin.value == A(0) && !angular) {
    slot.shift = {cosine, A(1), A(-1)};
    slot.shifted = slot.plain;
  } else {
    slot.shift = shift_target(cosine, margin, angular);
    slot.shifted = show_overflow(scale * slot.shift.phi + bias);
  }
}

// A row's slots (two where labels are mixed) and the smoothing they share.
template <class A>
struct RowSlots {
  int count;
  Slot<A> slot[2];
  A smoothing;     // in [0, 1]
  A smooth_share;  // what smooth weights are multiplied by
  A smooth_total;  // their sum
  bool masks;      // whether a class of no weight may have a logit of -inf
};

template <class A>
LTK_INLINE bool is_separate(const RowSlots<A>& r, int i) {  // the other target is an ordinary column of term i
  const int64_t other = r.count == 2 ? r.slot[1 - i].column : -1;
  return other >= 0 && other != r.slot[i].column;
}

template <class A>
struct Term {  // log-sum-exps of one term, relative to peak
  A others;    // without the term's own column
  A total;     // with it, shifted
};

template <class A>
LTK_INLINE Term<A> sum_term(const RowSlots<A>& r, int i, A peak, A log_total) {
  A others = log_total;
  if (is_separate(r, i)) others = log_add_exp(others, r.slot[1 - i].plain - peak);
  return {others, r.slot[i].column < 0 ? others : log_add_exp(others, r.slot[i].shifted - peak)};
}

template <class A>
LTK_INLINE A softplus(A z) {
  return z > A(0) ? z + std::log1p(std::exp(-z)) : std::log1p(std::exp(z));
}

// Returns weight times value, 0 where a class has no weight: a masked one's value is -inf.
template <class A>
LTK_INLINE A times_weight(A weight, A value, bool masks) {
  return masks && weight == A(0) ? A(0) : weight * value;
}

// Returns the loss of a row. weighted_rest = sum over the ordinary columns of smooth_weight_j (u_j - peak); read only
// where smoothing > 0.
template <class A>
LTK_INLINE A compute_loss(const RowSlots<A>& r, A peak, A log_total, A weighted_rest) {
  A loss = 0;
  LTK_UNROLL
  for (int i = 0; i < 2; ++i) {
    if (i >= r.count) continue;
    const Slot<A>& slot = r.slot[i];
    if (slot.column < 0) {
      loss += slot.factor;
      continue;
    }
    const Term<A> term = sum_term(r, i, peak, log_total);
    A value = (A(1) - r.smoothing) * slot.weight * softplus(term.others - (slot.shifted - peak));
    if (r.smoothing > A(0)) {
      const Slot<A>& other = r.slot[1 - i];
      A weighted = weighted_rest + times_weight(slot.smooth_weight, slot.shifted - peak, r.masks);
      if (is_separate(r, i)) weighted += times_weight(other.smooth_weight, other.plain - peak, r.masks);
      value += r.smooth_share * (r.smooth_total * term.total - weighted);
    }
    loss += slot.factor * value;
  }
  return loss;
}

// Gradient of a row: du_j = slope * exp(u_j - peak) - smooth * smooth_weight_j - soft * w_j * q_j on ordinary columns
// (q: class probabilities), and per target the gradient of its column.
template <class A>
struct RowGradient {
  A peak, slope, smooth, soft;
  int64_t column[2];  // -1: none, or the same as column[0]
  A du[2];            // d/d(u_y), through v_y and through u_y
  A dc[2];            // the same times d(phi)/d(cosine) on the shifted part: d/d(class_scale x) / scale
  A dm[2];            // d/d(margin) / scale
  A dx[2];            // dc times x: d/d(class_scale) / scale
  A z;                // d/d(scale) through the targets' columns: beside the angle's slope, dc x loses all digits
};

template <class A>
LTK_INLINE RowGradient<A> compute_gradient(const RowSlots<A>& r, A peak, A log_total, A grad_loss, A grad_lse) {
  RowGradient<A> g = {peak, 0, 0, 0, {-1, -1}, {0, 0}, {0, 0}, {0, 0}, {0, 0}, 0};
  A dv[2] = {0, 0}, dtotal[2] = {0, 0}, smooth[2] = {0, 0}, total[2] = {0, 0};
  LTK_UNROLL
  for (int i = 0; i < 2; ++i) {
    if (i >= r.count) continue;
    const Slot<A>& slot = r.slot[i];
    const Term<A> term = sum_term(r, i, peak, log_total);
    const A k = slot.column < 0 ? A(0) : grad_loss * slot.factor;
    const A hard = k * (A(1) - r.smoothing) * (slot.column < 0 ? A(0) : slot.weight);
    const A from_lse = i == 0 ? grad_lse : A(0);
    smooth[i] = k * r.smooth_share;
    total[i] = term.total;
    dtotal[i] = hard + smooth[i] * r.smooth_total + from_lse;
    // without an ordinary column above -inf there is no peak, and exp(-total) may overflow; NaN where nothing is finite
    g.slope += dtotal[i] * (std::isinf(log_total) ? term.total - term.total : std::exp(-term.total));
    g.smooth += smooth[i];
    if (slot.column < 0) continue;
    const A wrong = std::exp(term.others - term.total), right = std::exp(slot.shifted - peak - term.total);
    dv[i] = -hard * wrong + smooth[i] * (r.smooth_total * right - slot.smooth_weight) + from_lse * right;
  }
  LTK_UNROLL
  for (int i = 0; i < 2; ++i) {
    if (i >= r.count) continue;
    const Slot<A>& slot = r.slot[i];
    if (slot.column < 0) continue;
    g.dm[i] = dv[i] * slot.shift.dphi_dm;
    g.z += dv[i] * slot.shift.phi;
    if (i == 1 && slot.column == r.slot[0].column) {  // one column, both terms
      g.du[0] += dv[1];
      g.dc[0] += dv[1] * slot.shift.dphi_dc;
      g.dx[0] = g.dc[0] * slot.x;
      continue;
    }
    A plain = 0;
    const int j = 1 - i;
    if (r.count == 2 && r.slot[j].column != slot.column)
      plain = dtotal[j] * std::exp(slot.plain - peak - total[j]) - smooth[j] * slot.smooth_weight;
    g.column[i] = slot.column;
    g.du[i] = dv[i] + plain;
    g.dc[i] = dv[i] * slot.shift.dphi_dc + plain;
    g.dx[i] = g.dc[i] * slot.x;
    g.z += plain * slot.cosine;
  }
  return g;
}

}  // namespace ltk
