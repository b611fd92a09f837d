// The rows kernel in CUDA C++. Included by one source file per dtype, which defines its table of kernels.
//
// Rows: classes are contiguous. The body of a row is cut into aligned groups of 16 bytes, each read and written whole;
// the columns before the first group, after the last, and the groups that hold a target are the row's *edge*, done one
// column per lane by one warp. So the body needs no comparison per column, no memory of a neighbouring row is touched,
// and no target is part of a sum. Bytes per logit: 2 itemsize where the row stays on the chip (registers, or shared
// memory of a cluster of blocks), else 3 itemsize.
//
// Panels: positions (pixels) are contiguous. A warp takes every 8th class of 32 x V positions, a block all classes.
//
// The gradient may take the place of the logits: what a thread writes is only ever read by itself and before, or by
// others before a barrier of all who write that row (a block's, a cluster's, or the launch of the kernel that writes).
//
// Sums are merged in an order that depends on sizes alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda_call.h"

namespace ltk::cuda {
namespace {

using namespace ltk::device;

constexpr int kNoColumn = 0x7fffffff;

// Rows, positions and blocks number fewer than 2^31: a division of 64 bits is a slow call.
LTK_DEVICE int64_t divide(int64_t a, int64_t b) { return static_cast<uint32_t>(a) / static_cast<uint32_t>(b); }

template <class A>
LTK_DEVICE A infinity() {
  return static_cast<A>(__builtin_huge_val());
}
template <class A>
LTK_DEVICE A not_a_number() {
  return infinity<A>() - infinity<A>();
}

// ------------------------------------------------------------------------------------------------------------ elements

struct alignas(16) Group {  // 16 bytes of logits
  uint32_t word[4];
};

struct Float {
  using A = float;
  using Stored = float;
  static constexpr int kGroup = 4;
  LTK_METHOD A get(Stored s) { return s; }
  LTK_METHOD Stored put(A v) { return v; }
  LTK_METHOD A at(const Group& g, int i) { return bits_as<float>(g.word[i]); }
  LTK_METHOD Group pack(const A (&v)[kGroup]) {
    return {{bits_as<uint32_t>(v[0]), bits_as<uint32_t>(v[1]), bits_as<uint32_t>(v[2]), bits_as<uint32_t>(v[3])}};
  }
};

struct BFloat16 {
  using A = float;
  using Stored = uint16_t;
  static constexpr int kGroup = 8;
  LTK_METHOD A get(Stored s) { return bits_as<float>(static_cast<uint32_t>(s) << 16); }
  LTK_METHOD Stored put(A v) { return static_cast<Stored>(pack_bfloat16s(v, v)); }
  LTK_METHOD A at(const Group& g, int i) {
    const uint32_t word = g.word[i / 2];
    return bits_as<float>(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
  }
  LTK_METHOD Group pack(const A (&v)[kGroup]) {
    return {{pack_bfloat16s(v[0], v[1]), pack_bfloat16s(v[2], v[3]), pack_bfloat16s(v[4], v[5]),
             pack_bfloat16s(v[6], v[7])}};
  }
};

struct Half {
  using A = float;
  using Stored = uint16_t;
  static constexpr int kGroup = 8;
  LTK_METHOD A get(Stored s) { return float_from_half(s); }
  LTK_METHOD Stored put(A v) { return static_cast<Stored>(pack_halves(v, v)); }
  LTK_METHOD A at(const Group& g, int i) {
    return float_from_half(static_cast<uint16_t>(i % 2 == 0 ? g.word[i / 2] & 0xffffu : g.word[i / 2] >> 16));
  }
  LTK_METHOD Group pack(const A (&v)[kGroup]) {
    return {{pack_halves(v[0], v[1]), pack_halves(v[2], v[3]), pack_halves(v[4], v[5]), pack_halves(v[6], v[7])}};
  }
};

struct Double {
  using A = double;
  using Stored = double;
  static constexpr int kGroup = 2;
  LTK_METHOD A get(Stored s) { return s; }
  LTK_METHOD Stored put(A v) { return v; }
  LTK_METHOD A at(const Group& g, int i) {
    return bits_as<double>(static_cast<uint64_t>(g.word[2 * i + 1]) << 32 | g.word[2 * i]);
  }
  LTK_METHOD Group pack(const A (&v)[kGroup]) {
    const uint64_t low = bits_as<uint64_t>(v[0]), high = bits_as<uint64_t>(v[1]);
    return {{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
             static_cast<uint32_t>(high >> 32)}};
  }
};

template <class V, int kCount>
struct alignas(sizeof(V) * kCount) Pack {
  V value[kCount];
};

template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint64_t;
};

// In one access: as a number, or the compiler may write value by value.
template <class P>
LTK_DEVICE void store_pack(void* to, const P& pack) {
  using W = typename Word<sizeof(P)>::type;
  store_whole(static_cast<W*>(to), bits_as<W>(pack));
}

// kCount values that follow each other in a class vector, with the widest accesses that their address allows.
template <int kCount, class A>
LTK_DEVICE void load_values(const A* from, A (&to)[kCount]) {
  constexpr int kWide = 16 / sizeof(A) < kCount ? 16 / sizeof(A) : kCount, kHalf = kWide > 1 ? kWide / 2 : 1;
  const uintptr_t address = reinterpret_cast<uintptr_t>(from);
  auto load = [&](auto pack) {
    using P = decltype(pack);
    constexpr int kStep = sizeof(P) / sizeof(A);
#pragma unroll
    for (int i = 0; i < kCount; i += kStep) {
      const P p = *reinterpret_cast<const P*>(from + i);
#pragma unroll
      for (int j = 0; j < kStep; ++j) to[i + j] = p.value[j];
    }
  };
  if (address % (kWide * sizeof(A)) == 0) {
    load(Pack<A, kWide>{});
  } else if (address % (kHalf * sizeof(A)) == 0) {
    load(Pack<A, kHalf>{});
  } else {
    load(Pack<A, 1>{});
  }
}

// ------------------------------------------------------------------------------------------------------- row arguments

// u = a x + b with one rounding: how every kernel has it. Left to itself the compiler fuses a product with whatever is
// added next, in one kernel with the bias and in another with -peak; where |u| is some hundred, an exponential would
// then be off by what u was rounded by in the kernel that found the peak.
template <class A>
LTK_DEVICE A shifted_logit(A x, A a, A b) {
  return multiply_add(x, a, b);
}

template <class A>
LTK_DEVICE A full_scale(const Call<A>& call) {
  return call.learned_scale ? call.scale * *call.learned_scale : call.scale;
}

template <class A>
LTK_DEVICE A coefficient_of(const Call<A>& call, int i) {
  return call.coefficient ? call.coefficient[i] : A(1);
}

template <class A>
LTK_DEVICE A class_scale_of(const Call<A>& call, int column) {
  return call.class_scale ? call.class_scale[column] : A(1);
}

template <class A>
LTK_DEVICE A weight_of(const Call<A>& call, int column) {
  return call.weight ? call.weight[column] : A(1);
}

template <class A>
LTK_DEVICE A bias_of(const Call<A>& call, int column) {
  return call.class_bias ? call.class_bias[column] : A(0);
}

template <class A>
LTK_DEVICE A probability(const Call<A>& call, int64_t offset) {
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
LTK_DEVICE void put_probability_gradient(const Call<A>& call, int64_t offset, A value) {
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

// w_j ((1 - smoothing) q_j + smoothing / C)
template <class A>
LTK_DEVICE A soft_weight(const Call<A>& call, A q, A w) {
  return w * ((A(1) - call.smoothing) * q + call.smoothing / static_cast<A>(call.classes));
}

// The class of target i of a row: -1 where it is ignored or (then *bad) out of range.
template <class A>
LTK_DEVICE int target_column(const Call<A>& call, int64_t row, int i, bool* bad) {
  const int64_t* targets = i == 0 ? call.target : call.mixed;
  if (targets == nullptr) return -1;
  const int64_t column = targets[row];
  if (column == call.ignore_index) return -1;
  if (column >= 0 && column < call.classes) return static_cast<int>(column);
  *bad = true;
  return -1;
}

template <class A>
struct Targets {
  RowTargets<A> row;
  bool bad;  // a class out of range: everything of this row is NaN
};

// x: the row's first logit
template <class T, class A>
LTK_DEVICE Targets<A> targets_of(const Call<A>& call, int64_t row, const typename T::Stored* x) {
  Targets<A> targets = {};
  RowTargets<A>& r = targets.row;
  r.smoothing = call.smoothing;
  r.smoothing_share = call.smoothing / static_cast<A>(call.classes);
  r.total_weight = call.total_weight ? *call.total_weight : static_cast<A>(call.classes);
  r.count = call.target == nullptr ? 0 : call.mixed ? 2 : 1;
  const A scale = full_scale(call);
  const A share = call.mixed ? call.share[row * call.share_stride] : A(1);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (i >= r.count) continue;
    Target<A>& t = r.t[i];
    bool bad = false;
    const int column = target_column(call, row, i, &bad);
    t.column = column;
    t.factor = bad ? not_a_number<A>() : coefficient_of(call, i) * A(0);  // NaN where the mean is over no weight
    targets.bad |= bad;
    if (column < 0) continue;
    t.factor = coefficient_of(call, i) * (i == 0 ? share : A(1) - share);
    t.weight = weight_of(call, column);
    t.x = T::get(x[column * call.x_c]);
    const A class_scale = class_scale_of(call, column), bias = bias_of(call, column);
    Margin<A> margin = call.margin;
    if (call.class_margin) {
      margin.value = call.class_margin[column];
      if (call.angular)
        margin.cosine = call.class_margin[int64_t{call.classes} + column],
        margin.sine = call.class_margin[int64_t{2} * call.classes + column];
    }
    set_target(t, shifted_logit(t.x, scale * class_scale, bias), class_scale * t.x, scale, bias, margin, call.angular);
  }
  return targets;
}

// ---------------------------------------------------------------------------------------------------------------- sums

template <class A>
LTK_DEVICE Sums<A> no_sums() {
  return {-infinity<A>(), 0, 0, 0, -infinity<A>(), kNoColumn};
}

// What sums of a part with that peak are relative to.
template <class A>
LTK_DEVICE A reference(A peak) {
  return peak == -infinity<A>() ? A(0) : peak;
}

template <class A>
LTK_DEVICE void take_better(Sums<A>& s, A best, int column) {
  const bool nan = best != best, held_nan = s.best != s.best;
  const bool same = best == s.best || (nan && held_nan);
  if ((nan && !held_nan) || best > s.best || (same && column < s.best_column)) s.best = best, s.best_column = column;
}

// Adds columns with shifted logits u; kGeneral: with weights w for the weighted sum.
template <bool kGeneral, int kCount, class A>
LTK_DEVICE void add(Sums<A>& s, const A (&u)[kCount], const A (&w)[kCount]) {
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
    if constexpr (kGeneral) weight += w[i], weighted += w[i] * (u[i] - base);
  }
  s.total += total;
  if constexpr (kGeneral) s.weight += weight, s.weighted += weighted;
}

// Makes the sums relative to another peak that is at least theirs.
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

// The sums of all lanes of a warp, in every lane.
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

// The peak and the sum of exp(u - peak) of a row as they are saved.
template <class A>
struct Rest {
  A peak, total;
};

template <class A>
LTK_DEVICE Rest<A> rest_of(const Targets<A>& targets, const Sums<A>& s) {
  return {reference(s.peak), targets.bad ? not_a_number<A>() : s.total};
}

template <class A>
LTK_DEVICE void write_row(const Call<A>& call, int64_t row, const Targets<A>& targets, const Sums<A>& s) {
  const Rest<A> rest = rest_of(targets, s);
  const A log_total = std::log(rest.total);
  if (call.q) {
    call.loss[row] = coefficient_of(call, 0) * (s.weight * log_total - s.weighted);
    call.lse[row] = rest.peak + log_total;
  } else {
    call.loss[row] = row_loss(targets.row, rest.peak, log_total, s.weighted);
    call.lse[row] = rest.peak + term_of(targets.row, 0, rest.peak, log_total).total;
  }
  call.peak[row] = rest.peak;
  call.total[row] = rest.total;
  if (call.prediction) call.prediction[row] = s.best_column;
}

// soft_mass: sum of the row's soft weights, read with class probabilities only.
template <class A>
LTK_DEVICE Record<A> record_of(const Call<A>& call, const Targets<A>& targets, const Rest<A>& rest, A soft_mass,
                               A grad_loss, A grad_lse) {
  const A log_total = std::log(rest.total);
  Record<A> r = {rest.peak, 0, 0, 0, {-1, -1}, {-1, -1}, {0, 0}, {0, 0}, {0, 0}, 0, log_total};
  if (call.q) {
    r.soft = grad_loss * coefficient_of(call, 0);
    r.slope = (r.soft * soft_mass + grad_lse) / rest.total;
    return r;
  }
  const RowGradient<A> g = row_gradient(targets.row, rest.peak, log_total, grad_loss, grad_lse);
  r.slope = g.slope, r.smooth = g.smooth, r.soft = g.soft, r.z = g.z;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    r.column[i] = static_cast<int>(g.column[i]);
    r.target[i] = i < targets.row.count ? static_cast<int>(targets.row.t[i].column) : -1;
    r.du[i] = g.du[i], r.dc[i] = g.dc[i], r.dm[i] = g.dm[i];
  }
  return r;
}

template <class A>
LTK_DEVICE Record<A> backward_record(const Call<A>& call, int64_t row, const Targets<A>& targets, A soft_mass) {
  const Rest<A> rest = {call.peak[row], call.total[row]};
  const A grad_lse = call.grad_lse ? call.grad_lse[row * call.grad_lse_stride] : A(0);
  return record_of(call, targets, rest, soft_mass, call.grad_loss[row * call.grad_loss_stride], grad_lse);
}

// ------------------------------------------------------------------------------------------------------ rows: geometry

template <class T>
struct View {  // of one row
  using A = typename T::A;
  const typename T::Stored* x;
  typename T::Stored* grad;
  int64_t q, grad_q;  // offsets
  int head, groups;   // columns before the first aligned group; whole groups after them
  int column[2];      // of the targets, -1: none
  int skip[2];        // groups that hold them, -1: none; never the same
  bool grad_aligned;  // groups of the gradient are aligned where those of the logits are

