// Vector kernels of the partitioned log-sum-exp, compiled once per instruction set.
//
// Forward reads a row once from memory: in stretches that are swept twice in the first-level cache, for the maxima and
// for the exponentials. Columns come in groups of vectors. Most groups are *plain*: whole, without a key of the row's
// label and without the column left out; these are a softmax. In the others each lane is told which side it is on.
// Each lane has its own maxima and sums, which are merged at the end.

#include "../common/cpu/vectors.h"
#include "cpu_call.h"

namespace ltk {
namespace LTK_ISA {
namespace {

constexpr int64_t kVectors = 8;  // of a group: a sum takes a group's terms, then the groups' sums
constexpr int64_t kGroups = 16;  // of a stretch
template <class A>
constexpr int64_t kGroupColumns = kVectors * Simd<A>::W;

template <class A>
constexpr int64_t kStretch = kGroups * kGroupColumns<A>;

// Which lanes of a vector are on which side.
template <class A>
struct Sides {
  typename Simd<A>::I negative, positive;
};

// A row's logits. `left` columns from j on count; vectors are whole where it is W.
template <class T, class A, bool kScaled, bool kBiased>
struct KeyRow {
  using Lanes = typename Simd<A>::I;
  static constexpr int64_t W = Simd<A>::W;
  const T* z;
  const int32_t* labels;
  const A *key_scale, *key_bias;
  Vec<A> scale;
  int32_t label;
  int64_t excluded;  // the column left out; may be outside of the block

  KeyRow(const PartitionedCall<A>& call, int64_t row)
      : z(static_cast<const T*>(call.z) + row * call.z_stride),
        labels(call.key_label),
        key_scale(call.key_scale),
        key_bias(call.key_bias),
        scale(splat(call.scale)),
        label(call.query_label[row]),
        excluded(call.exclude ? call.exclude[row] - call.first : -1) {}

  inline Vec<A> similarity(int64_t j, int64_t left) const { return get_some<A>(z + j, left, A(0)); }
  inline Vec<A> own_scale(int64_t j, int64_t left) const {
    return kScaled ? get_some<A>(key_scale + j, left, A(0)) : splat(A(1));
  }
  inline Vec<A> factor(int64_t j, int64_t left) const {
    return kScaled ? scale * get_some<A>(key_scale + j, left, A(0)) : scale;
  }
  inline Vec<A> logit(int64_t j, int64_t left) const {
    return affine(similarity(j, left), factor(j, left), kBiased ? get_some<A>(key_bias + j, left, A(0)) : Vec<A>{});
  }

  // Whether all columns of the group at j are negative.
  inline bool is_plain(int64_t j, int64_t end) const {
    constexpr int64_t kColumns = kGroupColumns<A>;
    if (end - j < kColumns || (excluded >= j && excluded < j + kColumns)) return false;
#if LTK_LEVEL == 2
    const __m512i wanted = _mm512_set1_epi32(label);
    __mmask16 found = 0;
    for (int64_t i = 0; i < kColumns; i += F::W)
      found = _kor_mask16(found, _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(labels + j + i), wanted));
    return found == 0;
#else
    const F::I wanted = F::I{} + label;
    F::I found = {};
    for (int64_t i = 0; i < kColumns; i += F::W) found = found | (load_index<float>(labels + j + i) == wanted);
    return !any<float>(found);
#endif
  }

