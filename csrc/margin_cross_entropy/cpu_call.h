// Arguments of the CPU kernels, which are compiled once per instruction set.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/cpu/tables.h"
#include "../common/row_terms.h"
#include "call.h"

namespace ltk {

// class_scale includes the scale: a_j = class_scale_j, or scale where it is null.
template <class A>
struct Call : RowsCall<A, int64_t, A, A, A> {
  int64_t n;
  bool stream;            // write the gradient past the caches
  const A* cosine_scale;  // class_scale without the scale, or null
};

// Row gradients of one sample as arrays over its positions, for kernels that run along positions.
template <class A>
struct RowGradients {
  using Int = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  A *peak, *slope, *smooth, *soft, *du[2], *dc[2];
  Int* column[2];

  void set(int64_t i, const RowGradient<A>& g) const {
    peak[i] = g.peak, slope[i] = g.slope, smooth[i] = g.smooth, soft[i] = g.soft;
    for (int t = 0; t < 2; ++t) du[t][i] = g.du[t], dc[t][i] = g.dc[t], column[t][i] = static_cast<Int>(g.column[t]);
  }
};

template <class A>
struct Kernels {
  // Writes losses, statistics and, where call.grad, gradients of rows [begin, end). scratch: 2 (classes + kPadding).
  void (*forward_rows)(const Call<A>&, int64_t begin, int64_t end, A* scratch);
  // Sums one part of one row. scratch: its length + kPadding.
  PartSums<A> (*sum_part)(const Call<A>&, int64_t row, int64_t begin, int64_t end, A* scratch);
  // Writes a row's outputs from the sums over its parts; returns its gradient for an upstream gradient of 1.
  RowGradient<A> (*finish_row)(const Call<A>&, int64_t row, const PartSums<A>&);
  // Computes the gradients of rows [begin, end) from the saved peak and total and the upstream gradients.
  void (*compute_gradients)(const Call<A>&, int64_t begin, int64_t end, RowGradient<A>* out);
  // Writes the gradient of columns [begin, end) of one row, and adds du, and du * x of ordinary columns, to column_du
  // and column_dx (of length end - begin, both or neither).
  void (*write_part_gradient)(const Call<A>&, const RowGradient<A>&, int64_t row, int64_t begin, int64_t end,
                              A* column_du, A* column_dx);
  // Runs forward for positions [begin, begin + count) of sample n, count <= kPanel. scratch: classes * (count rounded
  // up to kPadding).
  void (*forward_panel)(const Call<A>&, int64_t n, int64_t begin, int64_t count, A* scratch);
  // Writes the gradient of one class of one sample at positions [begin, end), and adds the sums of du, and of du * x
  // where the class is no target, to *du and *dx where these are not null.
  void (*write_class_gradient)(const Call<A>&, const RowGradients<A>&, int64_t n, int64_t column, int64_t begin,
                               int64_t end, double* du, double* dx);
};

constexpr int64_t kPadding = 16;
constexpr int64_t kPanel = 256;
constexpr int64_t kLargestRow = 1 << 20;  // bytes of scratch for a row that is not cut

LTK_DECLARE_TABLES(Kernels, margin_cross_entropy)

}  // namespace ltk
