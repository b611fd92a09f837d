// The rows kernel on the CPU: outputs and backward; the arithmetic is in cpu_kernels.h.
#include "arguments.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "../cpu_host.h"
#include "../cpu_memory.h"
#include "cpu_prepared.h"

namespace ltk {
namespace {

constexpr int64_t kPositions = 2048;  // positions per piece of a panel's gradient

template <class A>
ForwardResult forward(LTK_MARGIN_CROSS_ENTROPY_PARAMETERS, bool with_prediction, bool with_grad,
                      const OptionalTensor& out) {
  if (out.has_value()) check_out(*out, input);
  Prepared<A> prepared(LTK_MARGIN_CROSS_ENTROPY_ARGUMENTS);
  Call<A>& call = prepared.call;
  const int64_t n = input.size(0), k = input.size(2);
  const auto options = input.options().dtype(dtype_of<A>());
  Tensor loss = at::empty({n, k}, options), lse = at::empty({n, k}, options), rest = at::empty({2, n, k}, options);
  Tensor prediction = at::empty({0}, input.options().dtype(at::kLong));
  if (with_prediction) prediction = at::empty({n, k}, prediction.options());
  const Tensor result = with_grad && !out.has_value() ? MemoryPool::empty_like(input) : at::empty({0}, input.options());
  const Tensor& grad = out.has_value() ? *out : result;
  if (prepared.layout.rows > 0) {
    call.loss = loss.mutable_data_ptr<A>();
    call.lse = lse.mutable_data_ptr<A>();
    call.peak = rest.mutable_data_ptr<A>();
    call.total = call.peak + prepared.layout.rows;
    call.prediction = with_prediction ? prediction.mutable_data_ptr<int64_t>() : nullptr;
    Tensor written;
    if (with_grad) {
      written = prepared.grad_target(grad);
      call.stream = !out.has_value() && written.nbytes() >= kStream;  // `out` is about to be read
    }
    run_forward(prepared);
    if (with_grad && !written.is_same(grad)) grad.copy_(written);
  }
  return {loss, lse, prediction, rest, result};
}

// Upstream gradient as values and stride: one for all rows, or one per row.
template <class A>
const A* upstream(Prepared<A>& prepared, const Tensor& grad, int64_t* stride) {
  const bool single = is_single(grad);
  *stride = single ? 0 : 1;
  return prepared.pointer(single && grad.dim() > 0 ? grad.select(0, 0).select(0, 0) : grad);
}

struct ColumnSums {  // over rows: du, dc * x
  std::vector<double> du, dx;
};

template <class A>
void row_sweep(Prepared<A>& prepared, const std::vector<RowGradient<A>>& gradients, ColumnSums* sums) {
  const Call<A>& call = prepared.call;
  const Kernels<A>& kernels = *prepared.kernels;
  const int64_t classes = call.classes, rows = prepared.layout.rows;
  const int64_t width = sums ? 512 : kRange, ranges = (classes + width - 1) / width;
  if (!sums) {
    at::parallel_for(0, rows * ranges, grain(std::min(classes, width)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / ranges, first = i % ranges * width;
        kernels.range_gradient(call, gradients[row], row, first, std::min(classes, first + width), nullptr, nullptr);
      }
    });
    return;
  }
  at::parallel_for(0, ranges, grain(rows * width), [&](int64_t begin, int64_t end) {
    A* du = scratch<A>(2 * width);
    A* dx = du + width;
    for (int64_t range = begin; range < end; ++range) {
      const int64_t first = range * width, last = std::min(classes, first + width);
      for (int64_t block = 0; block < rows; block += 64) {  // short sums in A, their total in double
        std::fill_n(du, 2 * width, A(0));
        for (int64_t row = block; row < std::min(rows, block + 64); ++row)
          kernels.range_gradient(call, gradients[row], row, first, last, du, dx);
        for (int64_t j = first; j < last; ++j) sums->du[j] += du[j - first], sums->dx[j] += dx[j - first];
      }
    }
  });
}

template <class A>
void panel_sweep(Prepared<A>& prepared, const std::vector<RowGradient<A>>& gradients, ColumnSums* sums) {
  const Call<A>& call = prepared.call;
  const int64_t k = call.k;
  using Int = typename RowGradients<A>::Int;
  std::vector<A> values(8 * k);
  std::vector<Int> columns(2 * k);
  RowGradients<A> rows;
  A* next = values.data();
  for (A** field :
       {&rows.peak, &rows.slope, &rows.smooth, &rows.soft, &rows.du[0], &rows.du[1], &rows.dc[0], &rows.dc[1]})
    *field = next, next += k;
  rows.column[0] = columns.data();
  rows.column[1] = columns.data() + k;
  for (int64_t n = 0; n < call.n; ++n) {
    at::parallel_for(0, k, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) rows.set(i, gradients[n * k + i]);
    });
    if (sums) {
      at::parallel_for(0, call.classes, grain(k), [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c)
          prepared.kernels->class_gradient(call, rows, n, c, 0, k, &sums->du[c], &sums->dx[c]);
      });
      continue;
    }
    const int64_t blocks = (k + kPositions - 1) / kPositions;
    at::parallel_for(0, blocks, grain(call.classes * kPositions), [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block)
        for (int64_t c = 0; c < call.classes; ++c)
          prepared.kernels->class_gradient(call, rows, n, c, block * kPositions, std::min(k, (block + 1) * kPositions),
                                           nullptr, nullptr);
    });
  }
}

