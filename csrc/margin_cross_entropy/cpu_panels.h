// CPU kernels of panels: positions (pixels) are contiguous.
#pragma once

#include "cpu_terms.h"

namespace ltk {
namespace LTK_ISA {
namespace {

// Positions [begin, begin + count) of sample n, and what is known of each.
template <class T, class A>
struct Panel {
  static constexpr int64_t W = Simd<A>::W;
  const Call<A>& call;
  const int64_t n, begin, count;
  A* const scratch;  // [classes, padded]: u, then exp(u - peak); -inf, then 0, at targets
  const int64_t padded = (count + kPadding - 1) / kPadding * kPadding;
  A peak[kPanel], best[kPanel], total[kPanel] = {};
  double weight[kPanel] = {}, weighted[kPanel] = {};
  Int<A> index[kPanel] = {};
  RowSlots<A> slots[kPanel];
  RowGradient<A> gradients[kPanel];

  Panel(const Call<A>& call, int64_t n, int64_t begin, int64_t count, A* scratch)
      : call(call), n(n), begin(begin), count(count), scratch(scratch) {}

  inline const T* logits(int64_t c) const {
    return static_cast<const T*>(call.x) + n * call.x_n + begin + c * call.x_c;
  }

  inline Vec<A> probabilities(int64_t c, int64_t p) const {
    return get_some<A>(call.q + n * call.q_n + c * call.q_c + begin + p, count - p, A(0));
  }

  // Sets u of all targets.
  template <class Function>
  inline void set_targets(Function value) {
    for (int64_t p = 0; p < count; ++p)
      each_target(slots[p], 0, call.classes, [&](int, int64_t c) {
        A& u = scratch[c * padded + p];
        u = value(p, u);
      });
  }

  // Computes u, its maxima, and the largest logits.
  inline void shift() {
    for (int64_t p = 0; p < padded; ++p) peak[p] = best[p] = minus_infinity<A>();
    for (int64_t c = 0; c < call.classes; ++c) {
      const A a = scale_of(call, c), bias = bias_of(call, c);
      A* u = scratch + c * padded;
      for (int64_t p = 0; p < padded; p += W) {
        const Vec<A> logit = get_some<A>(logits(c) + p, count - p, A(0));
        const Vec<A> v = affine(logit, a, bias);
        store(u + p, v);
        store(peak + p, maximum<A>(v, load(peak + p)));
        if (call.prediction) {
          const Vec<A> held = load(best + p);
          const auto better = (logit > held) | ((logit != logit) & (held == held));
          store(best + p, better ? logit : held);
          store_index<A>(index + p, better ? typename Simd<A>::I{} + static_cast<Int<A>>(c) : load_index<A>(index + p));
        }
      }
    }
  }

  // Loads the slots, and takes their columns out of the maxima.
  inline void leave_out_targets() {
    const A lowest = minus_infinity<A>();
    for (int64_t p = 0; p < count; ++p) slots[p] = load_slots(call, n * call.k + begin + p, logits(0) + p, call.x_c);
    bool again = false;
    set_targets([&](int64_t p, A u) {
      again |= !(u < peak[p]);
      return lowest;
    });
    if (again) {
      for (int64_t p = 0; p < padded; ++p) peak[p] = lowest;
      for (int64_t c = 0; c < call.classes; ++c)
        for (int64_t p = 0; p < padded; p += W)
          store(peak + p, maximum<A>(load(scratch + c * padded + p), load(peak + p)));
    }
    for (int64_t p = 0; p < padded; ++p)
      if (peak[p] == lowest) peak[p] = 0;
  }

  // Sums the weights, and weight * (u - peak).
  inline void add_weights() {
    const A share = call.smoothing / static_cast<A>(call.classes), kept = A(1) - call.smoothing;
    set_targets([&](int64_t p, A) { return peak[p]; });
    for (int64_t first = 0; first < call.classes; first += kTerms) {
      A weight_part[kPanel] = {}, weighted_part[kPanel] = {};
      for (int64_t c = first; c < call.classes && c < first + kTerms; ++c) {
        const A w = weight_of(call, c);
        for (int64_t p = 0; p < padded; p += W) {
          Vec<A> each = splat(w);
          if (call.q) each = w * (kept * probabilities(c, p) + share);
          store(weight_part + p, load(weight_part + p) + each);
          store(weighted_part + p, load(weighted_part + p) + each * (load(scratch + c * padded + p) - load(peak + p)));
        }
      }
      for (int64_t p = 0; p < padded; ++p) weight[p] += weight_part[p], weighted[p] += weighted_part[p];
    }
    set_targets([&](int64_t, A) { return minus_infinity<A>(); });
  }

  // Turns u into exp(u - peak), and sums it.
  inline void add_exponentials() {
    for (int64_t first = 0; first < call.classes; first += kTerms) {
      A part[kPanel] = {};
      for (int64_t c = first; c < call.classes && c < first + kTerms; ++c)
        for (int64_t p = 0; p < padded; p += W) {
          const Vec<A> e = exp_vector(load(scratch + c * padded + p) - load(peak + p));
          store(scratch + c * padded + p, e);
          store(part + p, load(part + p) + e);
        }
      for (int64_t p = 0; p < padded; p += W) store(total + p, load(total + p) + load(part + p));
    }
  }

