// Reductions over a warp and over a block, in a fixed order.
#pragma once

#include "elements.h"

namespace ltk::cuda {
namespace {

// The value that exponentials of columns with this largest logit are relative to.
template <class A>
LTK_DEVICE A reference(A peak) {
  return peak == -infinity<A>() ? A(0) : peak;
}

template <class A>
LTK_DEVICE A sum_lanes(A value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

struct Sum {
  template <class A>
  LTK_METHOD A of(A a, A b) {
    return a + b;
  }
};
struct Maximum {
  template <class A>
  LTK_METHOD A of(A a, A b) {
    return std::fmax(a, b);
  }
};

// Reduces values[i] of all threads to result[i], in a fixed order. partial: [threads / 32, kCount], in shared memory
// like result. Begins and ends with a barrier.
template <class Operation, int kCount, class A>
LTK_DEVICE void reduce_block(A (&values)[kCount], A* partial, A* result, int threads) {
  static_assert(kCount <= 32);
  const int thread = thread_index(), warp = thread / 32;
#pragma unroll
  for (int i = 0; i < kCount; ++i)
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) values[i] = Operation::of(values[i], shuffle_xor(values[i], mask));
  block_barrier();
  if (thread % 32 == 0)
#pragma unroll
    for (int i = 0; i < kCount; ++i) partial[warp * kCount + i] = values[i];
  block_barrier();
  if (thread < kCount) {
    A all = partial[thread];
    for (int w = 1; w < threads / 32; ++w) all = Operation::of(all, partial[w * kCount + thread]);
    result[thread] = all;
  }
  block_barrier();
}

}  // namespace
}  // namespace ltk::cuda
