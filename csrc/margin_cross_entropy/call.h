// Arguments of the rows kernels that the calls of all devices share.
#pragma once

#include <cstdint>

#include "../common/dtypes.h"

namespace ltk {

// The types that differ: Count of classes, Q of class probabilities (void: of any dtype), M of a fixed margin, and W of
// the sum of the weights.
template <class A, class Count, class Q, class M, class W>
struct RowsCall {
  // Logits [n, classes, k], a row for each (n, k); strides in elements. Rows have x_c == 1, panels x_k == 1.
  int64_t rows, k;
  Count classes;
  const void* x;
  int64_t x_n, x_c, x_k;
  void* grad;  // of the logits, or null
  int64_t grad_n, grad_c, grad_k;
  const Q* q;  // class probabilities, or null
  int64_t q_n, q_c, q_k;
  Q* grad_q;  // or null
  int64_t grad_q_n, grad_q_c, grad_q_k;
  Dtype q_dtype;  // of both

  const A* class_scale;    // [classes] or null: 1
  const A* class_bias;     // or null: 0
  const A* class_margin;   // includes the fixed margin, or null: margin
  const A* weight;         // or null: 1
  const A* smooth_weight;  // [classes], of label smoothing: weight unless classes may be masked
  A smooth_share;          // what it is multiplied by
  W smooth_total;          // its sum
  bool masks;              // whether a class of no weight may have a logit of -inf
  const A* learned_scale;  // 0-dim factor of scale, or null: scale includes it
  M margin;
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

  // Takes from the options what all devices read alike. A template: kernels are compiled without tensors' headers.
  template <class Options, class Tensors>
  void take(const Options& o, Tensors& tensors) {
    class_bias = tensors.template pointer<A>(o.class_bias);
    weight = tensors.template pointer<A>(o.weight);
    smooth_weight = o.smooth_weight.has_value() ? tensors.template pointer<A>(o.smooth_weight) : weight;
    masks = o.masks();
    smoothing = static_cast<A>(o.label_smoothing);
    smooth_share = o.smooth_weight.has_value() ? A(1) : smoothing / static_cast<A>(classes);
    angular = o.angular;
    ignore_index = o.ignore_index;
    const bool both = o.coefficient.has_value() && o.mixed_target.has_value();
    coefficient = tensors.template pointer<A>(both ? o.coefficient->expand({2}) : o.coefficient);
    if (o.soft()) return;
    target = tensors.template pointer<int64_t>(o.target);
    if (!o.mixed_target.has_value()) return;
    mixed = tensors.template pointer<int64_t>(o.mixed_target);
    share = tensors.template pointer<A>(o.mix_lambda);
    share_stride = o.mix_lambda->dim() == 0 ? 0 : 1;
  }
};

}  // namespace ltk