  LTK_MEMBER View(const Call<A>& call, int64_t row) {
    const int64_t n = divide(row, call.k), k = row - n * call.k;
    x = static_cast<const typename T::Stored*>(call.x) + (n * call.x_n + k * call.x_k);
    grad = static_cast<typename T::Stored*>(call.grad) + (n * call.grad_n + k * call.grad_k);
    q = n * call.q_n + k * call.q_k;
    grad_q = n * call.grad_q_n + k * call.grad_q_k;
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(x) / sizeof(*x) % T::kGroup);
    head = past == 0 ? 0 : T::kGroup - past;
    if (head > call.classes) head = call.classes;
    groups = (call.classes - head) / T::kGroup;
    grad_aligned = (reinterpret_cast<uintptr_t>(grad) - reinterpret_cast<uintptr_t>(x)) % sizeof(Group) == 0;
  }

  LTK_MEMBER void find_targets(const Call<A>& call, int64_t row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      bool bad = false;
      column[i] = target_column(call, row, i, &bad);
      const int body = column[i] - head;
      skip[i] = column[i] >= 0 && body >= 0 && body / T::kGroup < groups ? body / T::kGroup : -1;
    }
    if (skip[1] == skip[0]) skip[1] = -1;
  }

  LTK_MEMBER const Group* body() const { return reinterpret_cast<const Group*>(x + head); }
  LTK_MEMBER int first_column(int group) const { return head + group * T::kGroup; }
  LTK_MEMBER bool in_body(int group) const { return group != skip[0] && group != skip[1]; }

  // The edge's column of a lane, -1: none.
  LTK_MEMBER int edge_column(int lane, int classes) const {
    const int part = lane / T::kGroup, i = lane % T::kGroup, tail = first_column(groups);
    if (part == 0) return i < head ? i : -1;
    if (part == 1) return tail + i < classes ? tail + i : -1;
    const int group = part == 2 ? skip[0] : part == 3 ? skip[1] : -1;
    return group >= 0 ? first_column(group) + i : -1;
  }
  LTK_MEMBER bool is_target(int c) const { return c == column[0] || c == column[1]; }
};

