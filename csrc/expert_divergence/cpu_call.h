// Arguments of the CPU kernels, which are compiled once per instruction set. The formulas are in
// lt_kernels/ops/expert_divergence/op.py.
#pragma once

#include <cstdint>

#include "../common/cpu/tables.h"

namespace ltk {

template <class A>
struct DivergenceCall {
  int64_t experts, rows, classes;
  const void* const* x;     // [experts] logits
  const int64_t* x_stride;  // [experts] from row to row
  const A* temperature;     // [classes], or null
  bool pairwise, detach;

  A* saved;  // [3 experts + 2, rows]

  const A* grad;  // upstream, strides as given
  int64_t grad_e, grad_n;
  void* const* out;           // [experts] gradients of the logits
  const int64_t* out_stride;  // [experts]
  bool stream;                // write them past the caches
};

// Sums over columns of one row, relative to its maxima over all columns.
struct ExpertSums {
  double mass;      // of exp(v_e)
  double weighted;  // of exp(vbar) (vbar - v_e); if pairwise, of exp(v_e) (E v_e - V)
};

template <class A>
struct DivergenceKernels {
  // Columns [begin, end) of a row: maxima [experts + 1], the last one for the mean (not if pairwise).
  void (*peaks)(const DivergenceCall<A>&, int64_t row, int64_t begin, int64_t end, A* peaks);
  // Sums [experts + 1] over the same columns, given the maxima over all. scratch: divergence_scratch(experts).
  void (*sums)(const DivergenceCall<A>&, int64_t row, int64_t begin, int64_t end, const A* peaks, ExpertSums* sums,
               A* scratch);
  // Gradient, from what forward saved, of parts [begin, end): rows are cut every `width` columns.
  void (*gradient)(const DivergenceCall<A>&, int64_t begin, int64_t end, int64_t width, A* scratch);
};

constexpr int64_t kLargestDivergenceBlock = 1024;  // columns that are swept together

constexpr int64_t divergence_scratch(int64_t experts) { return experts * kLargestDivergenceBlock; }

LTK_DECLARE_TABLES(DivergenceKernels, expert_divergence)

}  // namespace ltk
