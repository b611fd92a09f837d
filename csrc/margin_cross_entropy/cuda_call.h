// Arguments of the CUDA kernels, which are compiled once per dtype of the logits.
#pragma once

#include <cstdint>

#include "../common/cuda/device.h"
#include "../common/dtypes.h"
#include "../common/row_terms.h"
#include "call.h"

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

// Sums over rows, of every class: du; du * x where the class is no target of the row; dm; dc * x where it is one.
// The second and fourth apart: with an angle's slope in it, the fourth would take the digits of the scale's gradient.
enum ColumnSum { kSumDu, kSumDx, kSumDm, kSumTargetDx, kColumnSums };

// class_margin is [3, classes] where angular: the fields of Margin. smooth_total is 0-dim, or null: classes.
template <class A>
struct Call : RowsCall<A, int, void, Margin<A>, const A*> {
  Sums<A>* part_sums;  // [rows, parts]
  Record<A>* records;  // [rows]
  A* z;                // [rows]: RowGradient's, or null
  A* column_sums;      // [chunks, kColumnSums, classes]: over a chunk's rows, or null
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
