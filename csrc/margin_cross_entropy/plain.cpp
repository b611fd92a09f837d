// Plain calls of margin_cross_entropy (see common/plain.h) and their place in autograd.
#include "plain.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>

#include "../common/plain_functions.h"

namespace ltk {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int kDifferentiable = kLearnedScale + 1;

std::array<int64_t, 3> flat_shape(at::IntArrayRef shape) {
  if (shape.size() == 1) return {1, shape[0], 1};
  return {shape[0], shape[1], c10::multiply_integers(shape.begin() + 2, shape.end())};
}

Tensor reshaped(const Tensor& t, at::IntArrayRef shape) { return t.sizes() == shape ? t : t.reshape(shape); }

// Gives options the shapes that operators take.
void flatten(RowOptions& o, const std::array<int64_t, 3>& flat) {
  const std::array<int64_t, 2> rows = {flat[0], flat[2]};
  o.target = o.soft() ? reshaped(o.target, flat) : reshaped(o.target, rows);
  if (o.mixed_target.has_value()) o.mixed_target = reshaped(*o.mixed_target, rows);
  if (o.mix_lambda.has_value() && o.mix_lambda->dim() > 0) o.mix_lambda = reshaped(*o.mix_lambda, rows);
}

struct PlainResult {
  Tensor loss, rest, grad;  // rest as of the operator, the gradient like the input, or undefined
};

template <class A>
PlainResult forward_rows(const Tensor& input, PlainRows& rows, bool with_grad) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const Tensor flat = reshaped(input, flat_shape(input.sizes()));
  RowOptions& o = rows.options;
  if (o.soft()) o.target = reshaped(o.target, flat.sizes());
  o.coefficient = coefficient_of_rows<A>(rows, flat.size(1));
  Prepared<A> prepared(flat, o);
  auto [loss, lse, prediction, rest, grad] = run_forward(prepared, flat, false, with_grad, std::nullopt);
  loss = rows.reduction == kNone ? reshaped(loss, rows.shape) : sum_of<A>(loss);
  return {loss, rest, with_grad ? reshaped(grad, input.sizes()) : Tensor()};
}

// The operator's gradients through the dispatcher, for autograd, modes and whatever else is to see them.
std::vector<Tensor> watched_backward(const Tensor& grad_loss, const Tensor& rest, const Tensor& input, RowOptions& o,
                                     const c10::List<bool>& needs) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("lt_kernels::margin_cross_entropy_bwd", "");
  torch::jit::Stack stack = {grad_loss, c10::IValue(), rest, input};
  o.each([&](auto& field) { stack.emplace_back(field); });
  stack.insert(stack.end(), {c10::IValue(), needs, "native"});  // no numbers of compiled code
  op.callBoxed(stack);
  return stack.back().toTensorVector();
}

std::vector<Tensor> quiet_backward(const Tensor& grad_loss, const Tensor& rest, const Tensor& input, RowOptions& o,
                                   const c10::List<bool>& needs) {
  return run_backward(grad_loss, std::nullopt, rest, input, o, needs, std::nullopt);
}

enum Saved { kSavedInput, kSavedRest, kSavedGradient, kReady, kSavedOptions };

struct MarginCrossEntropyBackward : torch::autograd::Function<MarginCrossEntropyBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& target, const OptionalTensor&,
                        const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, PlainRows& rows) {
    const bool ready = rows.one_pass && input.requires_grad() && !rows.learns();
    const Tensor given = target;  // as the caller shaped it
    const auto run = input.scalar_type() == at::kDouble ? forward_rows<double> : forward_rows<float>;
    const PlainResult result = run(input, rows, ready);
    rows.options.target = given;
    const at::AutoDispatchBelowADInplaceOrView below;
    variable_list tensors = {input, result.rest, result.grad, flag_of(ready)};
    std::vector<c10::IValue> numbers;
    rows.options.each(Keep{tensors, numbers});
    ctx->save_for_backward(std::move(tensors));
    ctx->set_materialize_grads(false);
    ctx->saved_data["numbers"] = c10::ivalue::Tuple::create(std::move(numbers));
    return result.loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const variable_list saved = ctx->get_saved_variables();
    variable_list results(kDifferentiable + 1);
    Tensor grad_loss = upstream[0];
    if (!grad_loss.defined()) return results;
    refuse_batched(grad_loss, "margin_cross_entropy");
    const bool plain = !c10::GradMode::is_enabled() && is_plain(grad_loss) && is_undisturbed();
    if (plain) results[kInput] = take_ready(saved[kReady], saved[kSavedGradient], grad_loss);
    if (results[kInput].defined()) return results;
    RowOptions o;
    o.each(Recall{&saved[kSavedOptions], ctx->saved_data["numbers"].toTupleRef().elements().begin()});
    const Tensor &input = saved[kSavedInput], target = o.target;
    const auto flat = flat_shape(input.sizes());
    flatten(o, flat);
    if (grad_loss.dim() > 0) grad_loss = grad_loss.reshape({flat[0], flat[2]});
    c10::List<bool> needs;
    for (const Tensor& each : {input, target, o.class_bias.value_or(Tensor()), o.class_scale.value_or(Tensor()),
                               o.class_margin.value_or(Tensor()), o.learned_scale.value_or(Tensor())})
      needs.push_back(each.defined() && each.requires_grad());
    const auto run = plain ? quiet_backward : watched_backward;
    const std::vector<Tensor> gradients = run(grad_loss, saved[kSavedRest], reshaped(input, flat), o, needs);
    for (int i = 0; i < kDifferentiable; ++i)
      if (needs.get(i)) results[i] = gradients[i];
    if (needs.get(kInput)) results[kInput] = reshaped(results[kInput], input.sizes());
    if (needs.get(kTarget)) results[kTarget] = reshaped(results[kTarget], target.sizes());
    return results;
  }
};

}  // namespace

// Returns the loss of a plain call, or None.
PyObject* plain_margin_cross_entropy(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  PlainReader read(arguments, count);
  if (!read.plain) Py_RETURN_NONE;
  const Tensor input = read.floating();
  if (!read.plain || input.dim() == 0 || input.numel() == 0) Py_RETURN_NONE;
  at::DimVector index_shape(input.sizes());
  const int64_t classes = input.size(input.dim() == 1 ? 0 : 1);
  index_shape.erase(index_shape.begin() + (input.dim() == 1 ? 0 : 1));
  PlainRows rows = read_rows(read, input.sizes(), index_shape, classes, input.scalar_type());
  if (!read.plain) Py_RETURN_NONE;
  Tensor loss;
  {
    pybind11::gil_scoped_release released;
    RECORD_FUNCTION("lt_kernels::margin_cross_entropy", c10::ArrayRef<const c10::IValue>());
    const RowOptions& o = rows.options;
    if (c10::GradMode::is_enabled() && (input.requires_grad() || rows.learns())) {
      loss = MarginCrossEntropyBackward::apply(input, o.target, o.class_bias, o.class_scale, o.class_margin,
                                               o.learned_scale, rows);
    } else {
      const auto run = input.scalar_type() == at::kDouble ? forward_rows<double> : forward_rows<float>;
      loss = run(input, rows, false).loss;
    }
  }
  return THPVariable_Wrap(std::move(loss));
  END_HANDLE_TH_ERRORS
}

}  // namespace ltk