// The groups [first, last) of a row that a block works on, of which thread t has each kThreads-th from first + t on.
template <class T, int kThreads>
struct Part {
  View<T> view;
  int thread, first, last;

  LTK_MEMBER void take_part(int index, int of) {
    const int share = (view.groups + of - 1) / of;
    first = index * share;
    last = first + share < view.groups ? first + share : view.groups;
  }
};

// Where they are between the passes over a row: each(f) calls f(group, its 16 bytes) for this thread's groups but those
// of the edge.
template <class T, int kThreads, int kGroups>
struct InRegisters : Part<T, kThreads> {
  Group raw[kGroups];

  LTK_MEMBER InRegisters(const View<T>& view, int thread) : Part<T, kThreads>{view, thread, 0, 0} {}
  LTK_MEMBER void load() {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int group = this->first + i * kThreads + this->thread;
      if (group < this->last) raw[i] = this->view.body()[group];
    }
  }
  template <class F>
  LTK_MEMBER void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int group = this->first + i * kThreads + this->thread;
      if (group < this->last && this->view.in_body(group)) f(group, raw[i]);
    }
  }
};

template <class T, int kThreads>
struct InSharedMemory : Part<T, kThreads> {
  Group* buffer;  // each thread copies what it will read itself

  LTK_MEMBER InSharedMemory(const View<T>& view, int thread) : Part<T, kThreads>{view, thread, 0, 0} {}
  LTK_MEMBER void load() {
    for (int group = this->first + this->thread; group < this->last; group += kThreads)
      copy_async(buffer + (group - this->first), this->view.body() + group);
  }
  template <class F>
  LTK_MEMBER void each(const F& f) const {
#pragma unroll 2
    for (int group = this->first + this->thread; group < this->last; group += kThreads)
      if (this->view.in_body(group)) f(group, buffer[group - this->first]);
  }
};

template <class T, int kThreads>
struct InGlobalMemory : Part<T, kThreads> {
  static constexpr int kAhead = 4;

  LTK_MEMBER InGlobalMemory(const View<T>& view, int thread) : Part<T, kThreads>{view, thread, 0, 0} {}
  template <class F>
  LTK_MEMBER void each(const F& f) const {
    for (int begin = this->first + this->thread; begin < this->last; begin += kAhead * kThreads) {
      Group raw[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (begin + i * kThreads < this->last) raw[i] = this->view.body()[begin + i * kThreads];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int group = begin + i * kThreads;
        if (group < this->last && this->view.in_body(group)) f(group, raw[i]);
      }
    }
  }
};

// ------------------------------------------------------------------------------------------- rows: the work on columns

// What a row's columns need: its logits only; class_bias; or anything, decided at run time.
enum Kind { kPlain, kBiased, kAnything };

// Calls f with the kind of this call as a constant.
template <bool kGeneral, class A, class F>
LTK_DEVICE void with_kind(const Call<A>& call, const F& f) {
  if constexpr (kGeneral) {
    f(std::integral_constant<Kind, kAnything>{});
  } else if (call.class_bias) {
    f(std::integral_constant<Kind, kBiased>{});
  } else {
    f(std::integral_constant<Kind, kPlain>{});
  }
}

// Class vectors at kCount columns from `column` on.
template <Kind kKind, int kCount, class A>
struct Columns {
  A a[kCount], b[kCount];  // u = a x + b

  LTK_MEMBER Columns(const Call<A>& call, int column, A scale) {
    if (kKind == kAnything && call.class_scale) {
      load_values<kCount>(call.class_scale + column, a);
#pragma unroll
      for (int i = 0; i < kCount; ++i) a[i] *= scale;
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) a[i] = scale;
    }
    if (kKind == kBiased || (kKind == kAnything && call.class_bias)) {
      load_values<kCount>(call.class_bias + column, b);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) b[i] = A(0);
    }
  }
};

template <int kCount, class A>
LTK_DEVICE void load_weights(const Call<A>& call, int column, A (&w)[kCount]) {
  if (call.weight) {
    load_values<kCount>(call.weight + column, w);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) w[i] = A(1);
  }
}

template <int kCount, class A>
LTK_DEVICE void load_probabilities(const Call<A>& call, int64_t offset, A (&q)[kCount]) {
  constexpr bool kSame = sizeof(A) == 8;
  if (call.q_dtype == (kSame ? kDouble : kFloat)) {
    load_values<kCount>(static_cast<const A*>(call.q) + offset, q);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) q[i] = probability(call, offset + i);
  }
}

// Adds kCount ordinary columns from `column` on to the sums.
template <Kind kKind, int kCount, class A>
LTK_DEVICE void add_columns(const Call<A>& call, Sums<A>& s, int64_t q_offset, int column, A scale,
                            const A (&x)[kCount]) {
  const Columns<kKind, kCount, A> columns(call, column, scale);
  A u[kCount], w[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) u[i] = shifted_logit(x[i], columns.a[i], columns.b[i]);
  if (kKind == kAnything && (call.q || call.smoothing > A(0))) {
    load_weights<kCount>(call, column, w);
    if (call.q) {
      A q[kCount];
      load_probabilities<kCount>(call, q_offset + column, q);
#pragma unroll
      for (int i = 0; i < kCount; ++i) w[i] = soft_weight(call, q[i], w[i]);
    }
    add<true>(s, u, w);
  } else {
    add<false>(s, u, w);
  }
}

