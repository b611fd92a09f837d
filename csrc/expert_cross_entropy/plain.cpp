// Plain calls of expert_cross_entropy (see common/plain.h) and their place in autograd: class indices [N], one loss for
// all experts, no ensemble.
#include "../margin_cross_entropy/plain.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>

#include "../common/plain_functions.h"
#include "cpu_forward.h"

namespace ltk {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct PlainExperts {
  variable_list logits;  // one [E, N, C], or E of [N, C]
  int64_t experts;
  PlainRows rows;
  OptionalTensor log_prior;
  std::vector<double> taus;
  double share;  // of an expert's loss

  bool logits_need() const {
    return std::any_of(logits.begin(), logits.end(), [](const Tensor& each) { return each.requires_grad(); });
  }
};

// Reads the logits: an error is left to the long way.
void read_logits(PlainReader& read, PlainExperts& call) {
  PyObject* given = read.next();
  const bool is_list = PyList_CheckExact(given) || PyTuple_CheckExact(given);
  if (is_list) {
    for (Py_ssize_t e = 0; e < PySequence_Fast_GET_SIZE(given); ++e)
      call.logits.push_back(read.floating(PySequence_Fast_GET_ITEM(given, e)));
  } else {
    call.logits.push_back(read.floating(given));
  }
  read.expect(!call.logits.empty());
  if (!read.plain) return;
  const Tensor& first = call.logits[0];
  call.experts = is_list ? static_cast<int64_t>(call.logits.size()) : first.size(0);
  read.expect(first.dim() == (is_list ? 2 : 3) && first.numel() > 0);
  for (const Tensor& each : call.logits)
    read.expect(each.sizes() == first.sizes() && each.scalar_type() == first.scalar_type());
}

// Reads log_prior and the experts' multiples of it, both or none of them.
void read_prior(PlainReader& read, PlainExperts& call, int64_t classes, at::ScalarType dtype) {
  call.log_prior = read.vector(classes, dtype);
  PyObject* taus = read.next();
  const bool is_list = PyList_CheckExact(taus) || PyTuple_CheckExact(taus);
  read.expect(call.log_prior.has_value() ? is_list && !call.log_prior->requires_grad() : taus == Py_None);
  call.taus.assign(call.experts, 0.0);
  if (!read.plain || !is_list) return;
  read.expect(PySequence_Fast_GET_SIZE(taus) == call.experts);
  for (int64_t e = 0; read.plain && e < call.experts; ++e)
    call.taus[e] = read.number(PySequence_Fast_GET_ITEM(taus, e));
}

struct PlainResult {
  Tensor loss, rest, grad;
};

// Gives options the shapes that operators take: [N, 1].
void add_dimension(RowOptions& o) {
  o.target = o.target.unsqueeze(1);
  if (o.mixed_target.has_value()) o.mixed_target = o.mixed_target->unsqueeze(1);
  if (o.mix_lambda.has_value() && o.mix_lambda->dim() > 0) o.mix_lambda = o.mix_lambda->unsqueeze(1);
}

template <class A>
PlainResult forward_experts(PlainExperts& call, bool with_grad) {
  const at::AutoDispatchBelowADInplaceOrView below;
  RowOptions& o = call.rows.options;
  const Tensor& first = call.logits[0];
  o.coefficient = coefficient_of_rows<A>(call.rows, first.size(-1), static_cast<A>(call.share));
  RowOptions shaped = o;
  add_dimension(shaped);
  const auto [loss, rest, ensemble_loss, prediction, grad] =
      run_experts_forward(call.logits, shaped, call.log_prior, std::nullopt, call.taus, false, with_grad);
  return {sum_of<A>(loss), rest, grad};
}

PlainResult forward_experts(PlainExperts& call, bool with_grad) {
  const bool is_double = call.logits[0].scalar_type() == at::kDouble;
  return is_double ? forward_experts<double>(call, with_grad) : forward_experts<float>(call, with_grad);
}

enum Saved { kSavedRest, kSavedGradient, kReady, kSavedPrior, kSavedOptions };

struct ExpertCrossEntropyBackward : torch::autograd::Function<ExpertCrossEntropyBackward> {
  static Tensor forward(AutogradContext* ctx, at::TensorList logits, const OptionalTensor&, const OptionalTensor&,
                        const OptionalTensor&, const OptionalTensor&, PlainExperts& call) {
    const bool ready = call.rows.one_pass && call.logits_need() && !call.rows.learns();
    const PlainResult result = forward_experts(call, ready);
    const at::AutoDispatchBelowADInplaceOrView below;
    variable_list tensors = {result.rest, ready ? result.grad : Tensor(), flag_of(ready),
                             call.log_prior.value_or(Tensor())};
    std::vector<c10::IValue> numbers;
    call.rows.options.each(Keep{tensors, numbers});
    tensors.insert(tensors.end(), logits.begin(), logits.end());
    ctx->save_for_backward(std::move(tensors));
    ctx->set_materialize_grads(false);
    ctx->saved_data["numbers"] = c10::ivalue::Tuple::create(std::move(numbers));
    ctx->saved_data["taus"] = call.taus;
    ctx->saved_data["logits"] = static_cast<int64_t>(logits.size());
    return result.loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const variable_list saved = ctx->get_saved_variables();
    const int64_t count = ctx->saved_data["logits"].toInt();
    const std::vector<Tensor> logits(saved.end() - count, saved.end());
    variable_list results(count + 5);  // of the logits, four options, and the call
    const Tensor& grad_loss = upstream[0];
    if (!grad_loss.defined()) return results;
    refuse_batched(grad_loss, "expert_cross_entropy");
    const auto put_logits = [&](const Tensor& gradient) {
      for (int64_t i = 0; i < count; ++i)
        if (logits[i].requires_grad()) results[i] = logits[i].dim() == 3 ? gradient : gradient.select(0, i);
    };
    if (!c10::GradMode::is_enabled() && is_plain(grad_loss) && is_undisturbed()) {
      const Tensor ready = take_ready(saved[kReady], saved[kSavedGradient], grad_loss);
      if (ready.defined()) {
        put_logits(ready);
        return results;
      }
    }
    RowOptions o;
    o.each(Recall{&saved[kSavedOptions], ctx->saved_data["numbers"].toTupleRef().elements().begin()});
    add_dimension(o);
    c10::List<bool> needs;
    needs.push_back(std::any_of(logits.begin(), logits.end(), [](const Tensor& each) { return each.requires_grad(); }));
    for (const OptionalTensor& each : {o.class_bias, o.class_scale, o.class_margin, o.learned_scale})
      needs.push_back(each.has_value() && each->requires_grad());
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("lt_kernels::expert_cross_entropy_bwd", "");
    torch::jit::Stack stack = {grad_loss, saved[kSavedRest], logits};
    o.each([&](auto& field) { stack.emplace_back(field); });
    const OptionalTensor prior = saved[kSavedPrior].defined() ? OptionalTensor(saved[kSavedPrior]) : std::nullopt;
    // no coefficient of an ensemble, no numbers of compiled code
    for (c10::IValue value : {c10::IValue(prior), c10::IValue(), ctx->saved_data["taus"], c10::IValue(),
                              c10::IValue(needs), c10::IValue("native")})
      stack.push_back(std::move(value));
    op.callBoxed(stack);
    const std::vector<Tensor> gradients = stack.back().toTensorVector();
    if (needs.get(0)) put_logits(gradients[0]);
    for (int64_t i = 1; i < 5; ++i)
      if (needs.get(i)) results[count + i - 1] = gradients[i];
    return results;
  }
};

}  // namespace