  // Returns the sides of the vector at j. Lanes that are left out and those from `left` on are on neither side.
  inline Sides<A> sides(int64_t j, int64_t left) const {
    Lanes lane, key = {};
    for (int64_t i = 0; i < W; ++i) lane[i] = static_cast<Int<A>>(i);
    if (sizeof(A) == sizeof(int32_t) && left >= W) {
      __builtin_memcpy(&key, labels + j, sizeof key);
    } else {
      for (int64_t i = 0; i < W && i < left; ++i) key[i] = labels[j + i];
    }
    const bool leaves_out = excluded >= j && excluded < j + W;
    const Lanes inside = lane < (Lanes{} + static_cast<Int<A>>(left < W ? left : W));
    const Lanes allowed = inside & (lane != (Lanes{} + static_cast<Int<A>>(leaves_out ? excluded - j : -1)));
    const Lanes same = key == (Lanes{} + static_cast<Int<A>>(label));
    return {allowed & ~same, allowed & same};
  }
};

// f(column, columns left) for the vectors of the group at j; inlined twice, of which one knows that vectors are whole.
template <class A, class Function>
LTK_INLINE void for_each_vector(int64_t j, int64_t end, Function f) {
  constexpr int64_t W = Simd<A>::W, kColumns = kGroupColumns<A>;
  if (end - j >= kColumns) {
    for (int64_t i = j; i < j + kColumns; i += W) f(i, W);
  } else {
    for (int64_t i = j; i < end; i += W) f(i, end - i);
  }
}

// What exponentials are relative to.
template <class A>
LTK_INLINE Vec<A> base_of(Vec<A> peak) {
  return peak == splat(minus_infinity<A>()) ? Vec<A>{} : peak;
}

// One side of a row, lane by lane.
template <class A>
struct SideSums {
  Vec<A> peak = splat(minus_infinity<A>()), mass = {}, slope = {};

  // Makes the sums relative to maxima that are at least `high`; returns what they are relative to.
  inline Vec<A> raise(Vec<A> high) {
    const Vec<A> raised = maximum<A>(high, peak), base = base_of<A>(raised);
    const Vec<A> kept = exp_vector(peak - base);
    mass = mass * kept, slope = slope * kept, peak = raised;
    return base;
  }

  inline void merge(A* all_peak, double* all_mass, double* all_slope) const {
    const A high = max_lanes<A>(peak);
    const Vec<A> kept = exp_vector(peak - (high == minus_infinity<A>() ? A(0) : high));
    A masses[Simd<A>::W], slopes[Simd<A>::W];
    store(masses, mass * kept);
    store(slopes, slope * kept);
    *all_peak = high, *all_mass = 0, *all_slope = 0;
    for (int64_t i = 0; i < Simd<A>::W; ++i) *all_mass += masses[i], *all_slope += slopes[i];
  }
};

// A row's sums over the stretches so far. Without kSlopes, slopes mean nothing.
template <class T, class A, bool kScaled, bool kBiased, bool kSlopes>
struct RowSums {
  using Lanes = typename Simd<A>::I;
  static constexpr int64_t W = Simd<A>::W, kColumns = kGroupColumns<A>;
  KeyRow<T, A, kScaled, kBiased> x;
  SideSums<A> negatives, positives;
  Vec<A> similarities = {};  // of positives, added up
  Lanes minus_count = {};    // how many these are, negated: true is -1

  RowSums(const PartitionedCall<A>& call, int64_t row) : x(call, row) {}

  // The columns [first, last) of a stretch. `next`: similarities to fetch meanwhile.
  inline void add(int64_t first, int64_t last, const T* next) {
    alignas(64) A logits[kStretch<A>];
    Vec<A> high = splat(minus_infinity<A>()), high_positive = high;
    const uint32_t mixed = find_maxima(first, last, logits, &high, &high_positive);
    const Vec<A> base = negatives.raise(high), base_positive = mixed ? positives.raise(high_positive) : Vec<A>{};
    Vec<A> mass = {}, slope = {};
    for (int64_t j = first, g = 0; j < last; j += kColumns, ++g) {
      const A* u = logits + (j - first);
      Vec<A> of_group = {}, slope_of_group = {};
      if (mixed >> g & 1) {
        add_mixed(j, last, u, base, base_positive, &of_group, &slope_of_group);
      } else {
        for (int64_t i = 0; i < kColumns; i += W) {
          __builtin_prefetch(next + (j - first) + i);
          const Vec<A> e = exp_vector(load(u + i) - base);
          of_group = of_group + e;
          if constexpr (kSlopes) slope_of_group = slope_of_group + e * (x.own_scale(j + i, W) * x.similarity(j + i, W));
        }
      }
      mass = mass + of_group, slope = slope + slope_of_group;
    }
    negatives.mass = negatives.mass + mass, negatives.slope = negatives.slope + slope;
  }

