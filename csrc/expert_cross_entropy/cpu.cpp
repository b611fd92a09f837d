// The experts' cross-entropy on the CPU: the rows kernel for every expert of a few samples, then the ensemble's
// cross-entropy from the same rows while they are in a core's cache.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "../common/cpu/experts.h"
#include "../expert_fusion/cpu_prepared.h"
#include "../margin_cross_entropy/cpu_prepared.h"
#include "cpu_forward.h"
#include "schema.h"

namespace ltk {
namespace {

constexpr int64_t kChunk = 262144;  // bytes of logits that are visited twice in a core's own cache

// Returns what an expert adds to its logits, [C], or nothing.
OptionalTensor add_prior(int64_t expert, const OptionalTensor& class_bias, const OptionalTensor& log_prior,
                         double tau) {
  OptionalTensor bias = class_bias;
  if (bias.has_value() && bias->dim() == 2) bias = bias->select(0, expert);
  if (!log_prior.has_value() || tau == 0) return bias;
  const Tensor prior = log_prior->mul(tau);
  return bias.has_value() ? prior.add(*bias) : prior;
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
        term = static_cast<A>(std::log(sum.total) - (fusion.kernels->fuse_column(fusion.call, row, column) - sum.peak));
      loss[row] += (i ? A(1) - share : share) * (coefficient ? coefficient[i] : A(1)) * term;
    }
  }
};

template <class A>
ForwardResult forward(at::TensorList logits, const RowOptions& o, const OptionalTensor& log_prior,
                      const OptionalTensor& ensemble_coefficient, at::ArrayRef<double> taus, bool with_ensemble,
                      bool with_grad) {
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
                           with_grad ? gradient->finish() : at::empty({0}, logits[0].options()));
  };
  if (rows == 0) return result();

  RowOptions shared = o;
  shared.class_bias = std::nullopt;
  Prepared<A> prepared(experts.each[0].unsqueeze(2), shared);
  const Tensor unused = at::empty({rows}, options);
  std::vector<Call<A>> calls(count, prepared.call);
  for (int64_t e = 0; e < count; ++e) {
    Call<A>& call = calls[e];
    call.x = experts.x[e], call.x_n = experts.x_stride[e];
    call.class_bias = prepared.template pointer<A>(add_prior(e, o.class_bias, log_prior, taus[e]));
    call.loss = loss.mutable_data_ptr<A>() + e * rows;
    call.lse = unused.mutable_data_ptr<A>();
    call.peak = rest.mutable_data_ptr<A>() + 2 * e * rows;
    call.total = call.peak + rows;
    if (!with_grad) continue;
    call.grad = gradient->out[e], call.grad_n = gradient->out_stride[e], call.grad_c = 1, call.grad_k = 0;
    call.stream = gradient->written.nbytes() >= kStream;
  }
  std::optional<Ensemble<A>> ensemble;
  const std::vector<double> weights(count, 1.0 / static_cast<double>(count));
  if (with_ensemble)
    ensemble.emplace(Ensemble<A>{{{experts.each, std::nullopt, std::nullopt, o.learned_scale, weights, o.scale}, 1},
                                 calls[0],
                                 prepared.template pointer<A>(ensemble_coefficient),
                                 ensemble_loss.mutable_data_ptr<A>(),
                                 prediction.mutable_data_ptr<int64_t>()});

  if (is_cut(prepared)) {
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

// Returns loss, rest, the ensemble's loss and prediction, and the gradient of the logits.
ForwardResult expert_cross_entropy_fwd(at::TensorList logits LTK_ROW_OPTIONS(LTK_PARAMETER),
                                       const OptionalTensor& log_prior, const OptionalTensor& ensemble_coefficient,
                                       at::ArrayRef<double> taus, bool with_ensemble, bool with_grad) {
  return run_experts_forward(logits, {LTK_ROW_OPTIONS(LTK_VALUE)}, log_prior, ensemble_coefficient, taus, with_ensemble,
                             with_grad);
}

}  // namespace

ForwardResult run_experts_forward(at::TensorList logits, const RowOptions& o, const OptionalTensor& log_prior,
                                  const OptionalTensor& ensemble_coefficient, at::ArrayRef<double> taus,
                                  bool with_ensemble, bool with_grad) {
  const auto run = logits[0].scalar_type() == at::kDouble ? forward<double> : forward<float>;
  return run(logits, o, log_prior, ensemble_coefficient, taus, with_ensemble, with_grad);
}

}  // namespace ltk

TORCH_LIBRARY_IMPL(lt_kernels_native, CPU, m) { m.impl("expert_cross_entropy_fwd", &ltk::expert_cross_entropy_fwd); }
