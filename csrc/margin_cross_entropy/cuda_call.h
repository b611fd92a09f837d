// Arguments of the CUDA kernels, which are compiled once per dtype of the logits.
#pragma once

#include <cstdint>

#include "../common/cuda/device.h"
#include "../common/dtypes.h"
#include "../common/row_terms.h"

namespace ltk::cuda {

// Sums over some columns of a row without its targets' columns. peak: the largest shifted logit, or -inf; total and
// weighted are relative to it, or to 0 where it is -inf. The other fields are as in PartSums.
template <class A>
struct Sums {
  A peak, total, weight, weighted, best;
  int best_column;
};

// A row's gradient, and the classes that its margins' gradients belong to. With class probabilities, soft is the factor
// of their weights and smooth is 0.
template <class A>
struct alignas(16) Record {
  A peak, slope, smooth, soft;
  int column[2], target[2];  // as in RowGradient; the classes that dm belongs to, -1: none
  A du[2], dc[2], dm[2], z;
  A log_total;
};

template <class A>
struct Call {
  // Logits [n, classes, k], a row for each (n, k); strides in elements. Rows have x_c == 1, panels x_k == 1.
  int64_t rows, k;
  int classes;
  const void* x;
  int64_t x_n, x_c, x_k;
  void* grad;  // of the logits, or null
  int64_t grad_n, grad_c, grad_k;
  const void* q;  // class probabilities of any dtype, or null
  int64_t q_n, q_c, q_k;
  void* grad_q;  // in the dtype of q, or null
  int64_t grad_q_n, grad_q_c, grad_q_k;
  Dtype q_dtype;

  const A* class_scale;    // [classes] or null: 1
  const A* class_bias;     // or null: 0
  const A* class_margin;   // [classes], or [3, classes] where angular: the fields of Margin; or null: margin
  const A* weight;         // or null: 1
  const A* total_weight;   // 0-dim sum of the weights, or null: classes
  const A* learned_scale;  // 0-dim factor of scale, or null
  Margin<A> margin;
  A scale, smoothing;
  bool angular;

  const int64_t* target;  // [rows], or null with q
  const int64_t* mixed;   // or null
  const A* share;         // of target, [rows] or one value
  int64_t share_stride;
  const A* coefficient;  // [1] or [2] with mixed, or null: 1
  int64_t ignore_index;

  A* loss;  // [rows], like the next four
  A* lse;
  A* peak;
  A* total;
  int64_t* prediction;  // or null

  const A* grad_loss;  // [rows] or one value
  int64_t grad_loss_stride;
  const A* grad_lse;  // or null
  int64_t grad_lse_stride;

  Sums<A>* part_sums;  // [rows, parts]
  Record<A>* records;  // [rows]
  A* z;                // [rows]: RowGradient's, or null
  A* column_sums;      // [chunks, 3, classes]: sums over a chunk's rows of du, dc * x and dm, or null
  int parts, chunks;
  int64_t panel_room;  // bytes of shared memory that a block of panels may take
  bool keep_panel;     // set at launch: a panel's logits stay there until its gradient is written
};

// Where one row stays on the chip: threads x groups of 16 bytes in registers, or (groups == 0) the shared memory of the
// blocks of a cluster.
struct RowsShape {
  int threads, groups, cluster;
};

constexpr int kSharedThreads = 512;      // of a block that keeps its part of a row in shared memory
constexpr int kPartThreads = 256;        // of the two-pass kernels
constexpr int kChunkGroups = 4;          // groups of 16 bytes per thread where only a gradient is written
constexpr int kPanelWarps = 8;           // of a panel: each takes every 8th class
constexpr int kColumnThreads = 128;      // of a block that sums over rows
constexpr int kRowBytesReserved = 4096;  // shared memory besides the logits, at most

// The kernels of one dtype of logits. Each launches on the stream and returns CUDA's error.
template <class A>
struct Kernels {
  // Returns the most blocks per cluster that the current device can place, with so much shared memory each.
  int (*largest_cluster)(bool general, int64_t shared_bytes);
  // Writes losses, statistics and, where call.grad, gradients in one pass.
  device::Error (*rows_forward)(const Call<A>&, RowsShape, bool general, device::Stream);
  // The same for wider rows, in steps: sums over call.parts parts of each row; from them the outputs and records.
  device::Error (*rows_statistics)(const Call<A>&, bool general, device::Stream);
  device::Error (*rows_finish)(const Call<A>&, device::Stream);
  // Writes records from the saved statistics and the upstream gradients.
  device::Error (*rows_records)(const Call<A>&, device::Stream);
  // Writes the gradients of logits and probabilities from records.
  device::Error (*rows_gradient)(const Call<A>&, bool general, device::Stream);
  // The same with sums over rows, by columns. `paired`: every row is 4-byte aligned, two 16-bit columns per thread.
  device::Error (*columns_gradient)(const Call<A>&, bool paired, device::Stream);
  // Runs forward or all of backward where positions are contiguous. `wide`: 8 bytes of positions per thread.
  device::Error (*panels)(const Call<A>&, bool backward, bool wide, bool general, device::Stream);
  // Multiplies elements of data (16-byte aligned) by *factor, unless that is 1.
  device::Error (*scale)(void* data, int64_t elements, const A* factor, int64_t blocks, device::Stream);
};

extern const Kernels<float> kernels_float, kernels_bfloat16, kernels_half;
extern const Kernels<double> kernels_double;

}  // namespace ltk::cuda