// The column of a row's edge that a lane does, and its logit.
template <class A>
struct Edge {
  int column;  // -1: none
  A x;
};

template <class T>
LTK_DEVICE Edge<typename T::A> edge_of(const View<T>& view, int lane, int classes) {
  const int column = view.edge_column(lane, classes);
  return {column, column >= 0 ? T::get(view.x[column]) : typename T::A(0)};
}

// The sums over this block's part of a row, and over this lane's column of the edge.
template <bool kGeneral, class T, class Source, class A>
LTK_DEVICE Sums<A> row_sums(const Call<A>& call, const Source& source, const Edge<A>& edge, A scale) {
  const View<T>& view = source.view;
  Sums<A> s = no_sums<A>();
  with_kind<kGeneral>(call, [&](auto kind) {
    source.each([&](int group, const Group& raw) {
      const int column = view.first_column(group);
      A x[T::kGroup];
#pragma unroll
      for (int i = 0; i < T::kGroup; ++i) x[i] = T::at(raw, i);
      add_columns<decltype(kind)::value>(call, s, view.q, column, scale, x);
      if (kGeneral && call.prediction) {
#pragma unroll
        for (int i = 0; i < T::kGroup; ++i) take_better(s, x[i], column + i);
      }
    });
  });
  if (edge.column >= 0) {
    const A x[1] = {edge.x};
    if (!view.is_target(edge.column)) add_columns<kAnything>(call, s, view.q, edge.column, scale, x);
    if (kGeneral && call.prediction) take_better(s, edge.x, edge.column);
  }
  return s;
}

// What du lacks beside slope exp(u - peak) in an ordinary column, and d/d(q).
template <class A>
LTK_DEVICE A less_of(const Call<A>& call, A smooth, A soft, A w, A q) {
  return call.q ? soft * soft_weight(call, q, w) : smooth * w;
}
template <class A>
LTK_DEVICE A dq_of(const Call<A>& call, A soft, A w, A log_inverse) {
  return soft * (A(1) - call.smoothing) * w * log_inverse;
}

template <class A>
struct Slopes {  // what every column of a row needs of its record
  A peak, slope, smooth, soft, log_total;
};

// Gradients of kCount ordinary columns: of the logits in dx, those of probabilities written.
template <Kind kKind, int kCount, class A>
LTK_DEVICE void gradient_of_columns(const Call<A>& call, const Slopes<A>& g, int64_t q_offset, int64_t grad_q_offset,
                                    int column, A scale, const A (&x)[kCount], A (&dx)[kCount]) {
  const Columns<kKind, kCount, A> columns(call, column, scale);
  const A scaled_slope = g.slope * scale;
  A u[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    u[i] = shifted_logit(x[i], columns.a[i], columns.b[i]) - g.peak;
    dx[i] = (kKind == kAnything ? g.slope : scaled_slope) * fast_exp(u[i]);
  }
  if constexpr (kKind != kAnything) return;
  if (call.q || g.smooth != A(0)) {
    A w[kCount], q[kCount] = {};
    load_weights<kCount>(call, column, w);
    if (call.q) load_probabilities<kCount>(call, q_offset + column, q);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      dx[i] -= less_of(call, g.smooth, g.soft, w[i], q[i]);
      if (call.grad_q)
        put_probability_gradient(call, grad_q_offset + column + i, dq_of(call, g.soft, w[i], g.log_total - u[i]));
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) dx[i] *= columns.a[i];
}

// Writes the gradient of this block's part of a row, and of this lane's column of the edge.
template <bool kGeneral, class T, class Source, class A>
LTK_DEVICE void write_gradient(const Call<A>& call, const Source& source, const Edge<A>& edge, A scale,
                               const Slopes<A>& g, const int (&target)[2], const A (&dc)[2]) {
  const View<T>& view = source.view;
  with_kind<kGeneral>(call, [&](auto kind) {
    source.each([&](int group, const Group& raw) {
      const int column = view.first_column(group);
      A x[T::kGroup], dx[T::kGroup];
#pragma unroll
      for (int i = 0; i < T::kGroup; ++i) x[i] = T::at(raw, i);
      gradient_of_columns<decltype(kind)::value>(call, g, view.q, view.grad_q, column, scale, x, dx);
      if (kGeneral && call.grad == nullptr) return;
      if (view.grad_aligned) {
        *reinterpret_cast<Group*>(view.grad + column) = T::pack(dx);
      } else {
#pragma unroll
        for (int i = 0; i < T::kGroup; ++i) view.grad[column + i] = T::put(dx[i]);
      }
    });
  });
  if (edge.column >= 0) {
    const A x[1] = {edge.x};
    A dx[1];
    gradient_of_columns<kAnything>(call, g, view.q, view.grad_q, edge.column, scale, x, dx);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (edge.column == target[i]) dx[0] = scale * class_scale_of(call, edge.column) * dc[i];
    if (!kGeneral || call.grad != nullptr) view.grad[edge.column] = T::put(dx[0]);
  }
}

// ------------------------------------------------------------------------------------------------------- rows: kernels

template <class A, int kWarps>
struct RowShared {  // of one row and block
  Sums<A> warps[kWarps], block;
  Targets<A> targets;
  Record<A> record;
};

template <class T, int kThreads, int kGroups>
struct SourceOf {
  using type = InRegisters<T, kThreads, kGroups>;
};
template <class T, int kThreads>
struct SourceOf<T, kThreads, 0> {
  using type = InSharedMemory<T, kThreads>;
};

constexpr int kRowsPerBlock = 4;  // where a row is one warp's

// How many blocks of a kernel must fit a processor, so that some compute while others wait for memory: this bounds the
// registers. 1 where more would spill.
constexpr int blocks_per_processor(int threads, int groups, bool general, bool doubles) {
  if (general || doubles) return 1;
  if (threads <= 128) return threads == 32 ? 4 : 6;
  return groups == 0 ? 2 : 3;
}

