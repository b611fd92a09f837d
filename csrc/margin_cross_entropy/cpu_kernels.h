// Vector kernels of the rows kernel, compiled once per instruction set.
//
// Memory sees one read and one write per logit. A row's exponentials are taken from a guess of its peak, which a sample
// gives, into `scratch`; a second sweep writes its gradient from there. Where sums relative to the peak are needed
// (label smoothing, class probabilities) and where rows are cut, a block is swept twice in the first-level cache:
// maximum first, then exponentials.

#include "../common/cpu/vectors.h"
#include "cpu_call.h"

namespace ltk {
namespace LTK_ISA {
namespace {

constexpr int64_t kBlock = 2048;       // columns per block of a row
constexpr int64_t kOverlapped = 1024;  // rows of this many columns are written while the next one is read
constexpr int64_t kSample = 64;        // columns from which a row's peak is guessed
constexpr int64_t kAhead = 1024;       // how far ahead of the arithmetic logits are fetched

template <class T, class A>
LTK_INLINE const T* row_pointer(const Call<A>& call, int64_t row) {
  return static_cast<const T*>(call.x) + (row / call.k) * call.x_n + (row % call.k) * call.x_k;
}

template <class A>
LTK_INLINE A scale_of(const Call<A>& call, int64_t column) {
  return call.class_scale ? call.class_scale[column] : call.scale;
}

template <class A>
LTK_INLINE A weight_of(const Call<A>& call, int64_t column) {
  return call.weight ? call.weight[column] : A(1);
}

template <class A>
LTK_INLINE A smooth_weight_of(const Call<A>& call, int64_t column) {
  return call.smooth_weight ? call.smooth_weight[column] : A(1);
}

template <class A>
LTK_INLINE A coefficient_of(const Call<A>& call, int i) {
  return call.coefficient ? call.coefficient[i] : A(1);
}

// Loads the slots of a row whose logits start at x, columns `stride` apart.
template <class T, class A>
LTK_INLINE RowSlots<A> load_slots(const Call<A>& call, int64_t row, const T* x, int64_t stride) {
  RowSlots<A> r = {};
  r.smoothing = call.smoothing;
  r.smooth_share = call.smooth_share;
  r.smooth_total = call.smooth_total;
  r.masks = call.masks;
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
    slot.smooth_weight = smooth_weight_of(call, column);
    slot.x = IO<T>::get(x + column * stride);
    const A a = scale_of(call, column), bias = call.class_bias ? call.class_bias[column] : A(0);
    const A m = call.class_margin ? call.class_margin[column] : call.margin;
    const Margin<A> margin = {m, call.angular ? std::cos(m) : A(1), call.angular ? std::sin(m) : A(0)};
    const A cosine = call.class_scale ? call.cosine_scale[column] * slot.x : slot.x;
    set_slot(slot, affine(slot.x, a, bias), cosine, call.scale, bias, margin, call.angular);
  }
  return r;
}

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

// Adds the weights of a part's ordinary columns and their weighted sum to the result. scratch: u, with the targets at
// -inf. Not inlined: the loops of every row stay small.
template <class A>
[[gnu::noinline]] void sum_weighted(const Call<A>& call, const RowSlots<A>& slots, int64_t row, int64_t begin,
                                    int64_t count, A* scratch, PartSums<A>* result) {
  constexpr int64_t W = Simd<A>::W;
  const A lowest = minus_infinity<A>(), peak = result->peak;
  const int64_t padded = (count + W - 1) / W * W;
  for (int i = 0; i < slots.count; ++i) {  // a target adds nothing to the sum here
    const int64_t j = slots.slot[i].column - begin;
    if (slots.slot[i].column >= 0 && j >= 0 && j < count) scratch[j] = peak;
  }
  const A share = call.smooth_share, kept = A(1) - call.smoothing;
  const A* q = call.q ? call.q + (row / call.k) * call.q_n + (row % call.k) * call.q_k + begin : nullptr;
  Vec<A> weights = {}, weighted = {};
  for (int64_t j = 0; j < padded; j += W) {
    if (j % (kTerms * W) == 0) {
      result->weight += sum_lanes<A>(weights);
      result->weighted += sum_lanes<A>(weighted);
      weights = weighted = Vec<A>{};
    }
    Vec<A> w = call.smooth_weight ? get_some<A>(call.smooth_weight + begin + j, count - j, A(0)) : splat(A(1));
    if (q) {
      Vec<A> own = kept * get_some<A>(q + j, count - j, A(0));
      if (call.weight) own = own * get_some<A>(call.weight + begin + j, count - j, A(0));
      w = call.smoothing > A(0) ? own + share * w : own;
    }
    Vec<A> product = w * (load(scratch + j) - peak);
    if (call.masks) product = w == Vec<A>{} ? Vec<A>{} : product;
    for (int64_t i = count - j; i < W; ++i) w[i] = 0, product[i] = 0;
    weights = weights + w;
    weighted = weighted + product;
  }
  result->weight += sum_lanes<A>(weights);
  result->weighted += sum_lanes<A>(weighted);
  for (int i = 0; i < slots.count; ++i) {
    const int64_t j = slots.slot[i].column - begin;
    if (slots.slot[i].column < 0 || j < 0 || j >= count) continue;
    if (scratch[j] == peak && !(i == 1 && slots.slot[0].column == slots.slot[1].column))
      result->weight -= slots.slot[i].smooth_weight;
    scratch[j] = lowest;
  }
}

// Sums `count` columns from `begin` of one row in two sweeps. Leaves exp(u - peak) in scratch, 0 at targets and in the
// padding. `next`: logits to fetch meanwhile; `grad`: where this block's gradient will be written, or null.
template <class T, class A>
LTK_INLINE PartSums<A> statistics(const Call<A>& call, const RowSlots<A>& slots, const T* x, int64_t row, int64_t begin,
                                  int64_t count, A* scratch, const T* next, T* grad) {
  constexpr int64_t W = Simd<A>::W;
  const A lowest = minus_infinity<A>();
  const T* logits = x + begin;
  A peak = with_flags(call.class_scale, call.class_bias, [&](auto scaled, auto biased) {
    const A* scale = call.class_scale + begin;
    const A* bias = call.class_bias + begin;
    Vec<A> high = splat(lowest);
    const Vec<A> uniform = splat(call.scale);
    int64_t j = 0;
    for (; j + W <= count; j += W) {
      Vec<A> u = IO<T>::get_vector(logits + j);
      Vec<A> a = uniform, b = {};
      if constexpr (decltype(scaled)::on) a = load(scale + j);
      if constexpr (decltype(biased)::on) b = load(bias + j);
      u = affine(u, a, b);
      store(scratch + j, u);
      high = maximum<A>(u, high);
    }
    if (j < count) {
      Vec<A> u = get_some<A>(logits + j, count - j, A(0));
      Vec<A> a = uniform, b = {};
      if constexpr (decltype(scaled)::on) a = get_some<A>(scale + j, count - j, A(0));
      if constexpr (decltype(biased)::on) b = get_some<A>(bias + j, count - j, A(0));
      u = affine(u, a, b);
      for (int64_t i = count - j; i < W; ++i) u[i] = lowest;
      store(scratch + j, u);
      high = maximum<A>(u, high);
    }
    return max_lanes<A>(high);
  });
  const int64_t padded = (count + W - 1) / W * W;

  PartSums<A> result = {};
  if (call.prediction) find_best(x, begin, count, &result);

  bool again = false;
  for (int i = 0; i < slots.count; ++i) {
    const int64_t j = slots.slot[i].column - begin;
    if (slots.slot[i].column < 0 || j < 0 || j >= count) continue;
    again |= !(scratch[j] < peak);
    scratch[j] = lowest;
  }
  if (again) {
    Vec<A> high = splat(lowest);
    for (int64_t j = 0; j < padded; j += W) high = maximum<A>(load(scratch + j), high);
    peak = max_lanes<A>(high);
  }
  if (peak == lowest) peak = 0;
  result.peak = peak;

  if (call.q || call.smoothing > A(0)) sum_weighted(call, slots, row, begin, count, scratch, &result);

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
  result.total = sum_lanes<A>(grand_total);
  return result;
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
    const A share = call.smooth_share * (call.smoothing > A(0));
    return {s.peak,    k * static_cast<A>(s.weight) / s.total,
            k * share, k * (A(1) - call.smoothing),
            {-1, -1},  {},
            {},        {},
            {},        0};
  }
  call.loss[row] = compute_loss(slots, s.peak, log_total, static_cast<A>(s.weighted));
  call.lse[row] = s.peak + sum_term(slots, 0, s.peak, log_total).total;
  if (!call.grad) return {};
  return compute_gradient(slots, s.peak, log_total, A(1), A(0));
}

// A row's gradient that is still to be written, vector by vector, while the next row's exponentials are computed:
// stores wait for memory, exponentials for arithmetic.
template <class T, class A>
struct Pending {
  T* out;
  const A* exponentials;
  int64_t left;  // whole vectors
  Vec<A> slope;
  bool stream, numbers;  // numbers: the slope is finite, and so no product is NaN
  T* grad;               // the row's, or null: nothing is pending
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
    return {grad + head, exponentials + head, whole, scaled, stream, slope - slope == A(0), grad, g};
  }

