// Divergences between experts, as in lt_kernels/ops/expert_divergence/op.py. Forward: a block per sample, which goes
// over the columns twice, for the maxima and for the sums; where a sample fits one tile, it is read from memory once.
// Backward: a block per tile, no sums over columns.
#include "../common/cuda/experts_tile.h"
#include "cuda_call.h"

namespace ltk::cuda {
namespace {

constexpr int kBatch = 8;  // experts whose sums a thread has at a time; more experts take more sweeps

// x / temperature, rounded like a division. In float one division serves all experts: the inverse is two numbers, its
// rounded value and the rounding error. The error multiplies a finite x, so that an infinite x stays infinite. In
// double that takes too many registers.
template <class A>
struct Divided {
  static constexpr bool kDivides = sizeof(A) == sizeof(double);
  A factor = 1, rest = 0;  // the temperature itself where that divides
  bool any;

  LTK_MEMBER Divided(const DivergenceCall<A>& call, int column) : any(call.temperature != nullptr) {
    if (!any) return;
    const A temperature = call.temperature[column];
    factor = kDivides ? temperature : A(1) / temperature;
    if (!kDivides) rest = std::fma(-factor, temperature, A(1)) * factor;
  }

  LTK_MEMBER A operator()(A x) const {
    if (!any) return x;
    if (kDivides) return x / factor;
    return std::fma(x, factor, std::fmin(std::fmax(x, A(-1e20)), A(1e20)) * rest);
  }
};

// Returns 0 where the probability is 0, whatever the difference.
template <class A>
LTK_DEVICE A times(A p, A difference) {
  return p == A(0) ? A(0) : p * difference;
}

// A block at one sample, in forward. The sums of threads are merged in double: where a few columns make up most of a
// sum, every addition rounds it.
template <class T>
struct ForwardBlock {
  using A = typename T::A;
  static constexpr int kWarps = kTileThreads / 32, kSums = 2 * kBatch + 1;
  const DivergenceCall<A>& call;
  const int thread = thread_index(), threads = call.tile.threads, experts = call.x.count, classes = call.x.classes;
  const int64_t row = block_index(), rows = call.x.rows;
  const A count = static_cast<A>(experts);
  Tile<T> tile{shared_memory(), call.tile};
  double* const partial = reinterpret_cast<double*>(shared_memory() + call.tile.bytes);  // [kWarps, kSums]
  double* const mass = partial + kWarps * kSums;                                         // [experts], of exp(v_e)
  double* const distance = mass + experts;                                               // [experts]
  double* const mean_mass = distance + experts;
  A* const peak = reinterpret_cast<A*>(mean_mass + 1);  // [experts], and room for a batch more
  A* const mean_peak = peak + experts + kBatch + 1;     // of ubar
  int loaded = -1;                                      // the first column of the tile in memory

  LTK_MEMBER explicit ForwardBlock(const DivergenceCall<A>& call) : call(call) {}

  // f(column of the tile, its division by the temperature, u of up to kBatch experts from `batch` on) for this thread's
  // columns of the tile that begins with `first`.
  template <class F>
  LTK_MEMBER void each_column(int first, int batch, const F& f) {
    const int columns = first + call.tile.columns < classes ? call.tile.columns : classes - first;
    if (first != loaded) tile.load(call.x, row, first, columns);
    loaded = first;
    for (int c = thread; c < columns; c += threads) {
      const Divided<A> divided(call, first + c);
      A u[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) u[i] = batch + i < experts ? divided(tile.at(batch + i, c)) : A(0);
      f(c, divided, u);
    }
  }

  // Returns the sum over all experts of u_e less base(e): from the batch where that is all of them (the rest of it is
  // 0).
  template <class Base>
  LTK_MEMBER A sum_over_experts(int c, const Divided<A>& divided, const A (&of_batch)[kBatch], const Base& base) const {
    A total = 0;
    if (experts <= kBatch) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) total += of_batch[i];
    } else {
      for (int e = 0; e < experts; ++e) total += divided(tile.at(e, c)) - base(e);
    }
    return total;
  }
  LTK_MEMBER A mean_of(int c, const Divided<A>& divided, const A (&u)[kBatch]) const {
    return sum_over_experts(c, divided, u, [](int) { return A(0); }) / count;
  }