// A row's loss and, where call.grad, its gradient, the row staying on the chip. A row is the work of one warp
// (kThreads 32), of one block, or (kGroups 0) of the blocks of a cluster.
template <class T, int kThreads, int kGroups, bool kGeneral>
__global__ void __launch_bounds__(kThreads == 32 ? 32 * kRowsPerBlock : kThreads,
                                  blocks_per_processor(kThreads, kGroups, kGeneral, sizeof(typename T::A) == 8))
    rows_forward_kernel(const __grid_constant__ Call<typename T::A> call) {
  using A = typename T::A;
  constexpr int kWarps = kThreads / 32, kRows = kWarps == 1 ? kRowsPerBlock : 1;
  constexpr int kTargetWarp = kWarps > 1 ? 1 : 0;  // it loads the targets and writes the row's outputs
  using Shared = RowShared<A, kWarps>;
  static_assert(sizeof(Shared) * kRows <= kRowBytesReserved);
  const int slot = kWarps == 1 ? thread_index() / 32 : 0, thread = thread_index() - slot * 32;
  const int warp = thread / 32, lane = thread % 32;
  const int blocks = kGroups == 0 ? cluster_size() : 1, rank = kGroups == 0 ? cluster_rank() : 0;
  const int64_t row = kWarps == 1 ? block_index() * kRows + slot : divide(block_index(), blocks);
  if (kWarps == 1 && row >= call.rows) return;
  Shared& shared = reinterpret_cast<Shared*>(shared_memory())[slot];

  typename SourceOf<T, kThreads, kGroups>::type source{View<T>(call, row), thread};
  View<T>& view = source.view;
  source.take_part(rank, blocks);
  if constexpr (kGroups == 0) source.buffer = reinterpret_cast<Group*>(shared_memory() + kRowBytesReserved);
  source.load();
  view.find_targets(call, row);
  const A scale = full_scale(call);
  const Edge<A> edge = warp == 0 && rank == 0 ? edge_of(view, lane, call.classes) : Edge<A>{-1, 0};
  if (warp == kTargetWarp && lane == 0) shared.targets = targets_of<T>(call, row, view.x);
  if constexpr (kGroups == 0) wait_for_copies();

  Sums<A> sums = row_sums<kGeneral, T>(call, source, edge, scale);
  merge_lanes<kGeneral>(sums);
  if constexpr (kWarps > 1) {
    if (lane == 0) shared.warps[warp] = sums;
    block_barrier();
    if (warp <= kTargetWarp) {
      sums = lane < kWarps ? shared.warps[lane] : no_sums<A>();
      merge_lanes<kGeneral>(sums);
    }
  }
  if (kGroups == 0 && blocks > 1) {
    if (thread == 0) shared.block = sums;
    cluster_barrier();
    if (warp <= kTargetWarp) {
      sums = lane < blocks ? peer_memory(&shared, lane)->block : no_sums<A>();
      merge_lanes<kGeneral>(sums);
    }
  }
  if constexpr (kWarps == 1) warp_barrier();
  if (thread == 0 && call.grad) {
    const Rest<A> rest = rest_of(shared.targets, sums);
    shared.record = record_of(call, shared.targets, rest, sums.weight, A(1), A(0));
  }
  if (warp == kTargetWarp && lane == 0 && rank == 0) write_row(call, row, shared.targets, sums);
  if constexpr (kWarps > 1) {
    block_barrier();
  } else {
    warp_barrier();
  }
  if (kGroups == 0 && blocks > 1) cluster_arrive();
  if (call.grad) {
    const Record<A>& r = shared.record;
    const Slopes<A> slopes = {r.peak, r.slope, r.smooth, r.soft, r.log_total};
    write_gradient<kGeneral, T>(call, source, edge, scale, slopes, r.column, r.dc);
  }
  if (kGroups == 0 && blocks > 1) cluster_wait();  // no block ends while others may read its sums
}

// Sums over one of call.splits ranges of a row's columns per block.
template <class T, bool kGeneral>
__global__ void __launch_bounds__(kSplitThreads, 1)
    rows_statistics_kernel(const __grid_constant__ Call<typename T::A> call) {
  using A = typename T::A;
  constexpr int kWarps = kSplitThreads / 32;
  auto* warps = reinterpret_cast<Sums<A>*>(shared_memory());
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
  const int64_t row = divide(block_index(), call.splits);
  const int split = static_cast<int>(block_index() - row * call.splits);
  InGlobalMemory<T, kSplitThreads> source{View<T>(call, row), thread};
  View<T>& view = source.view;
  source.take_part(split, call.splits);
  view.find_targets(call, row);
  const Edge<A> edge = warp == 0 && split == 0 ? edge_of(view, lane, call.classes) : Edge<A>{-1, 0};
  Sums<A> sums = row_sums<kGeneral, T>(call, source, edge, full_scale(call));
  merge_lanes<kGeneral>(sums);
  if (lane == 0) warps[warp] = sums;
  block_barrier();
  if (warp > 0) return;
  sums = lane < kWarps ? warps[lane] : no_sums<A>();
  merge_lanes<kGeneral>(sums);
  if (lane == 0) call.parts[block_index()] = sums;
}

// One warp per row: merges its parts, writes its outputs and, where call.grad, its record for an upstream gradient
// of 1.
template <class T>
__global__ void __launch_bounds__(32 * kRowsPerBlock, 1)
    rows_finish_kernel(const __grid_constant__ Call<typename T::A> call) {
  using A = typename T::A;
  const int lane = thread_index() % 32;
  const int64_t row = block_index() * kRowsPerBlock + thread_index() / 32;
  if (row >= call.rows) return;
  Sums<A> sums = no_sums<A>();
  for (int i = lane; i < call.splits; i += 32) merge<true>(sums, call.parts[row * call.splits + i]);
  merge_lanes<true>(sums);
  if (lane > 0) return;
  const Targets<A> targets = targets_of<T>(call, row, View<T>(call, row).x);
  write_row(call, row, targets, sums);
  if (call.grad) call.records[row] = record_of(call, targets, rest_of(targets, sums), sums.weight, A(1), A(0));
}

// One warp per row: its record for the upstream gradients.
template <class T>
__global__ void __launch_bounds__(32 * kRowsPerBlock, 1)
    rows_records_kernel(const __grid_constant__ Call<typename T::A> call) {
  using A = typename T::A;
  const int lane = thread_index() % 32;
  const int64_t row = block_index() * kRowsPerBlock + thread_index() / 32;
  if (row >= call.rows) return;
  const View<T> view(call, row);
  A soft_mass = 0;
  if (call.q) {
    for (int c = lane; c < call.classes; c += 32)
      soft_mass += soft_weight(call, probability(call, view.q + c), weight_of(call, c));
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) soft_mass += shuffle_xor(soft_mass, mask);
  }
  if (lane > 0) return;
  const Record<A> record = backward_record(call, row, targets_of<T>(call, row, view.x), soft_mass);
  call.records[row] = record;
  if (call.z) call.z[row] = record.z;
}

// Gradients of logits and probabilities from records: kThreads x kChunkGroups groups of a row per block or (kThreads
// 32) warp. A row is call.splits of them.
template <class T, int kThreads, bool kGeneral>
__global__ void __launch_bounds__(kThreads == 32 ? 32 * kRowsPerBlock : kThreads, 1)
    rows_gradient_kernel(const __grid_constant__ Call<typename T::A> call) {
  using A = typename T::A;
  constexpr int kRows = kThreads == 32 ? kRowsPerBlock : 1;
  const int slot = kRows > 1 ? thread_index() / 32 : 0, thread = thread_index() - slot * 32;
  const int64_t item = block_index() * kRows + slot, row = divide(item, call.splits);
  if (row >= call.rows) return;
  const int split = static_cast<int>(item - row * call.splits);
  InRegisters<T, kThreads, kChunkGroups> source{View<T>(call, row), thread};
  View<T>& view = source.view;
  source.first = split * kThreads * kChunkGroups, source.last = view.groups;
  source.load();
  view.find_targets(call, row);
  const Edge<A> edge = thread < 32 && split == 0 ? edge_of(view, thread, call.classes) : Edge<A>{-1, 0};
  const Record<A>& r = call.records[row];
  const int target[2] = {r.column[0], r.column[1]};
  const A dc[2] = {r.dc[0], r.dc[1]};
  const Slopes<A> slopes = {r.peak, r.slope, r.smooth, r.soft, r.log_total};
  write_gradient<kGeneral, T>(call, source, edge, full_scale(call), slopes, target, dc);
}