  inline void write_outputs() {
    for (int64_t p = 0; p < count; ++p) {
      const PartSums<A> s = {peak[p], total[p], weight[p], weighted[p], best[p], index[p]};
      gradients[p] = finish_row(call, slots[p], n * call.k + begin + p, s);
    }
  }

  inline void write_gradient() {
    A slope[kPanel], smooth[kPanel], soft[kPanel];
    for (int64_t p = 0; p < count; ++p)
      slope[p] = gradients[p].slope, smooth[p] = gradients[p].smooth, soft[p] = gradients[p].soft;
    for (int64_t p = count; p < padded; ++p) slope[p] = smooth[p] = soft[p] = 0;
    T* grad = static_cast<T*>(call.grad) + n * call.grad_n + begin;
    for (int64_t c = 0; c < call.classes; ++c) {
      const A a = scale_of(call, c), w = weight_of(call, c);
      for (int64_t p = 0; p < padded && p < count; p += W) {
        Vec<A> less = load(smooth + p);
        if (call.q) less = less + load(soft + p) * probabilities(c, p);
        const Vec<A> du = load(slope + p) * load(scratch + c * padded + p) - less * w;
        put_some<A>(grad + c * call.grad_c + p, du * a, count - p);
      }
    }
    for (int64_t p = 0; p < count; ++p)
      for (int i = 0; i < 2; ++i) {
        const int64_t c = gradients[p].column[i];
        if (c >= 0) IO<T>::put(grad + c * call.grad_c + p, scale_of(call, c) * gradients[p].dc[i]);
      }
  }
};

template <class T, class A>
void forward_panel(const Call<A>& call, int64_t n, int64_t begin, int64_t count, A* scratch) {
  Panel<T, A> panel(call, n, begin, count, scratch);
  panel.shift();
  panel.leave_out_targets();
  if (call.q || call.smoothing > A(0)) panel.add_weights();
  panel.add_exponentials();
  panel.write_outputs();
  if (call.grad) panel.write_gradient();
}

template <class T, class A>
void write_class_gradient(const Call<A>& call, const RowGradients<A>& rows, int64_t n, int64_t column, int64_t begin,
                          int64_t end, double* du_sum, double* dx_sum) {
  constexpr int64_t W = Simd<A>::W, kFlush = kTerms * W;
  using IVec = typename Simd<A>::I;
  const T* x = static_cast<const T*>(call.x) + n * call.x_n + column * call.x_c;
  T* grad = call.grad ? static_cast<T*>(call.grad) + n * call.grad_n + column * call.grad_c : nullptr;
  const A* q = call.q ? call.q + n * call.q_n + column * call.q_c : nullptr;
  A* grad_q = call.grad_q ? call.grad_q + n * call.grad_q_n + column * call.grad_q_c : nullptr;
  const A a = scale_of(call, column), bias = bias_of(call, column), w = weight_of(call, column);
  const IVec here = IVec{} + static_cast<Int<A>>(column);
  for (int64_t block = begin; block < end; block += kFlush) {
    Vec<A> du_total = {}, dx_total = {};
    const int64_t stop = block + kFlush < end ? block + kFlush : end;
    for (int64_t p = block; p < stop; p += W) {
      const int64_t count = stop - p;
      const Vec<A> logit = get_some<A>(x + p, count, A(0));
      const Vec<A> u = affine(logit, a, bias) - get_some<A>(rows.peak + p, count, A(0));
      Vec<A> less = get_some<A>(rows.smooth + p, count, A(0));
      const Vec<A> soft = get_some<A>(rows.soft + p, count, A(0));
      if (q) less = less + soft * get_some<A>(q + p, count, A(0));
      Vec<A> du = get_some<A>(rows.slope + p, count, A(0)) * exp_vector(u) - less * w;
      Vec<A> dc = du;
      for (int i = 0; i < 2; ++i) {
        IVec columns = IVec{} - Int<A>(1);
        if (count >= W) {
          columns = load_index<A>(rows.column[i] + p);
        } else {
          for (int64_t l = 0; l < count; ++l) columns[l] = rows.column[i][p + l];
        }
        du = columns == here ? get_some<A>(rows.du[i] + p, count, A(0)) : du;
        dc = columns == here ? get_some<A>(rows.dc[i] + p, count, A(0)) : dc;
      }
      if (grad) put_some<A>(grad + p, dc * a, count);
      if (grad_q) {
        Vec<A> log_total = {};
        for (int64_t l = 0; l < W && l < count; ++l) log_total[l] = std::log(call.total[n * call.k + p + l]);
        put_some<A>(grad_q + p, soft * w * (log_total - u), count);
      }
      for (int64_t l = count; l < W; ++l) du[l] = dc[l] = 0;
      du_total = du_total + du;
      dx_total = dx_total + dc * logit;
    }
    if (du_sum) *du_sum += sum_lanes<A>(du_total);
    if (dx_sum) *dx_sum += sum_lanes<A>(dx_total);
  }
}

}  // namespace
}  // namespace LTK_ISA
}  // namespace ltk