  // Finds the maxima of u_e of a batch of experts, and of ubar.
  LTK_MEMBER void find_peaks(int batch) {
    A high[kBatch + 1];
#pragma unroll
    for (int i = 0; i <= kBatch; ++i) high[i] = -infinity<A>();
    for (int first = 0; first < classes; first += call.tile.columns)
      each_column(first, batch, [&](int c, const Divided<A>& divided, const A(&u)[kBatch]) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) high[i] = std::fmax(high[i], u[i]);
        if (!call.pairwise) high[kBatch] = std::fmax(high[kBatch], mean_of(c, divided, u));
      });
    reduce_block<Maximum>(high, reinterpret_cast<A*>(partial), peak + batch, threads);
    if (thread == 0) *mean_peak = peak[batch + kBatch];
  }

  // Sums a batch of experts: exp(v_e), the differences, and exp(vbar), over each tile and then over tiles.
  LTK_MEMBER void sum_batch(int batch, A middle) {
    A base[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) base[i] = batch + i < experts ? peak[batch + i] : A(0);
    for (int first = 0; first < classes; first += call.tile.columns) {
      A sum[kSums] = {};
      each_column(first, batch, [&](int c, const Divided<A>& divided, const A(&u)[kBatch]) {
        A v[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) v[i] = u[i] - base[i];
        const A center = call.pairwise ? sum_over_experts(c, divided, v, [&](int e) { return peak[e]; })
                                       : mean_of(c, divided, u) - middle;
        const A mean_weight = call.pairwise ? A(0) : fast_exp(center);
        sum[2 * kBatch] += mean_weight;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (batch + i >= experts) continue;
          const A weight = fast_exp(v[i]);
          sum[i] += weight;
          sum[kBatch + i] += call.pairwise ? times(weight, count * v[i] - center) : times(mean_weight, center - v[i]);
        }
      });
      double exact[kSums];
#pragma unroll
      for (int i = 0; i < kSums; ++i) exact[i] = sum[i];
      reduce_block<Sum>(exact, partial, partial, threads);
      auto add_to = [&](double* total, double part) { *total = first == 0 ? part : *total + part; };
      if (thread < kBatch && batch + thread < experts) {
        add_to(&mass[batch + thread], partial[thread]);
        add_to(&distance[batch + thread], partial[kBatch + thread]);
      }
      if (thread == 0) add_to(mean_mass, partial[2 * kBatch]);
      block_barrier();
    }
  }

  LTK_MEMBER void write_outputs(A middle) const {
    for (int e = thread; e < experts; e += threads) {
      const double a = distance[e] / (call.pairwise ? mass[e] : *mean_mass);
      double logs = 0;
      if (call.pairwise) {
        for (int f = 0; f < experts; ++f) logs += std::log(static_cast<A>(mass[f] / mass[e]));
      } else {
        logs = std::log(static_cast<A>(mass[e] / *mean_mass));
      }
      call.value[e * rows + row] = static_cast<A>(a + logs);
      call.saved[e * rows + row] = peak[e];
      call.saved[(int64_t{1} * experts + e) * rows + row] = static_cast<A>(mass[e]);
      call.saved[(int64_t{2} * experts + e) * rows + row] = static_cast<A>(a);
    }
    if (thread == 0) {
      A* of_mean = call.saved + int64_t{3} * experts * rows + row;
      of_mean[0] = call.pairwise ? A(0) : middle;
      of_mean[rows] = call.pairwise ? A(0) : static_cast<A>(*mean_mass);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kTileThreads)
    divergence_forward_kernel(const __grid_constant__ DivergenceCall<typename T::A> call) {
  ForwardBlock<T> block(call);
  for (int batch = 0; batch < block.experts; batch += kBatch) block.find_peaks(batch);
  block_barrier();
  const typename T::A middle = *block.mean_peak;
  for (int batch = 0; batch < block.experts; batch += kBatch) block.sum_batch(batch, middle);
  block.write_outputs(middle);
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<typename T::A>)
    divergence_backward_kernel(const __grid_constant__ DivergenceCall<typename T::A> call) {
  using A = typename T::A;
  const int thread = thread_index(), threads = call.tile.threads, experts = call.x.count, classes = call.x.classes;
  const int64_t row = divide(block_index(), call.chunks), rows = call.x.rows;
  const int first = static_cast<int>(block_index() - row * call.chunks) * call.tile.columns;
  const int columns = first + call.tile.columns < classes ? call.tile.columns : classes - first;
  Tile<T> tile(shared_memory(), call.tile);
  struct Saved {
    A peak, inverse, a, grad;
  };
  auto* saved = reinterpret_cast<Saved*>(shared_memory() + call.tile.bytes);  // [experts]
  for (int e = thread; e < experts; e += threads)
    saved[e] = {call.saved[e * rows + row], A(1) / call.saved[(int64_t{1} * experts + e) * rows + row],
                call.saved[(int64_t{2} * experts + e) * rows + row], call.grad[e * rows + row]};
  const A count = static_cast<A>(experts), mean_peak = call.saved[int64_t{3} * experts * rows + row];
  const A mean_inverse = A(1) / call.saved[(int64_t{3} * experts + 1) * rows + row];  // read with to_mean only
  tile.load(call.x, row, first, columns);
  A grad_total = 0;
  for (int e = 0; e < experts; ++e) grad_total += saved[e].grad;

  for (int c = thread; c < columns; c += threads) {
    const Divided<A> divided(call, first + c);
    A total = 0;  // of u, or of v with pairwise
#pragma unroll 4
    for (int e = 0; e < experts; ++e) total += divided(tile.at(e, c)) - (call.pairwise ? saved[e].peak : A(0));
    if (call.pairwise) {
      A shared = 0;  // sum over f of g_f p_f
#pragma unroll 4
      for (int e = 0; e < experts; ++e) {
        const Saved& s = saved[e];
        shared += s.grad * (fast_exp(divided(tile.at(e, c)) - s.peak) * s.inverse);
      }
#pragma unroll 4
      for (int e = 0; e < experts; ++e) {
        const Saved& s = saved[e];
        const A v = divided(tile.at(e, c)) - s.peak, p = fast_exp(v) * s.inverse;
        const A du = s.grad * times(p, count * v - total - s.a) + p * grad_total - shared;
        tile.put(e, c, divided(du));
      }
    } else {
      const A center = total / count - mean_peak, mean_p = fast_exp(center) * mean_inverse;
      A through = 0;  // to all experts alike, through the mean
      if (!call.detach) {
#pragma unroll 4
        for (int e = 0; e < experts; ++e) {
          const Saved& s = saved[e];
          through += s.grad * times(mean_p, center - (divided(tile.at(e, c)) - s.peak) - s.a);
        }
        through /= count;
      }
#pragma unroll 4
      for (int e = 0; e < experts; ++e) {
        const Saved& s = saved[e];
        const A p = fast_exp(divided(tile.at(e, c)) - s.peak) * s.inverse;
        tile.put(e, c, divided(s.grad * (p - mean_p) + through));
      }
    }
  }
  auto* out = static_cast<typename T::Stored*>(call.out) + (row * call.out_row + first);
  tile.store(experts, columns, [&](int e) { return out + e * call.out_expert; });
}

template <class T>
Error launch_forward(const DivergenceCall<typename T::A>& call, size_t shared_bytes, Stream stream) {
  return launch(&divergence_forward_kernel<T>, {call.x.rows, call.tile.threads, shared_bytes, 1, stream}, call);
}

template <class T>
Error launch_backward(const DivergenceCall<typename T::A>& call, size_t shared_bytes, Stream stream) {
  const Launch l = {call.x.rows * call.chunks, call.tile.threads, shared_bytes, 1, stream};
  return launch(&divergence_backward_kernel<T>, l, call);
}

}  // namespace

template <class A>
device::Error divergence_forward(const DivergenceCall<A>& call, Dtype dtype, size_t shared_bytes,
                                 device::Stream stream) {
  return with_elements<A>(dtype,
                          [&](auto element) { return launch_forward<decltype(element)>(call, shared_bytes, stream); });
}
template device::Error divergence_forward(const DivergenceCall<float>&, Dtype, size_t, device::Stream);
template device::Error divergence_forward(const DivergenceCall<double>&, Dtype, size_t, device::Stream);

template <class A>
device::Error divergence_backward(const DivergenceCall<A>& call, Dtype dtype, size_t shared_bytes,
                                  device::Stream stream) {
  return with_elements<A>(dtype,
                          [&](auto element) { return launch_backward<decltype(element)>(call, shared_bytes, stream); });
}
template device::Error divergence_backward(const DivergenceCall<float>&, Dtype, size_t, device::Stream);
template device::Error divergence_backward(const DivergenceCall<double>&, Dtype, size_t, device::Stream);

}  // namespace ltk::cuda