template <class A>
std::vector<Tensor> backward(const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& rest,
                             LTK_MARGIN_CROSS_ENTROPY_PARAMETERS, c10::List<bool> needs, const OptionalTensor& out) {
  if (out.has_value()) check_out(*out, input);
  Prepared<A> prepared(LTK_MARGIN_CROSS_ENTROPY_ARGUMENTS);
  Call<A>& call = prepared.call;
  const auto options = input.options().dtype(dtype_of<A>());
  std::vector<Tensor> grads(needs.size());
  for (Tensor& grad : grads) grad = at::empty({0}, options);
  if (needs.get(kInput) && !out.has_value()) grads[kInput] = MemoryPool::empty_like(input);
  if (needs.get(kTarget)) grads[kTarget] = at::empty_like(target);
  for (const int i : {kClassBias, kClassScale, kClassMargin})
    if (needs.get(i)) grads[i] = at::zeros({call.classes}, options);
  if (needs.get(kLearnedScale)) grads[kLearnedScale] = at::zeros({}, options);
  if (prepared.layout.rows == 0) return grads;

  const Tensor saved = prepared.keep(rest.contiguous());
  call.peak = const_cast<A*>(saved.const_data_ptr<A>());
  call.total = call.peak + prepared.layout.rows;
  call.grad_loss = upstream(prepared, grad_loss, &call.grad_loss_stride);
  if (grad_lse.has_value()) call.grad_lse = upstream(prepared, *grad_lse, &call.grad_lse_stride);
  std::vector<RowGradient<A>> gradients(prepared.layout.rows);
  at::parallel_for(
      0, prepared.layout.rows, target.is_floating_point() ? grain(call.classes) : 256,
      [&](int64_t begin, int64_t end) { prepared.kernels->row_gradients(call, begin, end, gradients.data()); });

  Tensor written, written_q;
  const Tensor& grad_input = out.has_value() ? *out : grads[kInput];
  if (needs.get(kInput)) written = prepared.grad_target(grad_input);
  if (needs.get(kTarget)) {
    const bool same = target.scalar_type() == dtype_of<A>();
    written_q = prepared.keep(prepared.layout.fitting(same ? grads[kTarget] : at::empty_like(target, options)));
    call.grad_q = written_q.mutable_data_ptr<A>();
    prepared.layout.strides(written_q, &call.grad_q_n, &call.grad_q_c, &call.grad_q_k);
  }
  ColumnSums sums;
  const bool need_sums = needs.get(kClassBias) || needs.get(kClassScale) || needs.get(kLearnedScale);
  if (need_sums) sums = {std::vector<double>(call.classes), std::vector<double>(call.classes)};
  if (prepared.layout.is_rows) {
    row_sweep(prepared, gradients, need_sums ? &sums : nullptr);
  } else {
    panel_sweep(prepared, gradients, need_sums ? &sums : nullptr);
  }
  if (needs.get(kInput) && !written.is_same(grad_input)) grad_input.copy_(written);
  if (needs.get(kTarget) && !written_q.is_same(grads[kTarget])) grads[kTarget].copy_(written_q);

  if (needs.get(kClassBias)) std::copy(sums.du.begin(), sums.du.end(), grads[kClassBias].mutable_data_ptr<A>());
  if (needs.get(kClassScale)) {
    A* out = grads[kClassScale].mutable_data_ptr<A>();
    for (int64_t c = 0; c < call.classes; ++c) out[c] = static_cast<A>(static_cast<double>(call.scale) * sums.dx[c]);
  }
  if (needs.get(kClassMargin)) {
    std::vector<double> total(call.classes);
    for (int64_t row = 0; row < prepared.layout.rows; ++row)
      for (int i = 0; i < (call.mixed ? 2 : 1); ++i) {
        const int64_t column = (i ? call.mixed : call.target)[row];
        if (column != call.ignore_index) total[column] += gradients[row].dm[i];
      }
    A* out = grads[kClassMargin].mutable_data_ptr<A>();
    for (int64_t c = 0; c < call.classes; ++c) out[c] = static_cast<A>(static_cast<double>(call.scale) * total[c]);
  }
  if (needs.get(kLearnedScale)) {
    double total = 0;
    for (int64_t c = 0; c < call.classes; ++c) total += sums.dx[c] * (call.cosine_scale ? call.cosine_scale[c] : A(1));
    for (const RowGradient<A>& g : gradients) total += g.z;
    *grads[kLearnedScale].mutable_data_ptr<A>() = static_cast<A>(scale * total);
  }
  return grads;
}

}  // namespace

ForwardResult margin_cross_entropy_fwd_cpu(LTK_MARGIN_CROSS_ENTROPY_PARAMETERS, bool with_prediction, bool with_grad,
                                           const OptionalTensor& out) {
  return input.scalar_type() == at::kDouble
             ? forward<double>(LTK_MARGIN_CROSS_ENTROPY_ARGUMENTS, with_prediction, with_grad, out)
             : forward<float>(LTK_MARGIN_CROSS_ENTROPY_ARGUMENTS, with_prediction, with_grad, out);
}

std::vector<Tensor> margin_cross_entropy_bwd_cpu(const Tensor& grad_loss, const OptionalTensor& grad_lse,
                                                 const Tensor& rest, LTK_MARGIN_CROSS_ENTROPY_PARAMETERS,
                                                 c10::List<bool> needs, const OptionalTensor& out) {
  return input.scalar_type() == at::kDouble
             ? backward<double>(grad_loss, grad_lse, rest, LTK_MARGIN_CROSS_ENTROPY_ARGUMENTS, needs, out)
             : backward<float>(grad_loss, grad_lse, rest, LTK_MARGIN_CROSS_ENTROPY_ARGUMENTS, needs, out);
}

void scale_gradient_cpu(Tensor& gradient, const Tensor& factor) {
  if (factor.item<double>() != 1.0) gradient.mul_(factor);
}

}  // namespace ltk
