// Arguments of the CUDA kernels of the partitioned log-sum-exp.
#pragma once

#include <cstdint>

#include "../common/cuda/device.h"
#include "../common/dtypes.h"

namespace ltk::cuda {

constexpr int kPartitionedThreads = 256;  // of a block, at most
constexpr int kRowsTogether = 32;         // rows of which a thread has the same columns in backward

template <class A>
struct PartitionedCall {
  const void* z;     // [rows, columns], columns are contiguous
  int64_t z_stride;  // from row to row, in elements
  int64_t rows;
  int columns;
  const int32_t* query_label;  // [rows]
  const int32_t* key_label;    // [columns]
  const int32_t* exclude;      // [rows], or null
  int64_t first;               // the number of column 0 in `exclude`
  const A* key_bias;           // [columns], or null: 0
  const A* key_scale;          // [columns], or null: 1
  const A* learned_scale;      // 0-dim factor of scale, or null
  double scale;
  bool wide;  // all rows are aligned to 16 bytes
  int threads;

  A* statistics;  // [kStatistics, rows], with kSlopes more where with_slopes
  bool with_slopes;
  int parts, part_columns;  // blocks per row, and columns of each: a multiple of 16 bytes
  A* part_sums;             // [rows, parts, 8] where parts > 1

  const A* terms;  // [5, rows], the rows of each terms_stride apart
  int64_t terms_stride;
  void* out;  // gradient of z, or null
  int64_t out_stride;
  int tiles;         // of columns, threads * 16 bytes wide (threads elements where not wide)
  A* sums;           // [chunks of kRowsTogether rows, columns] of G, or null
  A* weighted_sums;  // likewise, of G a z
};

template <class A>
device::Error partitioned_forward(const PartitionedCall<A>&, Dtype, device::Stream);
template <class A>
device::Error partitioned_backward(const PartitionedCall<A>&, Dtype, device::Stream);

}  // namespace ltk::cuda
