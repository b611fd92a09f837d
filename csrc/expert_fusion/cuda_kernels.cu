// The experts' fusion: a block per sample reads its logits once, a tile of columns at a time.
//
// Each thread has every threads-th column, in order, and keeps the largest u and the sum of exp(u - largest). For
// more classes than the first, the row of u is kept too, and k rounds find the k largest. In each round the block
// compares the threads' candidates, and the winner's thread looks for its next one.
#include "../common/cuda/experts_tile.h"
#include "cuda_call.h"

namespace ltk::cuda {
namespace {

constexpr int kAhead = 4;  // columns of a thread at a time

template <class A>
struct Candidate {
  A value;
  int column;  // kNoColumn: none, with the value -inf
};

template <class A>
LTK_DEVICE bool larger(A a, A b) {  // NaN is the largest
  return !(a <= b) && b == b;
}

// Returns whether a comes before b: the larger first, the lower column if equal.
template <class A>
LTK_DEVICE bool before(const Candidate<A>& a, const Candidate<A>& b) {
  return larger(a.value, b.value) || (!larger(b.value, a.value) && a.column < b.column);
}

// Returns the first of all threads' candidates. places: one for each warp; free again after the next barrier.
template <class A>
LTK_DEVICE Candidate<A> first_of_block(Candidate<A> mine, Candidate<A>* places, int threads) {
  const int thread = thread_index();
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const Candidate<A> other = {shuffle_xor(mine.value, mask), shuffle_xor(mine.column, mask)};
    if (before(other, mine)) mine = other;
  }
  if (thread % 32 == 0) places[thread / 32] = mine;
  block_barrier();
  Candidate<A> first = places[0];
  for (int w = 1; w < threads / 32; ++w)
    if (before(places[w], first)) first = places[w];
  return first;
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<typename T::A>)
    expert_fusion_kernel(const __grid_constant__ FusionCall<typename T::A> call) {
  using A = typename T::A;
  constexpr int kWarps = kTileThreads / 32;
  const int thread = thread_index(), threads = call.tile.threads, experts = call.x.count, classes = call.x.classes;
  const int64_t row = block_index();
  Tile<T> tile(shared_memory(), call.tile);
  A* room = reinterpret_cast<A*>(shared_memory() + call.tile.bytes);
  auto* places = reinterpret_cast<Candidate<A>*>(room);  // [2, kWarps]
  A* partial = room + 4 * kWarps;                        // [kWarps]
  A* result = partial + kWarps;                          // [1]
  A* factor = result + 1;                                // [experts]
  A* kept = call.u ? call.u + row * classes : factor + experts;

  for (int e = thread; e < experts; e += threads)
    factor[e] = (experts <= kFewExperts ? call.weight[e] : A(1)) * (call.expert_weight ? call.expert_weight[e] : A(1));
  const A scale = call.learned_scale ? call.scale * *call.learned_scale : call.scale;

  Candidate<A> mine = {-infinity<A>(), thread < classes ? thread : kNoColumn};
  A total = 0;  // of exp(u - mine.value), or of exp(u) where that is -inf
  for (int first = 0; first < classes; first += call.tile.columns) {
    const int count = first + call.tile.columns < classes ? call.tile.columns : classes - first;
    tile.load(call.x, row, first, count);
    for (int begin = thread; begin < count; begin += kAhead * threads) {
      A u[kAhead] = {};
      for (int e = 0; e < experts; ++e) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
          if (begin + i * threads < count) u[i] = multiply_add(factor[e], tile.at(e, begin + i * threads), u[i]);
      }
      A high = mine.value;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int column = first + begin + i * threads;
        if (begin + i * threads < count) {
          u[i] = multiply_add(u[i], scale, call.class_shift ? call.class_shift[column] : A(0));
          if (call.keep) kept[column] = u[i];
          if (larger(u[i], high)) high = u[i], mine.column = column;
        } else {
          u[i] = -infinity<A>();
        }
      }
      if (larger(high, mine.value)) total *= fast_exp(mine.value - high), mine.value = high;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) total += fast_exp(u[i] - reference(mine.value));
    }
  }

  Candidate<A> won = first_of_block(mine, places, threads);
  if (mine.value != -infinity<A>()) total *= std::exp(mine.value - reference(won.value));
  A totals[1] = {total};
  reduce_block<Sum>(totals, partial, result, threads);
  const A largest = won.value, log_total = std::log(*result);
  const A mass = std::fabs(largest) < infinity<A>() ? *result : not_a_number<A>();
  if (thread == 0) {
    const A log_sum = largest == -infinity<A>() ? largest : largest + std::log(mass);
    call.mass[row] = call.normalize ? log_sum : mass;
  }

  for (int i = 0; i < call.k; ++i) {
    if (i > 0) {
      if (mine.column == won.column) {
        mine = {-infinity<A>(), kNoColumn};
        for (int column = thread; column < classes; column += threads) {
          const Candidate<A> next = {kept[column], column};
          if (before(won, next) && before(next, mine)) mine = next;
        }
      }
      won = first_of_block(mine, places + i % 2 * kWarps, threads);
    }
    if (thread == 0) {
      call.values[row * call.k + i] = call.normalize ? std::exp(won.value - largest) / mass : won.value;
      call.chosen[row * call.k + i] = won.column;
    }
  }
  if (call.log_probs) {
    A* log_probs = call.log_probs + row * classes;
    for (int column = thread; column < classes; column += threads)
      log_probs[column] = (kept[column] - largest) - log_total;
  }
}

template <class T>
Error launch_fusion(const FusionCall<typename T::A>& call, size_t shared_bytes, Stream stream) {
  return launch(&expert_fusion_kernel<T>, {call.x.rows, call.tile.threads, shared_bytes, 1, stream}, call);
}

}  // namespace

template <class A>
device::Error expert_fusion(const FusionCall<A>& call, Dtype dtype, size_t shared_bytes, device::Stream stream) {
  return with_elements<A>(dtype,
                          [&](auto element) { return launch_fusion<decltype(element)>(call, shared_bytes, stream); });
}
template device::Error expert_fusion(const FusionCall<float>&, Dtype, size_t, device::Stream);
template device::Error expert_fusion(const FusionCall<double>&, Dtype, size_t, device::Stream);

}  // namespace ltk::cuda