// Returns the loss of a plain call, or None.
PyObject* plain_expert_cross_entropy(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  PlainReader read(arguments, count);
  if (!read.plain) Py_RETURN_NONE;
  PlainExperts call = {};
  read_logits(read, call);
  if (!read.plain) Py_RETURN_NONE;
  const Tensor& first = call.logits[0];
  const int64_t rows = first.size(-2), classes = first.size(-1);
  const at::ScalarType dtype = first.scalar_type();
  read_prior(read, call, classes, dtype == at::kDouble ? at::kDouble : at::kFloat);
  const int over = read.choice({"mean", "sum"});
  call.share = over == 0 ? 1.0 / static_cast<double>(call.experts) : 1.0;
  call.rows = read_rows(read, first.sizes(), {rows}, classes, dtype);
  if (!read.plain || call.rows.options.soft() || call.rows.reduction == kNone) Py_RETURN_NONE;
  Tensor loss;
  {
    pybind11::gil_scoped_release released;
    RECORD_FUNCTION("lt_kernels::expert_cross_entropy", c10::ArrayRef<const c10::IValue>());
    const RowOptions& o = call.rows.options;
    loss = c10::GradMode::is_enabled() && (call.logits_need() || call.rows.learns())
               ? ExpertCrossEntropyBackward::apply(at::TensorList(call.logits), o.class_bias, o.class_scale,
                                                   o.class_margin, o.learned_scale, call)
               : forward_experts(call, false).loss;
  }
  return THPVariable_Wrap(std::move(loss));
  END_HANDLE_TH_ERRORS
}

}  // namespace ltk
