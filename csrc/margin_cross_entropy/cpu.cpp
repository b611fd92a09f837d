// The rows kernel on the CPU: outputs and backward; the arithmetic is in cpu_kernels.h.
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "../common/registration.h"
#include "cpu_prepared.h"
#include "means.h"
#include "schema.h"

namespace ltk {
namespace {

constexpr int64_t kPositions = 2048;  // positions of a panel whose gradient is written together

template <class A>
ForwardResult forward(const Tensor& input, const RowOptions& o, bool with_prediction, bool with_grad,
                      const OptionalTensor& out) {
  if (out.has_value()) check_out(*out, input);
  Prepared<A> prepared(input, o);
  return run_forward(prepared, input, with_prediction, with_grad, out);
}

struct ColumnSums {  // over rows: du; du * x where the column is no target
  std::vector<double> du, dx;
};

template <class A>
void sweep_rows(Prepared<A>& prepared, const std::vector<RowGradient<A>>& gradients, ColumnSums* sums) {
  const Call<A>& call = prepared.call;
  const Kernels<A>& kernels = *prepared.kernels;
  const int64_t classes = call.classes, rows = prepared.layout.rows;
  const int64_t width = sums ? 512 : kPart, parts = ceil_div(classes, width);
  if (!sums) {
    at::parallel_for(0, rows * parts, grain(std::min(classes, width)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / parts, first = i % parts * width;
        kernels.write_part_gradient(call, gradients[row], row, first, std::min(classes, first + width), nullptr,
                                    nullptr);
      }
    });
    return;
  }
  at::parallel_for(0, parts, grain(rows * width), [&](int64_t begin, int64_t end) {
    A* du = scratch<A>(2 * width);
    A* dx = du + width;
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * width, last = std::min(classes, first + width);
      for (int64_t block = 0; block < rows; block += 64) {  // short sums in A, their total in double
        std::fill_n(du, 2 * width, A(0));
        for (int64_t row = block; row < std::min(rows, block + 64); ++row)
          kernels.write_part_gradient(call, gradients[row], row, first, last, du, dx);
        for (int64_t j = first; j < last; ++j) sums->du[j] += du[j - first], sums->dx[j] += dx[j - first];
      }
    }
  });
}

template <class A>
void sweep_panels(Prepared<A>& prepared, const std::vector<RowGradient<A>>& gradients, ColumnSums* sums) {
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
          prepared.kernels->write_class_gradient(call, rows, n, c, 0, k, &sums->du[c], &sums->dx[c]);
      });
      continue;
    }
    const int64_t blocks = ceil_div(k, kPositions);
    at::parallel_for(0, blocks, grain(call.classes * kPositions), [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block)
        for (int64_t c = 0; c < call.classes; ++c)
          prepared.kernels->write_class_gradient(call, rows, n, c, block * kPositions,
                                                 std::min(k, (block + 1) * kPositions), nullptr, nullptr);
    });
  }
}

// Adds up what each row's targets give their classes: values[i] of target i. Writes scale times the sums.
template <class A>
void sum_targets(const Call<A>& call, const std::vector<RowGradient<A>>& gradients, A (RowGradient<A>::*values)[2],
                 std::vector<double> total, A* out) {
  for (size_t row = 0; row < gradients.size(); ++row)
    for (int i = 0; i < (call.mixed ? 2 : call.target ? 1 : 0); ++i) {
      const int64_t column = (i ? call.mixed : call.target)[row];
      if (column != call.ignore_index) total[column] += (gradients[row].*values)[i];
    }
  for (int64_t c = 0; c < call.classes; ++c) out[c] = static_cast<A>(static_cast<double>(call.scale) * total[c]);
}

