// The experts' cross-entropy on the CPU: the rows kernel for every expert of a few samples, and the ensemble's from the
// same rows while they are in a core's cache.
#include "arguments.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "../cpu_experts.h"
#include "../cpu_host.h"
#include "../expert_fusion/cpu_prepared.h"
#include "../margin_cross_entropy/cpu_prepared.h"

namespace ltk {
namespace {

constexpr int64_t kChunk = 262144;  // bytes of logits that are visited twice: what stays in a core's own cache

// What an expert adds to its logits, [C], or nothing.
OptionalTensor bias_of(int64_t expert, const OptionalTensor& class_bias, const OptionalTensor& log_prior, double tau) {
  OptionalTensor bias = class_bias;
  if (bias.has_value() && bias->dim() == 2) bias = bias->select(0, expert);
  if (!log_prior.has_value() || tau == 0) return bias;
  const Tensor prior = log_prior->mul(tau);
  return bias.has_value() ? prior + *bias : prior;
}

// The cross-entropy of the mean of the experts' scaled logits, row by row.
template <class A>
struct Ensemble {
  PreparedFusion<A> fusion;
  const Call<A>& call;   // for its targets
  const A* coefficient;  // of each target, or null
  A* loss;
  int64_t* prediction;

  void operator()(int64_t row, const LogSum& sum, const Candidate<A>* best) const {
    prediction[row] = best->column;
    loss[row] = 0;
    const A share = call.mixed ? call.share[row * call.share_stride] : A(1);
    for (int i = 0; i < (call.mixed ? 2 : 1); ++i) {
      const int64_t column = (i ? call.mixed : call.target)[row];
      A term = 0;
      if (column != call.ignore_index)
        term = static_cast<A>(std::log(sum.total) - (fusion.kernels->value(fusion.call, row, column) - sum.peak));
      loss[row] += (i ? A(1) - share : share) * (coefficient ? coefficient[i] : A(1)) * term;
    }
  }
};

template <class A>
ExpertForwardResult forward(LTK_EXPERT_CROSS_ENTROPY_PARAMETERS) {
  const ExpertRows experts(logits);
  const int64_t count = experts.experts, rows = experts.rows, classes = experts.classes;
  const auto options = at::TensorOptions().dtype(dtype_of<A>());
  Tensor loss = at::empty({count, rows}, options), rest = at::empty({count, 2, rows}, options);
  Tensor ensemble_loss = at::empty({with_ensemble ? rows : 0}, options);
  Tensor prediction = at::empty({with_ensemble ? rows : 0}, options.dtype(at::kLong));
  std::optional<ExpertGradient> gradient;
  if (with_grad) gradient.emplace(logits, experts);
  const auto result = [&] {
    return std::make_tuple(loss, rest, ensemble_loss, prediction,
                           with_grad ? gradient->finished() : at::empty({0}, logits[0].options()));
  };
  if (rows == 0) return result();

  Prepared<A> prepared(experts.each[0].unsqueeze(2), target, mixed_target, mix_lambda, weight, std::nullopt,
                       class_scale, class_margin, learned_scale, coefficient, scale, margin, angular, ignore_index,
                       label_smoothing);
  const Tensor unused = at::empty({rows}, options);
  std::vector<Call<A>> calls(count, prepared.call);
  for (int64_t e = 0; e < count; ++e) {
    Call<A>& call = calls[e];
    call.x = experts.x[e], call.x_n = experts.x_stride[e];
    call.class_bias = prepared.pointer(bias_of(e, class_bias, log_prior, taus[e]));
    call.loss = loss.mutable_data_ptr<A>() + e * rows;
    call.lse = unused.mutable_data_ptr<A>();
    call.peak = rest.mutable_data_ptr<A>() + 2 * e * rows;
    call.total = call.peak + rows;
    if (!with_grad) continue;
    call.grad = gradient->out[e], call.grad_n = gradient->out_stride[e], call.grad_c = 1, call.grad_k = 0;
    call.stream = gradient->written.nbytes() >= kStream;
  }
  std::optional<Ensemble<A>> ensemble;
  if (with_ensemble)
    ensemble.emplace(Ensemble<A>{{experts.each, std::nullopt, std::nullopt, learned_scale,
                                  std::vector<double>(count, 1.0 / static_cast<double>(count)), scale, 1},
                                 calls[0],
                                 prepared.pointer(ensemble_coefficient),
                                 ensemble_loss.mutable_data_ptr<A>(),
                                 prediction.mutable_data_ptr<int64_t>()});

  if (is_split(prepared)) {
    for (const Call<A>& call : calls) {
      prepared.call = call;
      run_forward(prepared);
    }
    if (with_ensemble) ensemble->fusion.run(*ensemble);
    return result();
  }
  const int64_t bytes = count * classes * static_cast<int64_t>(logits[0].element_size());
  const int64_t together = with_ensemble ? std::max<int64_t>(1, kChunk / bytes) : rows;
  at::parallel_for(0, rows, grain(count * classes), [&](int64_t begin, int64_t end) {
    A* buffer = scratch<A>(2 * (classes + kPadding));
    Candidate<A> best;
    for (int64_t first = begin; first < end; first += together) {
      const int64_t last = std::min(end, first + together);
      for (const Call<A>& call : calls) prepared.kernels->forward_rows(call, first, last, buffer);
      for (int64_t row = first; with_ensemble && row < last; ++row) ensemble->fusion.run_row(row, &best, *ensemble);
    }
  });
  return result();
}

}  // namespace

ExpertForwardResult expert_cross_entropy_fwd_cpu(LTK_EXPERT_CROSS_ENTROPY_PARAMETERS) {
  const auto run = logits[0].scalar_type() == at::kDouble ? forward<double> : forward<float>;
  return run(logits, target, mixed_target, mix_lambda, weight, class_bias, class_scale, class_margin, learned_scale,
             log_prior, coefficient, ensemble_coefficient, taus, scale, margin, angular, ignore_index, label_smoothing,
             with_ensemble, with_grad);
}

}  // namespace ltk
