// Vector kernels of the divergences between experts, compiled once per instruction set.
//
// Memory sees one read per logit, and one write in backward: the rows of a sample are visited together, for their
// maxima and again while they are in the caches; then block by block, in sweeps over the first-level cache. The next
// row is fetched by the sweep that computes most: arithmetic hides what memory takes. Differences are taken between
// exponents relative to each distribution's maximum.

#include "../common/cpu/vectors.h"
#include "cpu_call.h"

namespace ltk {
namespace LTK_ISA {
namespace {

// Columns of a block: one accumulator takes kTerms terms, what blocks give is added in double.
template <class A>
constexpr int64_t kDivergenceBlock = kTerms * Simd<A>::W;
static_assert(kDivergenceBlock<float> <= kLargestDivergenceBlock);

// A sum over a block's vectors, j columns from its first, in groups: where one term is much larger than all
// others, each addition to it rounds; it meets only the terms of its group and the groups' sums.
template <class A>
struct GroupedSum {
  static constexpr int64_t kGroup = 8 * Simd<A>::W;
  Vec<A> group = {}, total = {};

  inline void add(int64_t j, Vec<A> term) {
    if (j % kGroup == 0) total = total + group, group = Vec<A>{};
    group = group + term;
  }
  inline A all() const { return sum_lanes<A>(total + group); }
};

template <class A>
struct Block {
  int64_t row, first, count;
};

// f(j, u) for the vectors of an expert's block, u -inf beyond the last column; logits `ahead` of them are fetched.
template <class T, class A, class Function>
LTK_INLINE void for_each_vector(const DivergenceCall<A>& call, const Block<A>& block, int64_t e, int64_t ahead,
                                Function f) {
  const T* x = static_cast<const T*>(call.x[e]) + block.row * call.x_stride[e] + block.first;
  const A* temperature = call.temperature ? call.temperature + block.first : nullptr;
  for (int64_t j = 0; j < block.count; j += Simd<A>::W) {
    __builtin_prefetch(x + ahead + j);
    const Vec<A> logit = get_some<A>(x + j, block.count - j, minus_infinity<A>());
    f(j, temperature ? logit / get_some<A>(temperature + j, block.count - j, A(1)) : logit);
  }
}

template <class A, class Function>
LTK_INLINE void for_each_block(int64_t row, int64_t begin, int64_t end, Function f) {
  for (int64_t first = begin; first < end; first += kDivergenceBlock<A>)
    f(Block<A>{row, first, end - first < kDivergenceBlock<A> ? end - first : kDivergenceBlock<A>});
}

// U of a block.
template <class T, class A>
LTK_INLINE void sum_experts(const DivergenceCall<A>& call, const Block<A>& block, A* sum) {
  for (int64_t e = 0; e < call.experts; ++e)
    for_each_vector<T>(call, block, e, 0, [&](int64_t j, Vec<A> u) { store(sum + j, e == 0 ? u : load(sum + j) + u); });
}

// p * value; 0 where p is 0.
template <class V>
LTK_INLINE V times(V p, V value) {
  return p == V{} ? V{} : p * value;
}

// The difference whose expectation A_e is, of a pair. One function for both directions, which must agree on it to the
// last bit: where an expert is sure, the gradient is its distance from A_e.
template <class A>
LTK_INLINE Vec<A> pairwise_difference(Vec<A> v, A experts, Vec<A> sum) {
  return prevent_fusion(v * experts) - sum;
}

template <class T, class A>
void divergence_peaks(const DivergenceCall<A>& call, int64_t row, int64_t begin, int64_t end, A* peaks) {
  constexpr int64_t W = Simd<A>::W;
  const bool with_mean = !call.pairwise;
  alignas(64) A sum[kDivergenceBlock<A>];
  for (int64_t e = 0; e <= call.experts; ++e) peaks[e] = minus_infinity<A>();
  for_each_block<A>(row, begin, end, [&](const Block<A>& block) {
    for (int64_t e = 0; e < call.experts; ++e) {
      Vec<A> high = splat(peaks[e]);
      for_each_vector<T>(call, block, e, kDivergenceBlock<A>, [&](int64_t j, Vec<A> u) {
        high = maximum<A>(u, high);
        if (with_mean) store(sum + j, e == 0 ? u : load(sum + j) + u);
      });
      peaks[e] = max_lanes<A>(high);
    }
    Vec<A> high = splat(peaks[call.experts]);
    for (int64_t j = 0; with_mean && j < block.count; j += W) high = maximum<A>(load(sum + j), high);
    peaks[call.experts] = max_lanes<A>(high);
  });
  peaks[call.experts] /= static_cast<A>(call.experts);
}

template <class T, class A>
LTK_INLINE void sums_to_mean(const DivergenceCall<A>& call, const Block<A>& block, const A* peaks, ExpertSums* sums) {
  constexpr int64_t W = Simd<A>::W;
  const A count_of = static_cast<A>(call.experts), peak = peaks[call.experts];
  alignas(64) A mean[kDivergenceBlock<A>], weight[kDivergenceBlock<A>];  // U, then vbar; exp(vbar)
  sum_experts<T>(call, block, mean);
  GroupedSum<A> total;
  for (int64_t j = 0; j < block.count; j += W) {
    const Vec<A> v = load(mean + j) / count_of - peak, exponential = exp_vector(v);
    store(mean + j, v);
    store(weight + j, exponential);
    total.add(j, exponential);
  }
  sums[call.experts].mass += total.all();
  for (int64_t e = 0; e < call.experts; ++e) {
    const A own = peaks[e];
    GroupedSum<A> mass, weighted;
    for_each_vector<T>(call, block, e, call.x_stride[e], [&](int64_t j, Vec<A> u) {
      const Vec<A> v = u - own;
      mass.add(j, exp_vector(v));
      weighted.add(j, times(load(weight + j), load(mean + j) - v));
    });
    sums[e].mass += mass.all();
    sums[e].weighted += weighted.all();
  }
}

template <class T, class A>
LTK_INLINE void sums_pairwise(const DivergenceCall<A>& call, const Block<A>& block, const A* peaks, ExpertSums* sums,
                              A* exponentials) {
  constexpr int64_t W = Simd<A>::W, kBlock = kDivergenceBlock<A>;
  const A count_of = static_cast<A>(call.experts);
  alignas(64) A all[kBlock];  // V
  for (int64_t j = 0; j < block.count; j += W) store(all + j, Vec<A>{});
  for (int64_t e = 0; e < call.experts; ++e) {
    const A peak = peaks[e];
    GroupedSum<A> mass;
    for_each_vector<T>(call, block, e, call.x_stride[e], [&](int64_t j, Vec<A> u) {
      const Vec<A> v = u - peak, exponential = exp_vector(v);
      store(exponentials + e * kBlock + j, exponential);
      store(all + j, load(all + j) + v);
      mass.add(j, exponential);
    });
    sums[e].mass += mass.all();
  }
  for (int64_t e = 0; e < call.experts; ++e) {
    const A peak = peaks[e];
    GroupedSum<A> weighted;
    for_each_vector<T>(call, block, e, 0, [&](int64_t j, Vec<A> u) {
      const Vec<A> difference = pairwise_difference(u - peak, count_of, load(all + j));
      weighted.add(j, times(load(exponentials + e * kBlock + j), difference));
    });
    sums[e].weighted += weighted.all();
  }
}

template <class T, class A>
void divergence_sums(const DivergenceCall<A>& call, int64_t row, int64_t begin, int64_t end, const A* peaks,
                     ExpertSums* sums, A* scratch) {
  for (int64_t e = 0; e <= call.experts; ++e) sums[e] = {0, 0};
  for_each_block<A>(row, begin, end, [&](const Block<A>& block) {
    call.pairwise ? sums_pairwise<T>(call, block, peaks, sums, scratch) : sums_to_mean<T>(call, block, peaks, sums);
  });
}

// What the gradient of a row needs of an expert, and of all.
template <class A>
struct RowOfExpert {
  A grad, peak, inverse, expectation;
};

template <class A>
struct RowOfExperts {
  const DivergenceCall<A>& call;
  const A* saved;
  const A* grad;
  A grad_sum = 0, mean_peak = 0, mean_inverse = 0;