template <class A>
std::vector<Tensor> backward(const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& rest,
                             const Tensor& input, const RowOptions& o, const c10::List<bool>& needs,
                             const OptionalTensor& out) {
  if (out.has_value()) check_out(*out, input);
  Prepared<A> prepared(input, o);
  Call<A>& call = prepared.call;
  const int64_t rows = prepared.layout.rows;
  std::vector<Tensor> grads = empty_gradients(input, o.target, needs, out, dtype_of<A>(), &MemoryPool::empty_like);
  zero_options(grads, needs, call.classes);
  if (rows == 0) return grads;

  prepared.set_upstream(grad_loss, grad_lse, rest);
  std::vector<RowGradient<A>> gradients(rows);
  at::parallel_for(0, rows, o.soft() ? grain(call.classes) : 256, [&](int64_t begin, int64_t end) {
    prepared.kernels->compute_gradients(call, begin, end, gradients.data());
  });

  if (needs.get(kInput)) prepared.set_grad(out.has_value() ? *out : grads[kInput]);
  if (needs.get(kTarget)) prepared.set_grad_probabilities(grads[kTarget], dtype_of<A>());
  ColumnSums sums;
  const bool summed = needs.get(kClassBias) || needs.get(kClassScale) || needs.get(kLearnedScale);
  if (summed) sums = {std::vector<double>(call.classes), std::vector<double>(call.classes)};
  const auto sweep = prepared.layout.is_rows ? sweep_rows<A> : sweep_panels<A>;
  sweep(prepared, gradients, summed ? &sums : nullptr);
  prepared.copy_back();

  if (needs.get(kClassBias)) std::copy(sums.du.begin(), sums.du.end(), grads[kClassBias].mutable_data_ptr<A>());
  if (needs.get(kClassScale))
    sum_targets(call, gradients, &RowGradient<A>::dx, sums.dx, grads[kClassScale].mutable_data_ptr<A>());
  if (needs.get(kClassMargin))
    sum_targets(call, gradients, &RowGradient<A>::dm, std::vector<double>(call.classes),
                grads[kClassMargin].mutable_data_ptr<A>());
  if (needs.get(kLearnedScale)) {
    double total = 0;
    for (int64_t c = 0; c < call.classes; ++c) total += sums.dx[c] * (call.cosine_scale ? call.cosine_scale[c] : A(1));
    for (const RowGradient<A>& g : gradients) total += g.z;
    *grads[kLearnedScale].mutable_data_ptr<A>() = static_cast<A>(o.scale * total);
  }
  return grads;
}

ForwardResult margin_cross_entropy_fwd(const Tensor& input LTK_ROW_OPTIONS(LTK_PARAMETER), bool with_prediction,
                                       bool with_grad, const OptionalTensor& out) {
  const auto run = input.scalar_type() == at::kDouble ? forward<double> : forward<float>;
  return run(input, {LTK_ROW_OPTIONS(LTK_VALUE)}, with_prediction, with_grad, out);
}

std::vector<Tensor> margin_cross_entropy_bwd(const Tensor& grad_loss, const OptionalTensor& grad_lse,
                                             const Tensor& rest, const Tensor& input LTK_ROW_OPTIONS(LTK_PARAMETER),
                                             const c10::List<bool>& needs, const OptionalTensor& out) {
  return run_backward(grad_loss, grad_lse, rest, input, {LTK_ROW_OPTIONS(LTK_VALUE)}, needs, out);
}

}  // namespace

std::vector<Tensor> run_backward(const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& rest,
                                 const Tensor& input, const RowOptions& o, const c10::List<bool>& needs,
                                 const OptionalTensor& out) {
  const auto run = input.scalar_type() == at::kDouble ? backward<double> : backward<float>;
  return run(grad_loss, grad_lse, rest, input, o, needs, out);
}

Tensor mean_coefficient_of(const Tensor& target, const OptionalTensor& mixed_target, const OptionalTensor& weight,
                           int64_t ignore_index, int64_t classes, at::ScalarType dtype, double factor) {
  const auto of = [&](auto one) {
    using A = decltype(one);
    KeptTensors kept;
    const A* weights = kept.pointer<A>(weight);
    const Tensor result = at::empty({mixed_target.has_value() ? 2 : 1}, target.options().dtype(dtype));
    A* out = result.mutable_data_ptr<A>();
    for (const OptionalTensor& each : {OptionalTensor(target), mixed_target})
      if (each.has_value())
        *out++ = static_cast<A>(factor) *
                 mean_coefficient(kept.pointer<int64_t>(each), each->numel(), weights, ignore_index, classes);
    return result;
  };
  return dtype == at::kDouble ? of(1.0) : of(1.0f);
}

Tensor ordered_sum_of(const Tensor& values) {
  const Tensor whole = values.contiguous();
  Tensor total = at::empty({}, values.options());
  const auto sum = [&](auto one) {
    using A = decltype(one);
    *total.mutable_data_ptr<A>() = ordered_sum<A>(whole.const_data_ptr<A>(), whole.numel());
  };
  values.scalar_type() == at::kDouble ? sum(1.0) : sum(1.0f);
  return total;
}

void scale_gradient_(Tensor& gradient, const Tensor& factor) {
  if (factor.item<double>() != 1.0) gradient.mul_(factor);
}

}  // namespace ltk

TORCH_LIBRARY_IMPL(lt_kernels_native, CPU, m) {
  m.impl("margin_cross_entropy_fwd", &ltk::margin_cross_entropy_fwd);
  m.impl("margin_cross_entropy_bwd", &ltk::margin_cross_entropy_bwd);
  m.impl("mean_coefficient", &ltk::mean_coefficient_of);
  m.impl("ordered_sum", &ltk::ordered_sum_of);
  m.impl("scale_gradient_", &ltk::scale_gradient_);
}
