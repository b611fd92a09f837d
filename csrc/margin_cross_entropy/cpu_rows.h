// CPU kernels of rows whose classes are contiguous.
#pragma once

#include "cpu_terms.h"

namespace ltk {
namespace LTK_ISA {
namespace {

constexpr int64_t kBlock = 2048;        // columns per block of a row
constexpr int64_t kOverlapped = 32768;  // rows of this many columns are written while the next one is read
constexpr int64_t kSample = 64;         // columns from which a row's peak is guessed
constexpr int64_t kAhead = 1024;        // how far ahead of the arithmetic logits are fetched

// The shift u = a x + b for loops that store: the flags say which class vectors exist, and the uniform scale stays in a
// register.
template <class A, class Scaled, class Biased>
struct ShiftedColumns {
  const A *class_scale, *class_bias;
  Vec<A> uniform;

  ShiftedColumns(const Call<A>& call, Scaled, Biased)
      : class_scale(call.class_scale), class_bias(call.class_bias), uniform(splat(call.scale)) {}

  // Returns u of the logits at x, which are those of columns from j on; -inf in the lanes beyond `count`.
  template <class T>
  LTK_ALWAYS_INLINE Vec<A> shift(const T* x, int64_t j, int64_t count) const {
    Vec<A> a = uniform, b = {};
    if constexpr (Scaled::on) a = get_some<A>(class_scale + j, count, A(0));
    if constexpr (Biased::on) b = get_some<A>(class_bias + j, count, A(0));
    Vec<A> u = affine(get_some<A>(x, count, A(0)), a, b);
    for (int64_t i = count; i < Simd<A>::W; ++i) u[i] = minus_infinity<A>();
    return u;
  }
};

// Finds the first column of a part's largest raw logit; a NaN counts as largest, as in torch.
template <class T, class A>
LTK_INLINE void find_best(const T* x, int64_t begin, int64_t count, PartSums<A>* result) {
  constexpr int64_t W = Simd<A>::W;
  const A lowest = minus_infinity<A>();
  Vec<A> best = splat(lowest);
  typename Simd<A>::I index = {}, column = {};
  for (int64_t i = 0; i < W; ++i) column[i] = i;
  for (int64_t j = 0; j < count; j += W, column += W) {
    const Vec<A> v = get_some<A>(x + begin + j, count - j, lowest);
    const auto better = (v > best) | ((v != v) & (best == best));
    best = better ? v : best;
    index = better ? column : index;
  }
  A largest = best[0];
  int64_t first = index[0];
  for (int64_t i = 1; i < W; ++i) {
    const bool nan = best[i] != best[i], held_nan = largest != largest;
    const bool tie = best[i] == largest || (nan && held_nan);
    if ((nan && !held_nan) || best[i] > largest || (tie && index[i] < first)) largest = best[i], first = index[i];
  }
  result->best = largest;
  result->best_column = begin + first;
}

// Writes u of `count` columns from `begin` to scratch, -inf in the padding; returns their maximum.
template <class T, class A>
LTK_INLINE A shift_block(const Call<A>& call, const T* x, int64_t begin, int64_t count, A* scratch) {
  constexpr int64_t W = Simd<A>::W;
  return with_flags(call.class_scale, call.class_bias, [&](auto scaled, auto biased) {
    const ShiftedColumns columns(call, scaled, biased);
    Vec<A> high = splat(minus_infinity<A>());
    auto keep = [&](int64_t j, Vec<A> u) {
      store(scratch + j, u);
      high = maximum<A>(u, high);
    };
    int64_t j = 0;
    for (; j + W <= count; j += W) keep(j, columns.shift(x + begin + j, begin + j, W));
    if (j < count) keep(j, columns.shift(x + begin + j, begin + j, count - j));
    return max_lanes<A>(high);
  });
}

// Sums the weights of a block's columns, and weight * (u - peak), without the targets' columns.
template <class A>
LTK_INLINE void add_weights(const Call<A>& call, const RowSlots<A>& slots, int64_t row, int64_t begin, int64_t count,
                            A* u, PartSums<A>* result) {
  constexpr int64_t W = Simd<A>::W;
  const A peak = result->peak;
  each_target(slots, begin, count, [&](int, int64_t j) { u[j] = peak; });  // a target adds nothing to the sum here
  const A share = call.smoothing / static_cast<A>(call.classes), kept = A(1) - call.smoothing;
  const A* q = call.q ? probabilities_of(call, row) + begin : nullptr;
  Vec<A> weights = {}, weighted = {};
  for (int64_t j = 0; j < count; j += W) {
    if (j % (kTerms * W) == 0) {
      result->weight += sum_lanes<A>(weights);
      result->weighted += sum_lanes<A>(weighted);
      weights = weighted = Vec<A>{};
    }
    Vec<A> w = weights_of(call, begin + j, count - j);
    if (q) w = w * (kept * get_some<A>(q + j, count - j, A(0)) + share);
    Vec<A> product = w * (load(u + j) - peak);
    for (int64_t i = count - j; i < W; ++i) w[i] = 0, product[i] = 0;
    weights = weights + w;
    weighted = weighted + product;
  }
  result->weight += sum_lanes<A>(weights);
  result->weighted += sum_lanes<A>(weighted);
  each_target(slots, begin, count, [&](int i, int64_t j) {
    if (u[j] == peak && !(i == 1 && slots.slot[0].column == slots.slot[1].column))
      result->weight -= slots.slot[i].weight;
    u[j] = minus_infinity<A>();
  });
}

// Turns u into exp(u - peak) in scratch; returns the sum.
template <class T, class A>
LTK_INLINE A sum_exponentials(int64_t padded, A peak, A* scratch, const T* next, T* grad) {
  constexpr int64_t W = Simd<A>::W;
  Vec<A> grand_total = {};
  const Vec<A> high = splat(peak);
  for (int64_t j = 0; j < padded;) {
    Vec<A> total = {};
    const int64_t pause = padded - j > kTerms * W ? j + kTerms * W : padded;
    for (; j < pause; j += W) {
      __builtin_prefetch(next + j);
      __builtin_prefetch((grad ? grad : next) + j, 1);
      const Vec<A> e = exp_vector(load(scratch + j) - high);
      store(scratch + j, e);
      total = total + e;
    }
    grand_total = grand_total + total;
  }
  return sum_lanes<A>(grand_total);
}

// Sums `count` columns from `begin` of one row in two sweeps. Leaves exp(u - peak) in scratch, 0 at targets and in the
// padding. `next`: logits to fetch meanwhile; `grad`: where this block's gradient will be written, or null.
template <class T, class A>
LTK_INLINE PartSums<A> statistics(const Call<A>& call, const RowSlots<A>& slots, const T* x, int64_t row, int64_t begin,
                                  int64_t count, A* scratch, const T* next, T* grad) {
  constexpr int64_t W = Simd<A>::W;
  const A lowest = minus_infinity<A>();
  const int64_t padded = (count + W - 1) / W * W;
  A peak = shift_block(call, x, begin, count, scratch);

  PartSums<A> result = {};
  if (call.prediction) find_best(x, begin, count, &result);

  bool again = false;
  each_target(slots, begin, count, [&](int, int64_t j) {
    again |= !(scratch[j] < peak);
    scratch[j] = lowest;
  });
  if (again) {
    Vec<A> high = splat(lowest);
    for (int64_t j = 0; j < padded; j += W) high = maximum<A>(load(scratch + j), high);
    peak = max_lanes<A>(high);
  }
  if (peak == lowest) peak = 0;
  result.peak = peak;
  if (call.q || call.smoothing > A(0)) add_weights(call, slots, row, begin, count, scratch, &result);
  result.total = sum_exponentials(padded, peak, scratch, next, grad);
  return result;
}

// A row's gradient that is still to be written, vector by vector, while the next row's exponentials are computed:
// stores wait for memory, exponentials for arithmetic.
template <class T, class A>
struct Pending {
  T* out;
  const A* exponentials;
  int64_t left;  // whole vectors
  Vec<A> slope;
  bool stream;
  T* grad;  // the row's, or null: nothing is pending
  RowGradient<A> row;

