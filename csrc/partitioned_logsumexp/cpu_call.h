// Arguments of the CPU kernels, which are compiled once per instruction set. The formulas are in
// lt_kernels/ops/partitioned_logsumexp/arguments.py.
#pragma once

#include <cstdint>

#include "../common/cpu/tables.h"

namespace ltk {

template <class A>
struct PartitionedCall {
  int64_t rows, columns;
  const void* z;
  int64_t z_stride;            // from row to row, in elements
  const int32_t* query_label;  // [rows]
  const int32_t* key_label;    // [columns]
  const int32_t* exclude;      // [rows], or null
  int64_t first;               // the number that `exclude` gives column 0
  const A* key_bias;           // [columns], or null: 0
  const A* key_scale;          // [columns], or null: 1
  A scale;
  bool with_slopes;

  const A* terms;  // [5, rows], the rows of each `terms_stride` apart
  int64_t terms_stride;
  void* out;  // gradient of z, or null
  int64_t out_stride;
};

// Sums over some columns of one row; of negatives, then of positives.
template <class A>
struct PartitionedSums {
  A peak[2];                 // -inf: no column above it
  double mass[2], slope[2];  // of exp(u - peak), and of that times key_scale z
  double sum;                // of z of the positives
  int64_t count;             // of positives
};

template <class A>
struct PartitionedKernels {
  // Returns the sums over columns [begin, end) of a row.
  PartitionedSums<A> (*sums)(const PartitionedCall<A>&, int64_t row, int64_t begin, int64_t end);
  // Gradient of the same columns; G and G z are added to sum[0] and weighted_sum[0], ... where these are not null.
  void (*gradient)(const PartitionedCall<A>&, int64_t row, int64_t begin, int64_t end, A* sum, A* weighted_sum);
};

LTK_DECLARE_TABLES(PartitionedKernels, partitioned_logsumexp)

}  // namespace ltk