  RowOfExperts(const DivergenceCall<A>& call, int64_t row)
      : call(call), saved(call.saved + row), grad(call.grad + row * call.grad_n) {
    for (int64_t e = 0; e < call.experts; ++e) grad_sum += grad[e * call.grad_e];
    if (call.pairwise) return;
    mean_peak = saved[3 * call.experts * call.rows];
    mean_inverse = A(1) / saved[(3 * call.experts + 1) * call.rows];
  }

  RowOfExpert<A> operator[](int64_t e) const {
    const int64_t stride = call.experts * call.rows;
    const A* own = saved + e * call.rows;
    return {grad[e * call.grad_e], own[0], A(1) / own[stride], own[2 * stride]};
  }
};

template <class T, class A>
LTK_INLINE void write_block(const DivergenceCall<A>& call, const Block<A>& block, int64_t e, const A* gradient) {
  T* out = static_cast<T*>(call.out[e]) + block.row * call.out_stride[e] + block.first;
  put_row(out, gradient, call.temperature ? call.temperature + block.first : nullptr, block.count, call.stream);
}

template <class T, class A>
LTK_INLINE void gradient_to_mean(const DivergenceCall<A>& call, const Block<A>& block, const RowOfExperts<A>& row) {
  constexpr int64_t W = Simd<A>::W, kBlock = kDivergenceBlock<A>;
  const A count_of = static_cast<A>(call.experts);
  alignas(64) A mean[kBlock], p_mean[kBlock], through[kBlock] = {}, gradient[kBlock];  // mean: U, then vbar
  sum_experts<T>(call, block, mean);
  for (int64_t j = 0; j < block.count; j += W) {
    const Vec<A> v = load(mean + j) / count_of - row.mean_peak;
    store(mean + j, v);
    store(p_mean + j, exp_vector(v) * row.mean_inverse);
  }
  if (!call.detach) {
    for (int64_t e = 0; e < call.experts; ++e) {
      const RowOfExpert<A> own = row[e];
      for_each_vector<T>(call, block, e, 0, [&](int64_t j, Vec<A> u) {
        const Vec<A> difference = load(mean + j) - (u - own.peak) - own.expectation;
        store(through + j, load(through + j) + own.grad * times(load(p_mean + j), difference));
      });
    }
    for (int64_t j = 0; j < block.count; j += W) store(through + j, load(through + j) / count_of);
  }
  for (int64_t e = 0; e < call.experts; ++e) {
    const RowOfExpert<A> own = row[e];
    for_each_vector<T>(call, block, e, call.x_stride[e], [&](int64_t j, Vec<A> u) {
      const Vec<A> p = prevent_fusion(exp_vector(u - own.peak) * own.inverse);
      store(gradient + j, own.grad * (p - load(p_mean + j)) + load(through + j));
    });
    write_block<T>(call, block, e, gradient);
  }
}

template <class T, class A>
LTK_INLINE void gradient_pairwise(const DivergenceCall<A>& call, const Block<A>& block, const RowOfExperts<A>& row,
                                  A* probabilities) {
  constexpr int64_t W = Simd<A>::W, kBlock = kDivergenceBlock<A>;
  const A count_of = static_cast<A>(call.experts), grad_sum = row.grad_sum;
  alignas(64) A all[kBlock], weighted[kBlock], gradient[kBlock];  // V; sum of g_e p_e
  for (int64_t j = 0; j < block.count; j += W) store(all + j, Vec<A>{}), store(weighted + j, Vec<A>{});
  for (int64_t e = 0; e < call.experts; ++e) {
    const RowOfExpert<A> own = row[e];
    for_each_vector<T>(call, block, e, call.x_stride[e], [&](int64_t j, Vec<A> u) {
      const Vec<A> v = u - own.peak, p = exp_vector(v) * own.inverse;
      store(probabilities + e * kBlock + j, p);
      store(all + j, load(all + j) + v);
      store(weighted + j, load(weighted + j) + own.grad * p);
    });
  }
  for (int64_t e = 0; e < call.experts; ++e) {
    const RowOfExpert<A> own = row[e];
    for_each_vector<T>(call, block, e, 0, [&](int64_t j, Vec<A> u) {
      const Vec<A> p = load(probabilities + e * kBlock + j);
      const Vec<A> difference = pairwise_difference(u - own.peak, count_of, load(all + j)) - own.expectation;
      store(gradient + j, own.grad * times(p, difference) + (prevent_fusion(grad_sum * p) - load(weighted + j)));
    });
    write_block<T>(call, block, e, gradient);
  }
}

template <class T, class A>
void divergence_gradient(const DivergenceCall<A>& call, int64_t begin, int64_t end, int64_t width, A* scratch) {
  const int64_t parts = (call.classes + width - 1) / width;
  for (int64_t part = begin; part < end; ++part) {
    const int64_t row = part / parts, first = part % parts * width;
    const int64_t last = call.classes - first < width ? call.classes : first + width;
    const RowOfExperts<A> terms(call, row);
    for_each_block<A>(row, first, last, [&](const Block<A>& block) {
      call.pairwise ? gradient_pairwise<T>(call, block, terms, scratch) : gradient_to_mean<T>(call, block, terms);
    });
  }
  finish_stream(call.stream);
}

}  // namespace

#define LTK_TABLE(T, A) {divergence_peaks<T, A>, divergence_sums<T, A>, divergence_gradient<T, A>}
const Tables<DivergenceKernels> expert_divergence = LTK_TABLES;
#undef LTK_TABLE

}  // namespace LTK_ISA
}  // namespace ltk
