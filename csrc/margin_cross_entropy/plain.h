// The arguments of plain calls (common/plain.h) that the losses of rows share, and their means.
#pragma once

#include "../common/plain.h"  // first: it includes Python.h

#include <ATen/ops/scalar_tensor.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>
#include <limits>
#include <utility>
#include <vector>

#include "cpu_prepared.h"
#include "means.h"

namespace ltk {

enum Reduction { kNone, kMean, kSum };

// The options of a plain call. Class vectors are in the compute dtype and indices int64, in the shape that the caller
// gave them; there is no coefficient yet.
struct PlainRows {
  RowOptions options;
  at::DimVector shape;  // of class indices
  Reduction reduction;
  bool zero_if_empty;  // the mean over no weight at all
  bool one_pass;       // whether forward may compute the gradient of logits, if nothing else needs one

  bool learns() const {
    const auto of = [](const OptionalTensor& t) { return t.has_value() && t->requires_grad(); };
    const RowOptions& o = options;
    return of(o.target) || of(o.class_bias) || of(o.class_scale) || of(o.class_margin) || of(o.learned_scale);
  }
};

inline bool masks_any(const Tensor& class_bias) {
  const auto any = [&](auto lowest) {
    const auto* first = class_bias.const_data_ptr<decltype(lowest)>();
    return std::find(first, first + class_bias.numel(), lowest) != first + class_bias.numel();
  };
  return class_bias.scalar_type() == at::kDouble ? any(-std::numeric_limits<double>::infinity())
                                                 : any(-std::numeric_limits<float>::infinity());
}

// Reads the options that follow the logits, which have that shape and dtype: in the order in which
// lt_kernels/functional hands them over.
inline PlainRows read_rows(PlainReader& read, at::IntArrayRef shape, at::IntArrayRef index_shape, int64_t classes,
                           at::ScalarType logits) {
  const at::ScalarType dtype = logits == at::kDouble ? at::kDouble : at::kFloat;
  PlainRows rows = {};
  rows.shape = index_shape;
  RowOptions& o = rows.options;
  PyObject* target = read.next();
  o.target = read.tensor(target);
  const bool soft = read.plain && is_floating_dtype(o.target.scalar_type());
  if (soft) {
    read.expect(o.target.sizes() == shape);
  } else {
    o.target = read.indices(target, index_shape).value_or(Tensor());
    read.expect(o.target.defined());
  }
  o.weight = read.vector(classes, dtype);
  read.expect(!o.weight.has_value() || !o.weight->requires_grad());
  o.class_bias = read.vector(classes, dtype);
  o.class_scale = read.vector(classes, dtype);
  PyObject* margin = read.next();
  if (THPVariable_CheckExact(margin)) {
    const Tensor given = read.floating(margin);
    read.expect(given.dim() == 0 || (given.dim() == 1 && given.size(0) == classes));
    if (read.plain)
      o.class_margin = given.dim() == 0 ? PlainReader::as(given, dtype).expand({classes}).contiguous()
                                        : PlainReader::as(given, dtype);
  } else if (margin != Py_None) {
    o.margin = read.number(margin);
  }
  PyObject* scale = read.next();
  o.scale = 1.0;
  if (THPVariable_CheckExact(scale)) {
    const Tensor given = read.floating(scale);
    read.expect(given.dim() == 0);
    if (read.plain) o.learned_scale = PlainReader::as(given, dtype);
  } else {
    o.scale = read.number(scale);
  }
  o.angular = read.choice({"additive", "angular"}) == 1;
  read.expect(!o.angular || (o.margin >= 0.0 && o.margin <= M_PI));
  o.ignore_index = read.integer();
  rows.reduction = static_cast<Reduction>(read.choice({"none", "mean", "sum"}));
  rows.zero_if_empty = read.choice({"nan", "zero"}) == 1;
  o.label_smoothing = read.number();
  read.expect(o.label_smoothing >= 0.0 && o.label_smoothing <= 1.0);
  const bool masked_classes = read.flag();
  o.mixed_target = read.indices(read.next(), index_shape);
  PyObject* share = read.next();
  read.expect(o.mixed_target.has_value() == (share != Py_None));
  if (THPVariable_CheckExact(share)) {
    const Tensor given = read.floating(share);
    read.expect((given.dim() == 0 || given.sizes() == index_shape) && !given.requires_grad());
    if (read.plain) o.mix_lambda = PlainReader::as(given, dtype);
  } else if (share != Py_None) {
    const double number = read.number(share);
    read.expect(number >= 0.0 && number <= 1.0);
    if (read.plain) o.mix_lambda = at::scalar_tensor(number, at::TensorOptions().dtype(dtype));
  }
  const int policy = read.choice({"recompute", "auto", "one_pass"});
  rows.one_pass = policy > (logits == at::kHalf ? 1 : 0) && rows.reduction != kNone;

  const bool smooths = o.label_smoothing > 0;
  if (soft) read.expect(margin == Py_None && o.ignore_index < 0 && !o.mixed_target.has_value());
  if (read.plain && o.class_bias.has_value() && (soft || smooths)) {
    const bool blind = soft && smooths && o.weight.has_value();
    if (masked_classes || blind) read.expect(!masks_any(*o.class_bias));
  }
  return rows;
}

// Returns the factor of each target's terms, [1], or [2] with a second one: `share`, over rows the mean if that is the
// reduction; nothing where it is 1.
template <class A>
OptionalTensor coefficient_of_rows(const PlainRows& rows, int64_t classes, A share = 1) {
  if (rows.reduction != kMean && share == A(1)) return std::nullopt;
  const RowOptions& o = rows.options;
  const int targets = o.mixed_target.has_value() ? 2 : 1;
  const Tensor result = at::empty({targets}, at::TensorOptions().dtype(dtype_of<A>()));
  A* coefficient = result.mutable_data_ptr<A>();
  const A* weight = o.weight.has_value() ? o.weight->const_data_ptr<A>() : nullptr;
  for (int i = 0; i < targets; ++i) {
    const Tensor& target = i ? *o.mixed_target : o.target;
    if (rows.reduction != kMean) {
      coefficient[i] = 1;
    } else if (o.soft()) {
      coefficient[i] = static_cast<A>(1.0 / static_cast<double>(c10::multiply_integers(rows.shape)));
    } else {
      coefficient[i] =
          mean_coefficient(target.const_data_ptr<int64_t>(), target.numel(), weight, o.ignore_index, classes);
      if (rows.zero_if_empty && std::isinf(coefficient[i])) coefficient[i] = 0;
    }
    coefficient[i] *= share;
  }
  return result;
}

// Returns the sum of all values, 0-dim.
template <class A>
Tensor sum_of(const Tensor& values) {
  Tensor total = at::empty({}, values.options());
  *total.template mutable_data_ptr<A>() = ordered_sum<A>(values.template const_data_ptr<A>(), values.numel());
  return total;
}

struct Keep {  // takes the fields of options apart, into what autograd saves and numbers
  torch::autograd::variable_list& tensors;
  std::vector<c10::IValue>& numbers;
  void operator()(Tensor& t) { tensors.push_back(t); }
  void operator()(OptionalTensor& t) { tensors.push_back(t.value_or(Tensor())); }
  template <class Number>
  void operator()(Number& value) {
    numbers.emplace_back(value);
  }
};

struct Recall {  // puts them together again
  const Tensor* tensor;
  const c10::IValue* number;
  void operator()(Tensor& t) { t = *tensor++; }
  void operator()(OptionalTensor& t) {
    if (tensor->defined()) t = *tensor;
    ++tensor;
  }
  template <class Number>
  void operator()(Number& value) {
    value = (number++)->to<Number>();
  }
};

// A flag of whether a node's gradient is ready and still as forward left it. It is in memory because compiled autograd
// makes a context for each pass.
inline Tensor flag_of(bool value) {
  const Tensor flag = at::empty({}, at::TensorOptions().dtype(at::kBool));
  *flag.mutable_data_ptr<bool>() = value;
  return flag;
}

// Returns the gradient that forward has computed, times the upstream one: once, in a buffer that only this node holds.
// A second pass gets nothing, and computes the gradient again.
inline Tensor take_ready(const Tensor& flag, const Tensor& gradient, const Tensor& grad_loss) {
  if (!std::exchange(*static_cast<bool*>(flag.data_ptr()), false)) return Tensor();
  Tensor ready = gradient.variable_data();  // scaling it is no change of a saved tensor
  scale_gradient_(ready, grad_loss);
  return ready;
}

}  // namespace ltk