  PartitionedSums<A> merge() const {
    PartitionedSums<A> sums = {{minus_infinity<A>(), minus_infinity<A>()}, {0, 0}, {0, 0}, 0, 0};
    negatives.merge(&sums.peak[0], &sums.mass[0], &sums.slope[0]);
    for (int64_t i = 0; i < W; ++i) sums.count -= minus_count[i];
    if (sums.count > 0) {
      positives.merge(&sums.peak[1], &sums.mass[1], &sums.slope[1]);
      for (int64_t i = 0; i < W; ++i) sums.sum += similarities[i];
    }
    return sums;
  }

 private:
  // Logits of a stretch and their maxima; which groups are mixed, a bit for each. Adds similarities and their number.
  inline uint32_t find_maxima(int64_t first, int64_t last, A* logits, Vec<A>* high, Vec<A>* high_positive) {
    const Vec<A> lowest = splat(minus_infinity<A>());
    uint32_t mixed = 0;
    Vec<A> of_stretch = {};
    for (int64_t j = first, g = 0; j < last; j += kColumns, ++g) {
      A* u = logits + (j - first);
      Vec<A> high_of_group = lowest;
      if (x.is_plain(j, last)) {
        for (int64_t i = 0; i < kColumns; i += W) {
          const Vec<A> v = x.logit(j + i, W);
          store(u + i, v);
          high_of_group = maximum<A>(v, high_of_group);
        }
        *high = maximum<A>(high_of_group, *high);
        continue;
      }
      mixed |= uint32_t(1) << g;
      Vec<A> of_group = {};
      for_each_vector<A>(j, last, [&](int64_t i, int64_t left) {
        const Vec<A> v = x.logit(i, left);
        const Sides<A> side = x.sides(i, left);
        store(u + (i - j), v);
        *high = maximum<A>(side.negative ? v : lowest, *high);
        *high_positive = maximum<A>(side.positive ? v : lowest, *high_positive);
        of_group = of_group + (side.positive ? x.similarity(i, left) : Vec<A>{});
        minus_count = minus_count + side.positive;
      });
      of_stretch = of_stretch + of_group;
    }
    similarities = similarities + of_stretch;
    return mixed;
  }

