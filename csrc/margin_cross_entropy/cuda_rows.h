// Kernels of rows whose classes are contiguous.
#pragma once

#include "cuda_columns.h"

namespace ltk::cuda {
namespace {

template <class A, int kWarps>
struct RowShared {  // shared memory of one row's block
  Sums<A> warps[kWarps], block;
  LoadedSlots<A> slots;
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

// Returns how many blocks must fit a processor, so that some compute while others wait for memory. This bounds the
// registers: 1 where more blocks would spill.
constexpr int blocks_per_processor(int threads, int groups, bool general, bool doubles) {
  if (general || doubles) return 1;
  if (threads <= 128) return threads == 32 ? 4 : 6;
  return groups == 0 ? 2 : 3;
}

// Writes a row's loss and, where call.grad, its gradient, while the row stays on the chip. One warp (kThreads 32), one
// block, or (kGroups 0) a cluster's blocks have a row.
template <class T, int kThreads, int kGroups, bool kGeneral>
__global__ void __launch_bounds__(kThreads == 32 ? 32 * kRowsPerBlock : kThreads,
                                  blocks_per_processor(kThreads, kGroups, kGeneral, sizeof(typename T::A) == 8))
    rows_forward_kernel(const __grid_constant__ Call<typename T::A> call) {
  using A = typename T::A;
  constexpr int kWarps = kThreads / 32, kRows = kWarps == 1 ? kRowsPerBlock : 1;
  constexpr int kSlotWarp = kWarps > 1 ? 1 : 0;  // it loads the targets and writes the row's outputs
  using Shared = RowShared<A, kWarps>;
  static_assert(sizeof(Shared) * kRows <= kRowBytesReserved);
  const int place = kWarps == 1 ? thread_index() / 32 : 0, thread = thread_index() - place * 32;
  const int warp = thread / 32, lane = thread % 32;
  const int blocks = kGroups == 0 ? cluster_size() : 1, rank = kGroups == 0 ? cluster_rank() : 0;
  const int64_t row = kWarps == 1 ? block_index() * kRows + place : divide(block_index(), blocks);
  if (kWarps == 1 && row >= call.rows) return;
  Shared& shared = reinterpret_cast<Shared*>(shared_memory())[place];

  typename SourceOf<T, kThreads, kGroups>::type source{View<T>(call, row), thread};
  View<T>& view = source.view;
  source.take_part(rank, blocks);
  if constexpr (kGroups == 0) source.buffer = reinterpret_cast<Group*>(shared_memory() + kRowBytesReserved);
  source.load();
  view.find_targets(call, row);
  const A scale = load_scale(call);
  const Edge<A> edge = warp == 0 && rank == 0 ? load_edge(view, lane, call.classes) : Edge<A>{-1, 0};
  if (warp == kSlotWarp && lane == 0) shared.slots = load_slots<T>(call, row, view.x);
  if constexpr (kGroups == 0) wait_for_copies();

  Sums<A> sums = sum_row<kGeneral, T>(call, source, edge, scale);
  merge_lanes<kGeneral>(sums);
  if constexpr (kWarps > 1) {
    if (lane == 0) shared.warps[warp] = sums;
    block_barrier();
    if (warp <= kSlotWarp) {
      sums = lane < kWarps ? shared.warps[lane] : empty_sums<A>();
      merge_lanes<kGeneral>(sums);
    }
  }
  if (kGroups == 0 && blocks > 1) {
    if (thread == 0) shared.block = sums;
    cluster_barrier();
    if (warp <= kSlotWarp) {
      sums = lane < blocks ? peer_memory(&shared, lane)->block : empty_sums<A>();
      merge_lanes<kGeneral>(sums);
    }
  }
  if constexpr (kWarps == 1) warp_barrier();
  if (thread == 0 && call.grad) {
    const Rest<A> rest = make_rest(shared.slots, sums);
    shared.record = make_record(call, shared.slots, rest, sums.weight, A(1), A(0));
  }
  if (warp == kSlotWarp && lane == 0 && rank == 0) write_row(call, row, shared.slots, sums);
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

// Sums over one of a row's call.parts parts per block.
template <class T, bool kGeneral>
__global__ void __launch_bounds__(kPartThreads, 1)
    rows_statistics_kernel(const __grid_constant__ Call<typename T::A> call) {
  using A = typename T::A;
  constexpr int kWarps = kPartThreads / 32;
  auto* warps = reinterpret_cast<Sums<A>*>(shared_memory());
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
  const int64_t row = divide(block_index(), call.parts);
  const int part = static_cast<int>(block_index() - row * call.parts);
  InGlobalMemory<T, kPartThreads> source{View<T>(call, row), thread};
  View<T>& view = source.view;
  source.take_part(part, call.parts);
  view.find_targets(call, row);
  const Edge<A> edge = warp == 0 && part == 0 ? load_edge(view, lane, call.classes) : Edge<A>{-1, 0};
  Sums<A> sums = sum_row<kGeneral, T>(call, source, edge, load_scale(call));
  merge_lanes<kGeneral>(sums);
  if (lane == 0) warps[warp] = sums;
  block_barrier();
  if (warp > 0) return;
  sums = lane < kWarps ? warps[lane] : empty_sums<A>();
  merge_lanes<kGeneral>(sums);
  if (lane == 0) call.part_sums[block_index()] = sums;
}

// Merges a row's parts (one warp per row); writes its outputs and, where call.grad, its record for an upstream gradient
// of 1.
template <class T>
__global__ void __launch_bounds__(32 * kRowsPerBlock, 1)
    rows_finish_kernel(const __grid_constant__ Call<typename T::A> call) {
  using A = typename T::A;
  const int lane = thread_index() % 32;
  const int64_t row = block_index() * kRowsPerBlock + thread_index() / 32;
  if (row >= call.rows) return;
  Sums<A> sums = empty_sums<A>();
  for (int i = lane; i < call.parts; i += 32) merge<true>(sums, call.part_sums[row * call.parts + i]);
  merge_lanes<true>(sums);
  if (lane > 0) return;
  const LoadedSlots<A> slots = load_slots<T>(call, row, View<T>(call, row).x);
  write_row(call, row, slots, sums);
  if (call.grad) call.records[row] = make_record(call, slots, make_rest(slots, sums), sums.weight, A(1), A(0));
}

// Writes a row's record for the upstream gradients; one warp per row.
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
      soft_mass += soft_weight(call, load_probability(call, view.q + c), load_weights_of(call, c));
    soft_mass = sum_lanes(soft_mass);
  }
  if (lane > 0) return;
  const Record<A> record = make_backward_record(call, row, load_slots<T>(call, row, view.x), soft_mass);
  call.records[row] = record;
  if (call.z) call.z[row] = record.z;
}

// Writes gradients of logits and probabilities from records. A block or (kThreads 32) a warp has one of a row's
// call.parts parts, of kThreads x kChunkGroups groups.
template <class T, int kThreads, bool kGeneral>
__global__ void __launch_bounds__(kThreads == 32 ? 32 * kRowsPerBlock : kThreads, 1)
    rows_gradient_kernel(const __grid_constant__ Call<typename T::A> call) {
  using A = typename T::A;
  constexpr int kRows = kThreads == 32 ? kRowsPerBlock : 1;
  const int place = kRows > 1 ? thread_index() / 32 : 0, thread = thread_index() - place * 32;
  const int64_t item = block_index() * kRows + place, row = divide(item, call.parts);
  if (row >= call.rows) return;
  const int part = static_cast<int>(item - row * call.parts);
  InRegisters<T, kThreads, kChunkGroups> source{View<T>(call, row), thread};
  View<T>& view = source.view;
  source.first = part * kThreads * kChunkGroups, source.last = view.groups;
  source.load();
  view.find_targets(call, row);
  const Edge<A> edge = thread < 32 && part == 0 ? load_edge(view, thread, call.classes) : Edge<A>{-1, 0};
  const Record<A>& r = call.records[row];
  const int target[2] = {r.column[0], r.column[1]};
  const A dc[2] = {r.dc[0], r.dc[1]};
  const Slopes<A> slopes = {r.peak, r.slope, r.smooth, r.soft, r.log_total};
  write_gradient<kGeneral, T>(call, source, edge, load_scale(call), slopes, target, dc);
}

// ---------------------------------------------------------------------------------------------------- sums over rows

// One column of one row in backward: du, dc, the margin's gradient, and d/d(q).
template <class A>
struct ColumnGradient {
  A du, dc, dm, dq;
  bool at_target;
};

template <class A>
LTK_DEVICE ColumnGradient<A> differentiate_column(const Call<A>& call, const Record<A>& r, int column, A a, A b,
                                                  const Weights<A>& w, A x, A q) {
  const A u = shift_logit(x, a, b) - r.peak;
  ColumnGradient<A> g;
  g.du = r.slope * fast_exp(u) - subtracted(call, r.smooth, r.soft, w, q);
  g.dq = differentiate_probability(call, r.soft, w.own, r.log_total - u);
  g.dc = g.du, g.dm = 0, g.at_target = false;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (column == r.column[i]) g.du = r.du[i], g.dc = r.dc[i], g.at_target = true;
    if (column == r.target[i]) g.dm += r.dm[i];
  }
  return g;
}

// Writes gradients and their sums over one of call.chunks chunks of rows; a block has kColumnThreads x kCount columns.
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
  const A scale = load_scale(call);
  A a[kCount], b[kCount];
  Weights<A> w[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int column = i < count ? first + i : first;
    a[i] = scale * load_class_scale(call, column), b[i] = load_bias(call, column);
    w[i] = load_weights_of(call, column);
  }
  double total[kColumnSums][kCount] = {};
  int64_t n = divide(chunk * per_chunk, call.k), k = chunk * per_chunk - n * call.k;
  for (int64_t begin = chunk * per_chunk; begin < last; begin += kShort) {
    A part[kColumnSums][kCount] = {};
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
          const A q = call.q ? load_probability(call, n * call.q_n + k * call.q_k + first + i) : A(0);
          const ColumnGradient<A> g = differentiate_column(call, r, first + i, a[i], b[i], w[i], logit, q);
          const A dx = g.dc * logit;
          part[kSumDu][i] += g.du, part[kSumDm][i] += g.dm;
          part[kSumDx][i] += g.at_target ? A(0) : dx, part[kSumTargetDx][i] += g.at_target ? dx : A(0);
          out.value[i] = T::put(g.dc * a[i]);
          if (call.grad_q) store_probability_gradient(call, n * call.grad_q_n + k * call.grad_q_k + first + i, g.dq);
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
      for (int s = 0; s < kColumnSums; ++s) total[s][i] += static_cast<double>(part[s][i]);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i)
#pragma unroll
    for (int s = 0; s < kColumnSums; ++s)
      if (i < count)
        call.column_sums[(chunk * kColumnSums + s) * call.classes + first + i] = static_cast<A>(total[s][i]);
}

}  // namespace
}  // namespace ltk::cuda
