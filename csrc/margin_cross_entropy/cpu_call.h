// Arguments of the CPU kernels, which are compiled once per instruction set.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/cpu/tables.h"
#include "../common/row_terms.h"

namespace ltk {

template <class A>
struct Call {
  // Logits [n, classes, k]; strides in elements. Rows have x_c == 1, panels x_k == 1.
  int64_t n, classes, k;
  const void* x;
  int64_t x_n, x_c, x_k;
  void* grad;  // of the logits, or null
  int64_t grad_n, grad_c, grad_k;
  bool stream;  // write the gradient past the caches
  const A* q;   // class probabilities, strides as the layout needs, or null
  int64_t q_n, q_c, q_k;
  A* grad_q;  // or null
  int64_t grad_q_n, grad_q_c, grad_q_k;

  const A* class_scale;   // a_j = scale * class_scale_j [classes], or null: a_j = scale
  const A* cosine_scale;  // class_scale_j without the scale, where class_scale is given
  const A* class_bias;    // or null
  const A* class_margin;  // includes the fixed margin, or null
  const A* weight;        // or null: 1
  A scale, margin, smoothing, total_weight;
  bool angular;

  const int64_t* target;  // [n * k], or null with q
  const int64_t* mixed;   // or null
  const A* share;         // of target, [n * k] or one value
  int64_t share_stride;
  A coefficient[2];
  int64_t ignore_index;

  A* loss;
  A* lse;
  A* peak;
  A* total;
  int64_t* prediction;  // or null

  const A* grad_loss;  // [n * k] or one value
  int64_t grad_loss_stride;
  const A* grad_lse;  // or null
  int64_t grad_lse_stride;
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
  // Writes the gradient of columns [begin, end) of one row, and adds du and dc * x to column_du and column_dx (of
  // length end - begin, both or neither).
  void (*write_part_gradient)(const Call<A>&, const RowGradient<A>&, int64_t row, int64_t begin, int64_t end,
                              A* column_du, A* column_dx);
  // Runs forward for positions [begin, begin + count) of sample n, count <= kPanel. scratch: classes * (count rounded
  // up to kPadding).
  void (*forward_panel)(const Call<A>&, int64_t n, int64_t begin, int64_t count, A* scratch);
  // Writes the gradient of one class of one sample at positions [begin, end), and adds the sums of du and dc * x to *du
  // and *dx where these are not null.
  void (*write_class_gradient)(const Call<A>&, const RowGradients<A>&, int64_t n, int64_t column, int64_t begin,
                               int64_t end, double* du, double* dx);
};

constexpr int64_t kPadding = 16;
constexpr int64_t kPanel = 256;
constexpr int64_t kLargestRow = 1 << 20;  // bytes of scratch for a row that is not cut

LTK_DECLARE_TABLES(Kernels, margin_cross_entropy)

}  // namespace ltk