  inline void write_one() {
    const Vec<A> v = load(exponentials) * slope;
    const auto packed = numbers ? IO<T>::pack_numbers(v) : IO<T>::pack(v);
    if (stream) {
      store_past_caches(out, packed);
    } else {
      __builtin_memcpy(out, &packed, sizeof packed);
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
    const Vec<A> uniform = splat(call.scale), reference = splat(guess);
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
          Vec<A> a = uniform, b = {};
          if constexpr (decltype(scaled)::on) a = load(call.class_scale + j);
          if constexpr (decltype(biased)::on) b = load(call.class_bias + j);
          add(j, affine(IO<T>::get_vector(x + j), a, b));
        }
        grand_total = grand_total + total;
        total = Vec<A>{};
      }
      if (j != stop || j >= count) continue;  // two targets in one vector, or no last vector
      Vec<A> a = uniform, b = {};
      if constexpr (decltype(scaled)::on) a = get_some<A>(call.class_scale + j, count - j, A(0));
      if constexpr (decltype(biased)::on) b = get_some<A>(call.class_bias + j, count - j, A(0));
      Vec<A> u = affine(get_some<A>(x + j, count - j, A(0)), a, b);
      for (int64_t i = count - j; i < W; ++i) u[i] = minus_infinity<A>();
      for (int i = 0; i < slots.count; ++i)
        if (slots.slot[i].column >= j && slots.slot[i].column < j + W)
          u[slots.slot[i].column - j] = minus_infinity<A>();
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
    if (call.smooth_weight) less = less * get_some<A>(call.smooth_weight + j, end - j, A(0));
    if (q) {
      const Vec<A> soft = g.soft * get_some<A>(q + j, end - j, A(0));
      less = less + (call.weight ? soft * get_some<A>(call.weight + j, end - j, A(0)) : soft);
    }
    Vec<A> du = slope * load(exponentials + j) - less;
    du = du * (call.class_scale ? get_some<A>(call.class_scale + j, end - j, A(0)) : splat(call.scale));
    put_some<A>(grad + j, du, end - j);
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
    T* grad =
        call.grad ? static_cast<T*>(call.grad) + (row / call.k) * call.grad_n + (row % call.k) * call.grad_k : nullptr;
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
        const Vec<A> a = call.class_scale ? get_some<A>(call.class_scale + j, count - j, A(0)) : splat(call.scale);
        const Vec<A> b = call.class_bias ? get_some<A>(call.class_bias + j, count - j, A(0)) : Vec<A>{};
        const Vec<A> u = affine(get_some<A>(x + j, count - j, lowest), a, b);
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
    const A* q = call.q ? call.q + (row / call.k) * call.q_n + (row % call.k) * call.q_k : nullptr;
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
void compute_gradients(const Call<A>& call, int64_t begin, int64_t end, RowGradient<A>* out) {
  for (int64_t row = begin; row < end; ++row) {
    const A peak = call.peak[row], total = call.total[row];
    const A grad_loss = call.grad_loss[row * call.grad_loss_stride];
    const A grad_lse = call.grad_lse ? call.grad_lse[row * call.grad_lse_stride] : A(0);
    if (call.q) {
      const A share = call.smooth_share * (call.smoothing > A(0)), kept = A(1) - call.smoothing;
      const A* q = call.q + (row / call.k) * call.q_n + (row % call.k) * call.q_k;
      double weights = 0;
      for (int64_t c = 0; c < call.classes; ++c)
        weights += weight_of(call, c) * kept * q[c * call.q_c] + share * smooth_weight_of(call, c);
      const A k = grad_loss * coefficient_of(call, 0);
      out[row] = {peak, (k * static_cast<A>(weights) + grad_lse) / total, k * share, k * kept, {-1, -1}, {}, {}, {}, {},
                  0};
    } else {
      const T* x = row_pointer<T>(call, row);
      out[row] = compute_gradient(load_slots(call, row, x, call.x_c), peak, A(std::log(total)), grad_loss, grad_lse);
    }
  }
}

template <class T, class A>
void write_part_gradient(const Call<A>& call, const RowGradient<A>& g, int64_t row, int64_t begin, int64_t end,
                         A* column_du, A* column_dx) {
  constexpr int64_t W = Simd<A>::W;
  const T* x = row_pointer<T>(call, row);
  T* grad =
      call.grad ? static_cast<T*>(call.grad) + (row / call.k) * call.grad_n + (row % call.k) * call.grad_k : nullptr;
  const A* q = call.q ? call.q + (row / call.k) * call.q_n + (row % call.k) * call.q_k : nullptr;
  A* grad_q = call.grad_q ? call.grad_q + (row / call.k) * call.grad_q_n + (row % call.k) * call.grad_q_k : nullptr;
  const A log_total = grad_q ? std::log(call.total[row]) : A(0);
  const Vec<A> peak = splat(g.peak);

  // inlined; `count` is the constant W but for the last vector
  auto step = [&](int64_t j, int64_t count, auto plain, auto scaled, auto biased) {
    Vec<A> a = splat(call.scale), b = {};
    if constexpr (decltype(scaled)::on) a = get_some<A>(call.class_scale + j, count, A(0));
    if constexpr (decltype(biased)::on) b = get_some<A>(call.class_bias + j, count, A(0));
    const Vec<A> logit = get_some<A>(x + j, count, A(0));
    const Vec<A> u = affine(logit, a, b) - peak;
    Vec<A> du = g.slope * exp_vector(u);
    if constexpr (!decltype(plain)::on) {
      const Vec<A> w = call.weight ? get_some<A>(call.weight + j, count, A(0)) : splat(A(1));
      const Vec<A> s = call.smooth_weight ? get_some<A>(call.smooth_weight + j, count, A(0)) : splat(A(1));
      Vec<A> less = g.smooth * s;
      if (q) less = less + g.soft * get_some<A>(q + j, count, A(0)) * w;
      du = du - less;
      if (grad_q) put_some<A>(grad_q + j, g.soft * w * (log_total - u), count);
      if (column_du) {
        A *sum_du = column_du + (j - begin), *sum_dx = column_dx + (j - begin);
        put_some<A>(sum_du, get_some<A>(sum_du, count, A(0)) + du, count);
        put_some<A>(sum_dx, get_some<A>(sum_dx, count, A(0)) + du * logit, count);
      }
    }
    if (decltype(plain)::on || grad) put_some<A>(grad + j, du * a, count);
  };
  auto sweep = [&](int64_t from, int64_t to, auto plain) {
    with_flags(call.class_scale, call.class_bias, [&](auto scaled, auto biased) {
      int64_t j = from;
      for (; j + W <= to; j += W) {
        __builtin_prefetch(x + j + kAhead);
        step(j, W, plain, scaled, biased);
      }
      if (j < to) step(j, to - j, plain, scaled, biased);
    });
  };
  const bool plain = grad && g.smooth == A(0) && g.soft == A(0) && !grad_q && !column_du;
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
    if (grad) IO<T>::put(grad + column, scale_of(call, column) * g.dc[i]);
    from = column + 1;
  }
  ordinary(from, end);
}

}  // namespace
}  // namespace LTK_ISA
}  // namespace ltk

#include "cpu_panels.h"

namespace ltk {
namespace LTK_ISA {

#define LTK_TABLE(T, A)                                                                                \
  {forward_rows<T, A>,        sum_part<T, A>,      finish_cut_row<T, A>,      compute_gradients<T, A>, \
   write_part_gradient<T, A>, forward_panel<T, A>, write_class_gradient<T, A>}
const Tables<Kernels> margin_cross_entropy = LTK_TABLES;
#undef LTK_TABLE

}  // namespace LTK_ISA
}  // namespace ltk
