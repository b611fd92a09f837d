// The rows kernel in CUDA C++. One source file per dtype includes it and defines its table of kernels.
//
// Rows: classes are contiguous. The body of a row is cut into aligned groups of 16 bytes, each read and written whole;
// the columns before the first group, after the last, and the groups that hold a target are the row's *edge*, done one
// column per lane by one warp. The body then needs no comparison per column and touches no neighbouring row, and
// targets are in no sum. Bytes per logit: 2 itemsize where the row stays on the chip (registers, or shared memory of a
// cluster of blocks), else 3 itemsize.
//
// Panels: positions (pixels) are contiguous. A warp takes every 8th class of 32 x V positions, a block all classes.
//
// The gradient may overwrite the logits. A thread reads an element itself before it writes it; others read it before a
// barrier of all writers of that row (a block's, a cluster's, or the launch of the kernel that writes).
//
// Sums are merged in an order that depends on sizes alone.
#pragma once

#include "cuda_panels.h"
#include "cuda_rows.h"

namespace ltk::cuda {
namespace {

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

  static int largest_cluster(bool general, int64_t bytes) {
    return general ? device::largest_cluster<&rows_forward_kernel<T, kSharedThreads, 0, true>>(kSharedThreads, bytes)
                   : device::largest_cluster<&rows_forward_kernel<T, kSharedThreads, 0, false>>(kSharedThreads, bytes);
  }

  static Error rows_statistics(const Call<A>& call, bool general, Stream stream) {
    const Launch l = {call.rows * call.parts, kPartThreads, kRowBytesReserved, 1, stream};
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
    if constexpr (sizeof(A) < 8) {  // one warp per row; doubles need too many registers
      if (groups <= 32 * kChunkGroups) {
        c.parts = 1;
        const Launch l = warp_per_row(rows, stream);
        return general ? launch(&rows_gradient_kernel<T, 32, true>, l, c)
                       : launch(&rows_gradient_kernel<T, 32, false>, l, c);
      }
    }
    c.parts = static_cast<int>(std::max<int64_t>(1, ceil_div(groups, kPartThreads * kChunkGroups)));
    const Launch l = {rows * c.parts, kPartThreads, 0, 1, stream};
    return general ? launch(&rows_gradient_kernel<T, kPartThreads, true>, l, c)
                   : launch(&rows_gradient_kernel<T, kPartThreads, false>, l, c);
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