  // The exponentials of a group: of positives to the sums, of negatives to *mass and *slope.
  inline void add_mixed(int64_t j, int64_t last, const A* u, Vec<A> base, Vec<A> base_positive, Vec<A>* mass,
                        Vec<A>* slope) {
    Vec<A> of_positives = {}, slope_of_positives = {};
    for_each_vector<A>(j, last, [&](int64_t i, int64_t left) {
      const Sides<A> side = x.sides(i, left);
      const Vec<A> e = exp_vector(load(u + (i - j)) - (side.positive ? base_positive : base));
      *mass = *mass + (side.negative ? e : Vec<A>{});
      of_positives = of_positives + (side.positive ? e : Vec<A>{});
      if constexpr (kSlopes) {
        const Vec<A> product = e * (x.own_scale(i, left) * x.similarity(i, left));
        *slope = *slope + (side.negative ? product : Vec<A>{});
        slope_of_positives = slope_of_positives + (side.positive ? product : Vec<A>{});
      }
    });
    positives.mass = positives.mass + of_positives;
    positives.slope = positives.slope + slope_of_positives;
  }
};

template <class T, class A, bool kScaled, bool kBiased, bool kSlopes>
LTK_INLINE PartitionedSums<A> sum_columns(const PartitionedCall<A>& call, int64_t row, int64_t begin, int64_t end) {
  RowSums<T, A, kScaled, kBiased, kSlopes> sums(call, row);
  for (int64_t first = begin; first < end; first += kStretch<A>) {
    const bool more = end - first > kStretch<A>;
    const int64_t last = more ? first + kStretch<A> : end;
    sums.add(first, last, sums.x.z + (more ? last : begin + call.z_stride));
  }
  return sums.merge();
}

// Everything is inlined into the two kernels: a call would save and restore all vectors.
template <class T, class A>
__attribute__((flatten)) PartitionedSums<A> partitioned_sums(const PartitionedCall<A>& call, int64_t row, int64_t begin,
                                                             int64_t end) {
  return with_flags(call.key_scale, call.key_bias, [&](auto scaled, auto biased) {
    constexpr bool kScaled = decltype(scaled)::on, kBiased = decltype(biased)::on;
    return call.with_slopes ? sum_columns<T, A, kScaled, kBiased, true>(call, row, begin, end)
                            : sum_columns<T, A, kScaled, kBiased, false>(call, row, begin, end);
  });
}

template <class T, class A, bool kScaled, bool kBiased>
LTK_INLINE void write_gradient(const PartitionedCall<A>& call, int64_t row, int64_t begin, int64_t end, A* sum,
                               A* weighted_sum) {
  constexpr int64_t W = Simd<A>::W, kColumns = kGroupColumns<A>;
  const KeyRow<T, A, kScaled, kBiased> x(call, row);
  T* out = call.out ? static_cast<T*>(call.out) + row * call.out_stride : nullptr;
  const auto term = [&](int i) { return splat(call.terms[i * call.terms_stride + row]); };
  const Vec<A> peak = term(0), slope = term(1), peak_positive = term(2), slope_positive = term(3),
               through_sum = term(4);

  const auto add = [&](int64_t j, int64_t left, Vec<A> g) {
    if (sum) put_some<A>(sum + (j - begin), get_some<A>(sum + (j - begin), left, A(0)) + g, left);
    if (weighted_sum) {
      A* to = weighted_sum + (j - begin);
      put_some<A>(to, get_some<A>(to, left, A(0)) + g * x.similarity(j, left), left);
    }
  };
  for (int64_t j = begin; j < end; j += kColumns) {
    if (x.is_plain(j, end)) {
      for (int64_t i = 0; i < kColumns; i += W) {
        const Vec<A> e = exp_vector(x.logit(j + i, W) - peak);
        if (out) IO<T>::put_vector(out + j + i, x.factor(j + i, W) * slope * e);
        if (sum || weighted_sum) add(j + i, W, slope * e);
      }
      continue;
    }
    for_each_vector<A>(j, end, [&](int64_t i, int64_t left) {
      const Sides<A> side = x.sides(i, left);
      const Vec<A> e = exp_vector(x.logit(i, left) - (side.positive ? peak_positive : peak));
      const Vec<A> g = side.positive ? slope_positive * e : side.negative ? slope * e : Vec<A>{};
      const Vec<A> dz = x.factor(i, left) * g + (side.positive ? x.scale * through_sum : Vec<A>{});
      if (out) put_some<A>(out + i, dz, left);
      if (sum || weighted_sum) add(i, left, g);
    });
  }
}

template <class T, class A>
__attribute__((flatten)) void partitioned_gradient(const PartitionedCall<A>& call, int64_t row, int64_t begin,
                                                   int64_t end, A* sum, A* weighted_sum) {
  with_flags(call.key_scale, call.key_bias, [&](auto scaled, auto biased) {
    write_gradient<T, A, decltype(scaled)::on, decltype(biased)::on>(call, row, begin, end, sum, weighted_sum);
  });
}

}  // namespace

#define LTK_TABLE(T, A) {partitioned_sums<T, A>, partitioned_gradient<T, A>}
const Tables<PartitionedKernels> partitioned_logsumexp = LTK_TABLES;
#undef LTK_TABLE

}  // namespace LTK_ISA
}  // namespace ltk
