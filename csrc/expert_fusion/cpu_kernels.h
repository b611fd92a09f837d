// Vector kernels of the experts' fusion, compiled once per instruction set.
//
// Memory sees one read per logit. A block of columns is fused into the first-level cache and swept there once more for
// its exponentials, while the next block is fetched; a third sweep looks for candidates if the block's maximum is one.

#include "../common/cpu/vectors.h"
#include "cpu_call.h"

namespace ltk {
namespace LTK_ISA {
namespace {

constexpr int64_t kFusionBlock = 2048;  // columns

// Computes u of W * `vectors` columns from `column`, or of the first `count` columns if these are fewer than W.
template <int vectors, class T, class A>
LTK_INLINE void fuse(const FusionCall<A>& call, int64_t row, int64_t column, int64_t count, Vec<A>* u) {
  constexpr int64_t W = Simd<A>::W;
  for (int i = 0; i < vectors; ++i) u[i] = Vec<A>{};
  for (int64_t e = 0; e < call.experts; ++e) {
    const T* x = static_cast<const T*>(call.x[e]) + row * call.x_stride[e] + column;
    for (int i = 0; i < vectors; ++i) u[i] = affine(get_some<A>(x + i * W, count, A(0)), call.weights[e], u[i]);
  }
  for (int i = 0; i < vectors; ++i) {
    const Vec<A> shift = call.shift ? get_some<A>(call.shift + column + i * W, count, A(0)) : Vec<A>{};
    u[i] = affine(u[i], call.scale, shift);
  }
}

// Writes u of `count` columns from `first`; returns their maximum (NaN aside).
template <class T, class A>
LTK_INLINE A fuse_block(const FusionCall<A>& call, int64_t row, int64_t first, int64_t count, A* out) {
  constexpr int64_t W = Simd<A>::W;
  constexpr int kUnrolled = 4;
  Vec<A> high = splat(minus_infinity<A>()), u[kUnrolled];
  int64_t j = 0;
  for (; j + kUnrolled * W <= count; j += kUnrolled * W) {
    fuse<kUnrolled, T>(call, row, first + j, W, u);
    for (int i = 0; i < kUnrolled; ++i) {
      store(out + j + i * W, u[i]);
      high = maximum<A>(u[i], high);
    }
  }
  for (; j < count; j += W) {
    fuse<1, T>(call, row, first + j, count - j, u);
    for (int64_t i = count - j; i < W; ++i) u[0][i] = minus_infinity<A>();
    put_some<A>(out + j, u[0], count - j);
    high = maximum<A>(u[0], high);
  }
  return max_lanes<A>(high);
}

// Returns the sum of exp(u - peak); calls `fetch(j)` along the way.
template <class A, class Fetch>
LTK_INLINE A exp_sum(const A* u, int64_t count, A peak, Fetch fetch) {
  constexpr int64_t W = Simd<A>::W;
  Vec<A> grand_total = {};
  for (int64_t j = 0; j < count;) {
    Vec<A> total = {};
    const int64_t pause = count - j > kTerms * W ? j + kTerms * W : count;
    for (; j < pause; j += W) {
      fetch(j);
      total = total + exp_vector(get_some<A>(u + j, count - j, minus_infinity<A>()) - peak);
    }
    grand_total = grand_total + total;
  }
  return sum_lanes<A>(grand_total);
}

template <class A>
LTK_INLINE void offer_block(const A* u, int64_t first, int64_t count, Top<A>& top) {
  constexpr int64_t W = Simd<A>::W;
  int64_t j = 0;
  for (; j < count && top.size < top.k; ++j) offer(top, {u[j], first + j});
  Vec<A> last = splat(top.items[0].value);
  for (; j < count; j += W) {
    const Vec<A> v = get_some<A>(u + j, count - j, minus_infinity<A>());
    const auto better = (v > last) | ((v != v) & (last == last));
    if (!any<A>(better)) continue;
    for (int64_t i = 0; i < W && j + i < count; ++i)
      if (better[i]) offer(top, {u[j + i], first + j + i});
    last = splat(top.items[0].value);
  }
}

template <class T, class A>
LogSum fuse_part(const FusionCall<A>& call, int64_t row, int64_t begin, int64_t end, Top<A>& top) {
  alignas(64) A block[kFusionBlock];
  LogSum sum = kEmptySum;
  for (int64_t first = begin; first < end; first += kFusionBlock) {
    const int64_t count = end - first < kFusionBlock ? end - first : kFusionBlock;
    A* u = call.log_probs ? call.log_probs + row * call.classes + first : block;
    const A peak = fuse_block<T>(call, row, first, count, u);
    const A base = peak > minus_infinity<A>() ? peak : A(0);
    const A total = exp_sum(u, count, base, [&](int64_t j) {
      for (int64_t e = 0; e < call.experts; ++e)
        __builtin_prefetch(static_cast<const T*>(call.x[e]) + row * call.x_stride[e] + first + kFusionBlock + j);
    });
    add(sum, {peak, total});
    if (top.size < top.k || peak > top.items[0].value || total != total) offer_block(u, first, count, top);
  }
  return sum;
}

template <class T, class A>
void subtract_log_sum(const FusionCall<A>& call, int64_t row, int64_t begin, int64_t end, const LogSum& sum) {
  constexpr int64_t W = Simd<A>::W;
  const A peak = static_cast<A>(sum.peak), log_total = static_cast<A>(std::log(sum.total));
  A* u = call.log_probs + row * call.classes;
  for (int64_t j = begin; j < end; j += W)
    put_some<A>(u + j, get_some<A>(u + j, end - j, A(0)) - peak - log_total, end - j);
}

template <class T, class A>
A fuse_column(const FusionCall<A>& call, int64_t row, int64_t column) {
  Vec<A> u;
  fuse<1, T>(call, row, column, 1, &u);
  return u[0];
}

}  // namespace

#define LTK_TABLE(T, A) {fuse_part<T, A>, subtract_log_sum<T, A>, fuse_column<T, A>}
const Tables<FusionKernels> expert_fusion = LTK_TABLES;
#undef LTK_TABLE

}  // namespace LTK_ISA
}  // namespace ltk