  // Writes head and tail now; the whole vectors between them follow later.
  static inline Pending make(const Call<A>& call, const RowGradient<A>& g, A slope, const A* exponentials, T* grad) {
    constexpr int64_t W = Simd<A>::W;
    const Vec<A> scaled = splat(slope * call.scale);
    const bool stream = call.stream && LTK_LEVEL > 0;
    const int64_t misaligned = stream ? static_cast<int64_t>(reinterpret_cast<uintptr_t>(grad) / sizeof(T)) % W : 0;
    int64_t head = misaligned > 0 ? W - misaligned : 0;
    if (head > call.classes) head = call.classes;
    if (head > 0) put_some<A>(grad, load(exponentials) * scaled, head);
    const int64_t whole = (call.classes - head) / W, tail = head + whole * W;
    if (tail < call.classes) put_some<A>(grad + tail, load(exponentials + tail) * scaled, call.classes - tail);
    return {grad + head, exponentials + head, whole, scaled, stream, grad, g};
  }

  inline void write_one() {
    const Vec<A> v = load(exponentials) * slope;
    if (stream) {
      store_past_caches(out, IO<T>::pack(v));
    } else {
      IO<T>::put_vector(out, v);
    }
    out += Simd<A>::W, exponentials += Simd<A>::W, --left;
  }

