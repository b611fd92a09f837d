// The kernel of panels: positions (pixels) are contiguous.
#pragma once

#include "cuda_terms.h"

namespace ltk::cuda {
namespace {

// A warp's sums for one position, in shared memory: all fields, or the two that the simple kernels need.
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
    Sums<A> s = empty_sums<A>();
    s.peak = peak, s.total = total;
    return s;
  }
};

// The fields of the positions' records that every column needs, laid out without bank conflicts.
template <class A, int kPositions>
struct alignas(16) PanelRows {
  A peak[kPositions], slope[kPositions], smooth[kPositions], soft[kPositions], log_total[kPositions];
  int column[2][kPositions];

  LTK_MEMBER void set(int p, const Record<A>& r) {
    peak[p] = r.peak, slope[p] = r.slope, smooth[p] = r.smooth, soft[p] = r.soft, log_total[p] = r.log_total;
    column[0][p] = r.column[0], column[1][p] = r.column[1];
  }
};

// Writes the sums of a warp's classes in backward to sums[0 ... kCount - 1]: the masses of their probabilities.
template <class T, int kCount, bool kGeneral, class A>
LTK_DEVICE void sum_probabilities(const Call<A>& call, int64_t q_offset, int warp, bool exist,
                                  PanelSums<A, kGeneral>* sums) {
  A mass[kCount] = {};
  if (exist)
    for (int c = warp; c < call.classes; c += kPanelWarps)
#pragma unroll
      for (int v = 0; v < kCount; ++v)
        mass[v] += soft_weight(call, load_probability(call, q_offset + c * call.q_c + v), load_weights_of(call, c));
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    Sums<A> s = empty_sums<A>();
    s.weight = mass[v];
    sums[v] = PanelSums<A, kGeneral>::of(s);
  }
}

// Writes a position's outputs from the warps' sums, which are kPositions apart; returns its record.
template <class T, int kPositions, bool kBackward, bool kGeneral, class A>
LTK_DEVICE Record<A> finish_position(const Call<A>& call, int64_t row, const typename T::Stored* logits,
                                     const PanelSums<A, kGeneral>* sums) {
  const LoadedSlots<A> slots = load_slots<T>(call, row, logits);
  Sums<A> s = empty_sums<A>();
  Record<A> record = {};
  if (!kBackward) {
    for (int i = 0; i < kPanelWarps; ++i) merge<kGeneral>(s, sums[i * kPositions].sums());
    write_row(call, row, slots, s);
    if (call.grad) record = make_record(call, slots, make_rest(slots, s), s.weight, A(1), A(0));
  } else {
    if (kGeneral && call.q)
      for (int i = 0; i < kPanelWarps; ++i) s.weight += sums[i * kPositions].sums().weight;
    record = make_backward_record(call, row, slots, s.weight);
    if (call.z) call.z[row] = record.z;
  }
  return record;
}

// Adds a position of class c to its sums.
template <class A>
LTK_DEVICE void add_position(const Record<A>& r, int c, A du, A dx, A (&sum)[kColumnSums]) {
  const bool at_target = c == r.column[0] || c == r.column[1];
  sum[kSumDu] += du;
  sum[kSumDx] += at_target ? A(0) : dx, sum[kSumTargetDx] += at_target ? dx : A(0);
  for (int i = 0; i < 2; ++i)
    if (c == r.target[i]) sum[kSumDm] += r.dm[i];
}

// Adds the sums of class c over a panel to those over the block's earlier panels.
template <class A>
LTK_DEVICE void add_column_sums(const Call<A>& call, int c, const A (&sum)[kColumnSums], int lane, bool first_panel) {
#pragma unroll
  for (int i = 0; i < kColumnSums; ++i) {
    const A total = sum_lanes(sum[i]);
    A* place = call.column_sums + (block_index() * kColumnSums + i) * call.classes + c;
    if (lane == 0) *place = first_panel ? total : *place + total;
  }
}

// Block i takes the panels i, i + blocks, ... of 32 x kCount positions. Shared memory holds the warps' sums of every
// position, the positions' records, and (call.keep_panel) the panel's logits.
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
  const A scale = load_scale(call);
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
        s[v] = empty_sums<A>();
        bool bad = false;
        column[0][v] = exist ? find_column(call, first_row + v, 0, &bad) : -1;
        column[1][v] = exist ? find_column(call, first_row + v, 1, &bad) : -1;
      }
      for (int begin_class = warp; exist && begin_class < call.classes; begin_class += kAhead * kPanelWarps) {
        Logits raw[kAhead];
        A a[kAhead], b[kAhead], unused[kAhead] = {};
        Weights<A> w[kAhead] = {};
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
          a[i] = kGeneral ? scale * load_class_scale(call, c) : scale, b[i] = load_bias(call, c);
          if (weighted) w[i] = load_weights_of(call, c);
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
            u[i] = shift_logit(logit, a[i], b[i]);
            if (weighted) {
              const A one_u[1] = {u[i]};
              A one_w[1] = {w[i].smooth};
              if (call.q) one_w[0] = soft_weight(call, load_probability(call, q + c * call.q_c + v), w[i]);
              add<true>(s[v], one_u, one_w, call.masks);
            }
          }
          if (!weighted) add<false>(s[v], u, unused, false);
        }
      }
#pragma unroll
      for (int v = 0; v < kCount; ++v) sums[warp * kPositions + first_position + v] = Kept::of(s[v]);
    } else if (kGeneral && call.q) {
      sum_probabilities<T, kCount>(call, q, warp, exist, sums + warp * kPositions + first_position);
    }
    block_barrier();

    if (warp < kCount && begin + warp * 32 + lane < call.k) {  // one thread per position
      const int p = warp * 32 + lane;
      const Stored* logits = static_cast<const Stored*>(call.x) + (n * call.x_n + begin + p);
      const Record<A> record =
          finish_position<T, kPositions, kBackward>(call, n * call.k + begin + p, logits, sums + p);
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
        A sum[kColumnSums] = {};
        if (exist) {
          const Logits raw = ahead[j];
          const A a = kGeneral ? scale * load_class_scale(call, c) : scale, b = load_bias(call, c);
          Weights<A> w = {A(1), A(1)};
          if (kGeneral) w = load_weights_of(call, c);
          Logits out;
#pragma unroll
          for (int v = 0; v < kCount; ++v) {
            const A logit = T::get(raw.value[v]), u = shift_logit(logit, a, b) - peak[v];
            A du = slope[v] * fast_exp(u);
            if (kGeneral) {
              const A q_here = call.q ? load_probability(call, q + c * call.q_c + v) : A(0);
              du -= subtracted(call, smooth[v], soft[v], w, q_here);
            }
            A dc = du;
            if (c == column[0][v] || c == column[1][v]) {
              const Record<A>& r = records[first_position + v];
              const int i = c == column[0][v] ? 0 : 1;
              du = r.du[i], dc = r.dc[i];
            }
            if (kBackward && kGeneral && call.grad_q)
              store_probability_gradient(call, grad_q + c * call.grad_q_c + v,
                                         differentiate_probability(call, soft[v], w.own, log_total[v] - u));
            out.value[v] = T::put(dc * a);
            if (summed) add_position(records[first_position + v], c, du, dc * logit, sum);
          }
          if (call.grad) store_pack(grad + c * call.grad_c, out);
        }
        if (summed) add_column_sums(call, c, sum, lane, first_panel);
      }
    }
    block_barrier();
  }
}

}  // namespace
}  // namespace ltk::cuda