// ---------------------------------------------------------------------------------------------------- sums over rows

// One column of one row in backward: du, dc, the margin's gradient, and d/d(q).
template <class A>
struct ColumnGradient {
  A du, dc, dm, dq;
};

template <class A>
LTK_DEVICE ColumnGradient<A> column_gradient(const Call<A>& call, const Record<A>& r, int column, A a, A b, A w, A x,
                                             A q) {
  const A u = shifted_logit(x, a, b) - r.peak;
  ColumnGradient<A> g;
  g.du = r.slope * fast_exp(u) - less_of(call, r.smooth, r.soft, w, q);
  g.dq = dq_of(call, r.soft, w, r.log_total - u);
  g.dc = g.du, g.dm = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (column == r.column[i]) g.du = r.du[i], g.dc = r.dc[i];
    if (column == r.target[i]) g.dm += r.dm[i];
  }
  return g;
}

// A block takes kColumnThreads x kCount columns of the rows of one of call.chunks chunks.
template <class T, int kCount>
__global__ void __launch_bounds__(kColumnThreads, 1)
    columns_gradient_kernel(const __grid_constant__ Call<typename T::A> call) {
  using A = typename T::A;
  using Stored = typename T::Stored;
  constexpr int kShort = 64;  // rows that are added in A before their sum is added to a double
  constexpr int kAhead = 8;
  const int blocks = (call.classes + kColumnThreads * kCount - 1) / (kColumnThreads * kCount);
  const int64_t chunk = divide(block_index(), blocks), per_chunk = divide(call.rows + call.chunks - 1, call.chunks);
  const int first = (static_cast<int>(block_index() - chunk * blocks) * kColumnThreads + thread_index()) * kCount;
  if (first >= call.classes) return;
  const int count = call.classes - first < kCount ? call.classes - first : kCount;
  const int64_t last = (chunk + 1) * per_chunk < call.rows ? (chunk + 1) * per_chunk : call.rows;
  const A scale = full_scale(call);
  A a[kCount], b[kCount], w[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int column = i < count ? first + i : first;
    a[i] = scale * class_scale_of(call, column), b[i] = bias_of(call, column), w[i] = weight_of(call, column);
  }
  double total[3][kCount] = {};
  int64_t n = divide(chunk * per_chunk, call.k), k = chunk * per_chunk - n * call.k;
  for (int64_t begin = chunk * per_chunk; begin < last; begin += kShort) {
    A part[3][kCount] = {};
    const int64_t stop = begin + kShort < last ? begin + kShort : last;
    for (int64_t first_row = begin; first_row < stop; first_row += kAhead) {
      Pack<Stored, kCount> logits[kAhead];
      int64_t ahead_n = n, ahead_k = k;
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {  // several loads on their way before the first store
        if (first_row + j >= stop) continue;
        const Stored* x = static_cast<const Stored*>(call.x) + (ahead_n * call.x_n + ahead_k * call.x_k + first);
        if (count == kCount) {
          logits[j] = *reinterpret_cast<const Pack<Stored, kCount>*>(x);
        } else {
          logits[j] = {};
          logits[j].value[0] = x[0];
        }
        if (++ahead_k == call.k) ahead_k = 0, ++ahead_n;
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (first_row + j >= stop) continue;
        const Record<A> r = call.records[first_row + j];
        Pack<Stored, kCount> out = {};
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          if (i >= count) continue;
          const A logit = T::get(logits[j].value[i]);
          const A q = call.q ? probability(call, n * call.q_n + k * call.q_k + first + i) : A(0);
          const ColumnGradient<A> g = column_gradient(call, r, first + i, a[i], b[i], w[i], logit, q);
          part[0][i] += g.du, part[1][i] += g.dc * logit, part[2][i] += g.dm;
          out.value[i] = T::put(g.dc * a[i]);
          if (call.grad_q) put_probability_gradient(call, n * call.grad_q_n + k * call.grad_q_k + first + i, g.dq);
        }
        if (call.grad) {
          Stored* grad = static_cast<Stored*>(call.grad) + (n * call.grad_n + k * call.grad_k + first);
          if (count == kCount) {
            store_pack(grad, out);
          } else {
            grad[0] = out.value[0];
          }
        }
        if (++k == call.k) k = 0, ++n;
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
      for (int s = 0; s < 3; ++s) total[s][i] += static_cast<double>(part[s][i]);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i)
#pragma unroll
    for (int s = 0; s < 3; ++s)
      if (i < count) call.column_sums[(chunk * 3 + s) * call.classes + first + i] = static_cast<A>(total[s][i]);
}

// -------------------------------------------------------------------------------------------------------------- panels

template <class A>
LTK_DEVICE A sum_of_lanes(A value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// A warp's sums for one position, in shared memory: all of them, or what the simple kernels use.
template <class A, bool kGeneral>
struct PanelSums : Sums<A> {
  LTK_METHOD PanelSums of(const Sums<A>& s) { return {s}; }
  LTK_MEMBER Sums<A> sums() const { return *this; }
};
template <class A>
struct PanelSums<A, false> {
  A peak, total;
  LTK_METHOD PanelSums of(const Sums<A>& s) { return {s.peak, s.total}; }
  LTK_MEMBER Sums<A> sums() const {
    Sums<A> s = no_sums<A>();
    s.peak = peak, s.total = total;
    return s;
  }
};

// What every column of a panel's positions needs of their records, without bank conflicts.
template <class A, int kPositions>
struct alignas(16) PanelRows {
  A peak[kPositions], slope[kPositions], smooth[kPositions], soft[kPositions], log_total[kPositions];
  int column[2][kPositions];

  LTK_MEMBER void set(int p, const Record<A>& r) {
    peak[p] = r.peak, slope[p] = r.slope, smooth[p] = r.smooth, soft[p] = r.soft, log_total[p] = r.log_total;
    column[0][p] = r.column[0], column[1][p] = r.column[1];
  }
};

// Panels of 32 x kCount positions, each a block's; block i takes panels i, i + blocks, ... Shared memory: the warps'
// sums of every position, the positions' records, and (call.keep_panel) the panel's logits.
template <class T, int kCount, bool kBackward, bool kGeneral>
__global__ void __launch_bounds__(32 * kPanelWarps, 1) panels_kernel(const __grid_constant__ Call<typename T::A> call) {
  using A = typename T::A;
  using Stored = typename T::Stored;
  using Logits = Pack<Stored, kCount>;
  constexpr int kPositions = 32 * kCount, kAhead = 4;
  static_assert(kCount <= kPanelWarps);
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  using Kept = PanelSums<A, kGeneral>;
  auto* sums = reinterpret_cast<Kept*>(shared_memory());  // [kPanelWarps, kPositions]
  auto* records = reinterpret_cast<Record<A>*>(sums + kPanelWarps * kPositions);
  auto* rows = reinterpret_cast<PanelRows<A, kPositions>*>(records + kPositions);
  auto* kept = reinterpret_cast<Logits*>(rows + 1);  // [classes, 32]
  const A scale = full_scale(call);
  const int64_t per_sample = (call.k + kPositions - 1) / kPositions, panels = divide(call.rows, call.k) * per_sample;
  const int first_position = lane * kCount;
  const bool summed = kBackward && call.column_sums != nullptr;
  bool first_panel = true;

  for (int64_t panel = block_index(); panel < panels; panel += block_count(), first_panel = false) {
    const int64_t n = divide(panel, per_sample), begin = (panel - n * per_sample) * kPositions,
                  here = begin + first_position;
    const bool exist = here < call.k;  // this lane's positions: all or none, see cuda.cpp
    const int64_t first_row = n * call.k + here, q = n * call.q_n + here;
    const Stored* x = static_cast<const Stored*>(call.x) + (n * call.x_n + here);
    const bool weighted = kGeneral && (call.q || call.smoothing > A(0));

    if (!kBackward) {
      int column[2][kCount];
      Sums<A> s[kCount];
#pragma unroll
      for (int v = 0; v < kCount; ++v) {
        s[v] = no_sums<A>();
        bool bad = false;
        column[0][v] = exist ? target_column(call, first_row + v, 0, &bad) : -1;
        column[1][v] = exist ? target_column(call, first_row + v, 1, &bad) : -1;
      }
      for (int begin_class = warp; exist && begin_class < call.classes; begin_class += kAhead * kPanelWarps) {
        Logits raw[kAhead];
        A a[kAhead], b[kAhead], w[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int c = begin_class + i * kPanelWarps;
          if (c < call.classes) raw[i] = *reinterpret_cast<const Logits*>(x + c * call.x_c);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int c = begin_class + i * kPanelWarps;
          if (c >= call.classes) continue;
          if (call.keep_panel) kept[c * 32 + lane] = raw[i];
          a[i] = kGeneral ? scale * class_scale_of(call, c) : scale, b[i] = bias_of(call, c);
          w[i] = weighted ? weight_of(call, c) : A(1);
        }
#pragma unroll
        for (int v = 0; v < kCount; ++v) {
          A u[kAhead];
#pragma unroll
          for (int i = 0; i < kAhead; ++i) {
            const int c = begin_class + i * kPanelWarps;
            u[i] = -infinity<A>();
            if (c >= call.classes) continue;
            const A logit = T::get(raw[i].value[v]);
            if (kGeneral && call.prediction) take_better(s[v], logit, c);
            if (c == column[0][v] || c == column[1][v]) continue;
            u[i] = shifted_logit(logit, a[i], b[i]);
            if (weighted) {
              const A one_u[1] = {u[i]};
              A one_w[1] = {w[i]};
              if (call.q) one_w[0] = soft_weight(call, probability(call, q + c * call.q_c + v), w[i]);
              add<true>(s[v], one_u, one_w);
            }
          }
          if (!weighted) add<false>(s[v], u, w);
        }
      }
#pragma unroll
      for (int v = 0; v < kCount; ++v) sums[warp * kPositions + first_position + v] = Kept::of(s[v]);
    } else if (kGeneral && call.q) {
      A mass[kCount] = {};
      if (exist)
        for (int c = warp; c < call.classes; c += kPanelWarps)
#pragma unroll
          for (int v = 0; v < kCount; ++v)
            mass[v] += soft_weight(call, probability(call, q + c * call.q_c + v), weight_of(call, c));
#pragma unroll
      for (int v = 0; v < kCount; ++v) {
        Sums<A> s = no_sums<A>();
        s.weight = mass[v];
        sums[warp * kPositions + first_position + v] = Kept::of(s);
      }
    }
    block_barrier();

    if (warp < kCount && begin + warp * 32 + lane < call.k) {  // one thread per position
      const int p = warp * 32 + lane;
      const int64_t row = n * call.k + begin + p;
      const Stored* logits = static_cast<const Stored*>(call.x) + (n * call.x_n + begin + p);
      const Targets<A> targets = targets_of<T>(call, row, logits);
      Sums<A> s = no_sums<A>();
      Record<A> record = {};
      if (!kBackward) {
        for (int i = 0; i < kPanelWarps; ++i) merge<kGeneral>(s, sums[i * kPositions + p].sums());
        write_row(call, row, targets, s);
        if (call.grad) record = record_of(call, targets, rest_of(targets, s), s.weight, A(1), A(0));
      } else {
        if (kGeneral && call.q)
          for (int i = 0; i < kPanelWarps; ++i) s.weight += sums[i * kPositions + p].sums().weight;
        record = backward_record(call, row, targets, s.weight);
        if (call.z) call.z[row] = record.z;
      }
      records[p] = record;
      rows->set(p, record);
    }
    block_barrier();
    if (!kBackward && call.grad == nullptr) continue;

    A peak[kCount], slope[kCount], smooth[kCount], soft[kCount], log_total[kCount];
    int column[2][kCount];
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      const int p = first_position + v;
      peak[v] = exist ? rows->peak[p] : A(0), slope[v] = exist ? rows->slope[p] : A(0);
      smooth[v] = exist ? rows->smooth[p] : A(0), soft[v] = exist ? rows->soft[p] : A(0);
      column[0][v] = exist ? rows->column[0][p] : -1, column[1][v] = exist ? rows->column[1][p] : -1;
      log_total[v] = exist ? rows->log_total[p] : A(0);
    }
    Stored* grad = static_cast<Stored*>(call.grad) + (n * call.grad_n + here);
    const int64_t grad_q = n * call.grad_q_n + here;
    const bool on_chip = !kBackward && call.keep_panel;
    for (int begin_class = warp; begin_class < call.classes; begin_class += kAhead * kPanelWarps) {
      Logits ahead[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {  // several loads on their way before the first store
        const int c = begin_class + j * kPanelWarps;
        if (exist && c < call.classes)
          ahead[j] = on_chip ? kept[c * 32 + lane] : *reinterpret_cast<const Logits*>(x + c * call.x_c);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int c = begin_class + j * kPanelWarps;
        if (c >= call.classes) continue;
        A sum[3] = {};
        if (exist) {
          const Logits raw = ahead[j];
          const A a = kGeneral ? scale * class_scale_of(call, c) : scale, b = bias_of(call, c);
          const A w = kGeneral ? weight_of(call, c) : A(1);
          Logits out;
#pragma unroll
          for (int v = 0; v < kCount; ++v) {
            const A logit = T::get(raw.value[v]), u = shifted_logit(logit, a, b) - peak[v];
            A du = slope[v] * fast_exp(u);
            if (kGeneral) {
              const A q_here = call.q ? probability(call, q + c * call.q_c + v) : A(0);
              du -= less_of(call, smooth[v], soft[v], w, q_here);
            }
            A dc = du;
            if (c == column[0][v] || c == column[1][v]) {
              const Record<A>& r = records[first_position + v];
              const int i = c == column[0][v] ? 0 : 1;
              du = r.du[i], dc = r.dc[i];
            }
            if (kBackward && kGeneral && call.grad_q)
              put_probability_gradient(call, grad_q + c * call.grad_q_c + v, dq_of(call, soft[v], w, log_total[v] - u));
            out.value[v] = T::put(dc * a);
            if (summed) {
              const Record<A>& r = records[first_position + v];
              sum[0] += du, sum[1] += dc * logit;
              for (int i = 0; i < 2; ++i)
                if (c == r.target[i]) sum[2] += r.dm[i];
            }
          }
          if (call.grad) store_pack(grad + c * call.grad_c, out);
        }
        if (summed) {
#pragma unroll
          for (int i = 0; i < 3; ++i) {
            const A total = sum_of_lanes(sum[i]);
            A* place = call.column_sums + (block_index() * 3 + i) * call.classes + c;
            if (lane == 0) *place = first_panel ? total : *place + total;
          }
        }
      }
    }
    block_barrier();
  }
}

// --------------------------------------------------------------------------------------------------------------- scale

template <class A>
struct ScaleCall {
  void* data;
  int64_t elements;
  const A* factor;
};

template <class T>
__global__ void __launch_bounds__(256) scale_kernel(const __grid_constant__ ScaleCall<typename T::A> call) {
  using A = typename T::A;
  const A factor = *call.factor;
  if (factor == A(1)) return;
  const int64_t groups = call.elements / T::kGroup, step = block_count() * 256;
  auto* data = static_cast<Group*>(call.data);
#pragma unroll 4
  for (int64_t g = block_index() * 256 + thread_index(); g < groups; g += step) {
    const Group raw = data[g];
    A v[T::kGroup];
#pragma unroll
    for (int i = 0; i < T::kGroup; ++i) v[i] = T::at(raw, i) * factor;
    data[g] = T::pack(v);
  }
  auto* tail = static_cast<typename T::Stored*>(call.data) + groups * T::kGroup;
  if (block_index() == 0 && thread_index() < call.elements - groups * T::kGroup)
    tail[thread_index()] = T::put(T::get(tail[thread_index()]) * factor);
}

// ------------------------------------------------------------------------------------------------------------ launches

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
struct Launches {
  using A = typename T::A;

  template <int kThreads, int kGroups>
  static Error rows_shape(const Call<A>& call, bool general, int cluster, Stream stream) {
    const int64_t rows = call.rows;
    Launch l = {rows, kThreads, kRowBytesReserved, cluster, stream};
    if (kThreads == 32) l.blocks = ceil_div(rows, kRowsPerBlock), l.threads = 32 * kRowsPerBlock;
    if (kGroups == 0) {
      l.blocks = rows * cluster;
      l.shared_bytes += sizeof(Group) * ceil_div(call.classes / T::kGroup, cluster);
    }
    if (general) return launch(&rows_forward_kernel<T, kThreads, kGroups, true>, l, call);
    return launch(&rows_forward_kernel<T, kThreads, kGroups, false>, l, call);
  }

  static Error rows_forward(const Call<A>& call, RowsShape shape, bool general, Stream stream) {
    if (shape.groups == 0) return rows_shape<kSharedThreads, 0>(call, general, shape.cluster, stream);
    if (shape.threads == 32) return rows_shape<32, 4>(call, general, 1, stream);
    if (shape.threads == 128 && shape.groups == 4) return rows_shape<128, 4>(call, general, 1, stream);
    if (shape.threads == 128) return rows_shape<128, 8>(call, general, 1, stream);
    return rows_shape<256, 8>(call, general, 1, stream);
  }

  static int largest_cluster() { return device::largest_cluster(&rows_forward_kernel<T, kSharedThreads, 0, true>); }

  static Error rows_statistics(const Call<A>& call, bool general, Stream stream) {
    const Launch l = {call.rows * call.splits, kSplitThreads, kRowBytesReserved, 1, stream};
    return general ? launch(&rows_statistics_kernel<T, true>, l, call)
                   : launch(&rows_statistics_kernel<T, false>, l, call);
  }

  static Launch warp_per_row(int64_t rows, Stream stream) {
    return {ceil_div(rows, kRowsPerBlock), 32 * kRowsPerBlock, 0, 1, stream};
  }
  static Error rows_finish(const Call<A>& call, Stream stream) {
    return launch(&rows_finish_kernel<T>, warp_per_row(call.rows, stream), call);
  }
  static Error rows_records(const Call<A>& call, Stream stream) {
    return launch(&rows_records_kernel<T>, warp_per_row(call.rows, stream), call);
  }

  static Error rows_gradient(const Call<A>& call, bool general, Stream stream) {
    Call<A> c = call;
    const int64_t groups = call.classes / T::kGroup, rows = call.rows;
    if constexpr (sizeof(A) < 8) {  // one warp per row; with doubles its registers do not suffice
      if (groups <= 32 * kChunkGroups) {
        c.splits = 1;
        const Launch l = warp_per_row(rows, stream);
        return general ? launch(&rows_gradient_kernel<T, 32, true>, l, c)
                       : launch(&rows_gradient_kernel<T, 32, false>, l, c);
      }
    }
    c.splits = static_cast<int>(std::max<int64_t>(1, ceil_div(groups, kSplitThreads * kChunkGroups)));
    const Launch l = {rows * c.splits, kSplitThreads, 0, 1, stream};
    return general ? launch(&rows_gradient_kernel<T, kSplitThreads, true>, l, c)
                   : launch(&rows_gradient_kernel<T, kSplitThreads, false>, l, c);
  }

  static Error columns_gradient(const Call<A>& call, bool paired, Stream stream) {
    const int count = paired && sizeof(typename T::Stored) == 2 ? 2 : 1;
    const Launch l = {call.chunks * ceil_div(call.classes, kColumnThreads * count), kColumnThreads, 0, 1, stream};
    if constexpr (sizeof(typename T::Stored) == 2)
      if (paired) return launch(&columns_gradient_kernel<T, 2>, l, call);
    return launch(&columns_gradient_kernel<T, 1>, l, call);
  }

  template <int kCount>
  static Error panels_of(Call<A> call, bool backward, bool general, Stream stream) {
    constexpr int kPositions = 32 * kCount;
    const size_t sums = general ? sizeof(PanelSums<A, true>) : sizeof(PanelSums<A, false>);
    size_t shared = kPanelWarps * kPositions * sums + kPositions * sizeof(Record<A>) + sizeof(PanelRows<A, kPositions>);
    const size_t logits = sizeof(typename T::Stored) * kPositions * call.classes;
    call.keep_panel = call.grad != nullptr && !backward && shared + logits <= static_cast<size_t>(call.panel_room);
    if (call.keep_panel) shared += logits;
    const int64_t panels = call.rows / call.k * ceil_div(call.k, kPositions);
    const Launch l = {call.column_sums ? call.chunks : panels, 32 * kPanelWarps, shared, 1, stream};
    if (backward)
      return general ? launch(&panels_kernel<T, kCount, true, true>, l, call)
                     : launch(&panels_kernel<T, kCount, true, false>, l, call);
    return general ? launch(&panels_kernel<T, kCount, false, true>, l, call)
                   : launch(&panels_kernel<T, kCount, false, false>, l, call);
  }

  static Error panels(const Call<A>& call, bool backward, bool wide, bool general, Stream stream) {
    constexpr int kWide = 8 / sizeof(typename T::Stored);
    if constexpr (kWide > 1)
      if (wide) return panels_of<kWide>(call, backward, general, stream);
    return panels_of<1>(call, backward, general, stream);
  }

  static Error scale(void* data, int64_t elements, const A* factor, int64_t blocks, Stream stream) {
    return launch(&scale_kernel<T>, {blocks, 256, 0, 1, stream}, ScaleCall<A>{data, elements, factor});
  }

  static constexpr Kernels<A> table = {largest_cluster, rows_forward,     rows_statistics, rows_finish, rows_records,
                                       rows_gradient,   columns_gradient, panels,          scale};
};

}  // namespace
}  // namespace ltk::cuda