  inline void finish(const Call<A>& call) {
    while (left > 0) write_one();
    if (grad != nullptr)
      for (int i = 0; i < 2; ++i)
        if (row.column[i] >= 0) IO<T>::put(grad + row.column[i], scale_of(call, row.column[i]) * row.dc[i]);
    grad = nullptr;
  }
};

// Sweeps over a row once with a guess of its peak, and writes the pending row. Leaves exp(u - guess) in scratch, 0 at
// targets and in the padding, and the true peak in *peak; returns the sum. `fetch`: memory to be written next, or null.
template <class T, class A>
LTK_INLINE A guessed_sweep(const Call<A>& call, const RowSlots<A>& slots, const T* x, A guess, A* scratch,
                           const T* fetch, A* peak, Pending<T, A>* pending) {
  constexpr int64_t W = Simd<A>::W;
  const int64_t count = call.classes;
  const int64_t last = count / W * W;
  int64_t careful[3] = {last, last, last};  // vectors with lanes to leave out: the last, and the targets'
  for (int i = 0; i < slots.count; ++i)
    if (slots.slot[i].column >= 0) careful[i + 1] = slots.slot[i].column / W * W;
  const int order[3] = {0, 1, 0};  // a sort of three
  for (const int i : order)
    if (careful[i] > careful[i + 1]) {
      const int64_t smaller = careful[i + 1];
      careful[i + 1] = careful[i];
      careful[i] = smaller;
    }

  auto sweep = [&](auto scaled, auto biased, auto writes) {
    const ShiftedColumns columns(call, scaled, biased);
    const Vec<A> reference = splat(guess);
    Vec<A> high = splat(minus_infinity<A>()), total = {}, grand_total = {};
    auto add = [&](int64_t j, Vec<A> u) {
      const Vec<A> e = exp_vector(u - reference);
      store(scratch + j, e);
      high = maximum<A>(u, high);
      total = total + e;
    };
    Pending<T, A> writing = *pending;
    int64_t j = 0;
    for (const int64_t stop : careful) {
      while (j < stop) {
        const int64_t pause = stop - j > kTerms * W ? j + kTerms * W : stop;
        for (; j < pause; j += W) {
          __builtin_prefetch(x + j + kAhead);
          if (fetch) __builtin_prefetch(fetch + j, 1);
          if constexpr (decltype(writes)::on) {
            if (writing.left > 0) writing.write_one();
          }
          add(j, columns.shift(x + j, j, W));
        }
        grand_total = grand_total + total;
        total = Vec<A>{};
      }
      if (j != stop || j >= count) continue;  // two targets in one vector, or no last vector
      Vec<A> u = columns.shift(x + j, j, count - j);
      each_target(slots, j, W, [&](int, int64_t lane) { u[lane] = minus_infinity<A>(); });
      add(j, u);
      j += W;
    }
    *pending = writing;
    *peak = max_lanes<A>(high);
    return sum_lanes<A>(grand_total + total);
  };
  return with_flags(call.class_scale, call.class_bias, [&](auto scaled, auto biased) {
    return pending->left > 0 ? sweep(scaled, biased, Flag<true>{}) : sweep(scaled, biased, Flag<false>{});
  });
}

// Writes the gradient of the columns [begin, end) from their exponentials times `slope`.
template <class T, class A>
LTK_INLINE void write_gradient(const Call<A>& call, const RowGradient<A>& g, A slope, const A* q, const A* exponentials,
                               int64_t begin, int64_t end, T* grad) {
  constexpr int64_t W = Simd<A>::W;
  for (int64_t j = begin; j < end; j += W) {
    Vec<A> less = splat(g.smooth);
    if (q) less = less + g.soft * get_some<A>(q + j, end - j, A(0));
    if (call.weight) less = less * get_some<A>(call.weight + j, end - j, A(0));
    const Vec<A> du = slope * load(exponentials + j) - less;
    put_some<A>(grad + j, du * scales_of(call, j, end - j), end - j);
  }
}

template <class T, class A>
void forward_rows(const Call<A>& call, int64_t begin, int64_t end, A* scratch) {
  const int64_t count = call.classes, blocks = (count + kBlock - 1) / kBlock;
  PartSums<A> parts[kLargestRow / sizeof(A) / kBlock + 1];
  Pending<T, A> pending = {};
  A* const buffers[2] = {scratch, scratch + (count + kPadding)};
  for (int64_t row = begin; row < end; ++row) {
    scratch = buffers[row % 2];
    const T* x = row_pointer<T>(call, row);
    T* grad = gradient_pointer<T>(call, row);
    const RowSlots<A> slots = load_slots(call, row, x, int64_t(1));
    const bool guessing = !call.q && call.smoothing == A(0);
    PartSums<A> sums = {};
    A guess = 0;
    if (guessing) {
      // A sample of the row gives the guess. Where the peak is too far from it for exponentials to stay in range (a
      // sample unlike the row, an outlier, a target among the samples) the row is swept again from its true peak.
      const A lowest = minus_infinity<A>();
      Vec<A> high = splat(lowest);
      for (int64_t j = 0; j < count && j < kSample; j += Simd<A>::W) {
        const Vec<A> logit = get_some<A>(x + j, count - j, lowest);
        const Vec<A> u = affine(logit, scales_of(call, j, count - j), biases_of(call, j, count - j));
        high = u > high ? u : high;
      }
      const A most = max_lanes<A>(high);
      guess = most > lowest && most < -lowest ? most : A(0);
      A total = guessed_sweep(call, slots, x, guess, scratch, call.stream ? nullptr : static_cast<const T*>(grad),
                              &sums.peak, &pending);
      if (sums.peak == lowest) {
        sums.peak = guess = 0;
      } else if (sums.peak > guess + A(60) || sums.peak < guess - A(60)) {
        guess = sums.peak;
        total = guessed_sweep(call, slots, x, guess, scratch, call.stream ? nullptr : static_cast<const T*>(grad),
                              &sums.peak, &pending);
      }
      sums.total = static_cast<A>(total * std::exp(static_cast<double>(guess) - static_cast<double>(sums.peak)));
      if (call.prediction) find_best(x, 0, count, &sums);
    } else {
      const T* next_row = row + 1 < end ? row_pointer<T>(call, row + 1) : x;
      for (int64_t b = 0; b < blocks; ++b)
        parts[b] = statistics(call, slots, x, row, b * kBlock, b + 1 < blocks ? kBlock : count - b * kBlock,
                              scratch + b * kBlock, b + 1 < blocks ? x + (b + 1) * kBlock : next_row,
                              grad ? grad + b * kBlock : nullptr);
      sums = merge(parts, blocks);
    }
    pending.finish(call);
    const RowGradient<A> g = finish_row(call, slots, row, sums);
    if (!grad) continue;
    if (guessing && !call.class_scale) {
      pending = Pending<T, A>::make(call, g, g.slope * std::exp(guess - g.peak), scratch, grad);
      if (count < kOverlapped) pending.finish(call);
      continue;
    }
    const A* q = probabilities_of(call, row);
    if (guessing) {
      write_gradient(call, g, g.slope * std::exp(guess - g.peak), q, scratch, 0, count, grad);
    } else {
      for (int64_t b = 0; b < blocks; ++b)
        write_gradient(call, g, g.slope * std::exp(parts[b].peak - g.peak), q, scratch, b * kBlock,
                       b + 1 < blocks ? (b + 1) * kBlock : count, grad);
    }
    for (int i = 0; i < 2; ++i)
      if (g.column[i] >= 0) IO<T>::put(grad + g.column[i], scale_of(call, g.column[i]) * g.dc[i]);
  }
  pending.finish(call);
  finish_stream(call.stream);
}

template <class T, class A>
PartSums<A> sum_part(const Call<A>& call, int64_t row, int64_t begin, int64_t end, A* scratch) {
  const T* x = row_pointer<T>(call, row);
  return statistics(call, load_slots(call, row, x, int64_t(1)), x, row, begin, end - begin, scratch, x + begin,
                    static_cast<T*>(nullptr));
}

template <class T, class A>
RowGradient<A> finish_cut_row(const Call<A>& call, int64_t row, const PartSums<A>& sums) {
  return finish_row(call, load_slots(call, row, row_pointer<T>(call, row), call.x_c), row, sums);
}

template <class T, class A>
void write_part_gradient(const Call<A>& call, const RowGradient<A>& g, int64_t row, int64_t begin, int64_t end,
                         A* column_du, A* column_dx) {
  constexpr int64_t W = Simd<A>::W;
  const T* x = row_pointer<T>(call, row);
  T* grad = gradient_pointer<T>(call, row);
  const A* q = probabilities_of(call, row);
  A* grad_q = call.grad_q ? call.grad_q + row_offset(call, row, call.grad_q_n, call.grad_q_k) : nullptr;
  const A log_total = grad_q ? std::log(call.total[row]) : A(0);
  const Vec<A> peak = splat(g.peak);

  auto step = [&](int64_t j, int64_t count, auto plain) {  // inlined; `count` is the constant W but for the last vector
    const Vec<A> a = scales_of(call, j, count), logit = get_some<A>(x + j, count, A(0));
    const Vec<A> u = affine(logit, a, biases_of(call, j, count)) - peak;
    Vec<A> du = g.slope * exp_vector(u);
    if constexpr (!decltype(plain)::on) {
      const Vec<A> w = weights_of(call, j, count);
      Vec<A> less = splat(g.smooth);
      if (q) less = less + g.soft * get_some<A>(q + j, count, A(0));
      du = du - less * w;
      if (grad_q) put_some<A>(grad_q + j, g.soft * w * (log_total - u), count);
      if (column_du) {
        A *sum_du = column_du + (j - begin), *sum_dx = column_dx + (j - begin);
        put_some<A>(sum_du, get_some<A>(sum_du, count, A(0)) + du, count);
        put_some<A>(sum_dx, get_some<A>(sum_dx, count, A(0)) + du * logit, count);
      }
    }
    if (grad) put_some<A>(grad + j, du * a, count);
  };
  auto sweep = [&](int64_t from, int64_t to, auto plain) {
    int64_t j = from;
    for (; j + W <= to; j += W) {
      __builtin_prefetch(x + j + kAhead);
      step(j, W, plain);
    }
    if (j < to) step(j, to - j, plain);
  };
  const bool plain = g.smooth == A(0) && g.soft == A(0) && !grad_q && !column_du;
  auto ordinary = [&](int64_t from, int64_t to) {  // columns without a target
    plain ? sweep(from, to, Flag<true>{}) : sweep(from, to, Flag<false>{});
  };
  const bool swapped = g.column[1] >= 0 && (g.column[0] < 0 || g.column[1] < g.column[0]);
  const int ascending[2] = {swapped ? 1 : 0, swapped ? 0 : 1};
  int64_t from = begin;
  for (const int i : ascending) {
    const int64_t column = g.column[i];
    if (column < from || column >= end) continue;
    ordinary(from, column);
    if (column_du) column_du[column - begin] += g.du[i];
    if (column_du) column_dx[column - begin] += g.dc[i] * IO<T>::get(x + column);  // before grad, which may be x
    if (grad) IO<T>::put(grad + column, scale_of(call, column) * g.dc[i]);
    from = column + 1;
  }
  ordinary(from, end);
}

}  // namespace
}  // namespace LTK_ISA
}  // namespace ltk
