// The divergences between experts on the CPU; the arithmetic is in cpu_kernels.h.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/cpu/experts.h"
#include "../common/cpu/host.h"
#include "../common/registration.h"
#include "cpu_call.h"
#include "schema.h"

namespace ltk {
namespace {

template <class A>
struct Prepared : KeptTensors {
  ExpertRows rows;
  DivergenceCall<A> call = {};
  const DivergenceKernels<A>* kernels;

  Prepared(at::TensorList logits, const OptionalTensor& temperature, bool pairwise) : rows(logits) {
    call.experts = rows.experts, call.rows = rows.rows, call.classes = rows.classes;
    call.x = rows.x.data(), call.x_stride = rows.x_stride.data();
    call.temperature = this->template pointer<A>(temperature);
    call.pairwise = pairwise;
    kernels = &kernels_of<A>(LTK_TABLES_HERE(expert_divergence), logits[0].scalar_type());
  }
};

// value [experts, rows] and what is saved of one row.
template <class A>
void finish(const DivergenceCall<A>& call, int64_t row, const A* peaks, const ExpertSums* sums, A* value) {
  const int64_t experts = call.experts, rows = call.rows;
  double logarithms = 0;
  for (int64_t e = 0; e < experts; ++e) logarithms += std::log(sums[e].mass);
  A* saved = call.saved + row;
  for (int64_t e = 0; e < experts; ++e) {
    const double own = std::log(sums[e].mass);
    const double mass = call.pairwise ? sums[e].mass : sums[experts].mass, expectation = sums[e].weighted / mass;
    const double rest = call.pairwise ? logarithms - static_cast<double>(experts) * own : own - std::log(mass);
    value[e * rows + row] = static_cast<A>(expectation + rest);
    saved[e * rows] = peaks[e];
    saved[(experts + e) * rows] = static_cast<A>(sums[e].mass);
    saved[(2 * experts + e) * rows] = static_cast<A>(expectation);
  }
  saved[3 * experts * rows] = call.pairwise ? A(0) : peaks[experts];
  saved[(3 * experts + 1) * rows] = call.pairwise ? A(0) : static_cast<A>(sums[experts].mass);
}

template <class A>
std::tuple<Tensor, Tensor> forward(at::TensorList logits, const OptionalTensor& temperature, bool pairwise) {
  Prepared<A> prepared(logits, temperature, pairwise);
  DivergenceCall<A>& call = prepared.call;
  const DivergenceKernels<A>& kernels = *prepared.kernels;
  const int64_t experts = call.experts, rows = call.rows, classes = call.classes, count = experts + 1;
  const auto options = at::TensorOptions().dtype(dtype_of<A>());
  Tensor value = at::empty({experts, rows}, options), saved = at::empty({3 * experts + 2, rows}, options);
  if (rows == 0) return {value, saved};
  A* values = value.mutable_data_ptr<A>();
  call.saved = saved.mutable_data_ptr<A>();
  if (rows >= kFewRows || classes <= kPart) {
    at::parallel_for(0, rows, grain(experts * classes), [&](int64_t begin, int64_t end) {
      std::vector<A> peaks(count);
      std::vector<ExpertSums> sums(count);
      A* buffer = scratch<A>(divergence_scratch(experts));
      for (int64_t row = begin; row < end; ++row) {
        kernels.peaks(call, row, 0, classes, peaks.data());
        kernels.sums(call, row, 0, classes, peaks.data(), sums.data(), buffer);
        finish(call, row, peaks.data(), sums.data(), values);
      }
    });
    return {value, saved};
  }
  const int64_t parts = ceil_div(classes, kPart);
  const auto last = [&](int64_t i) { return std::min(classes, (i % parts + 1) * kPart); };
  std::vector<A> peaks(rows * parts * count);
  std::vector<ExpertSums> sums(rows * parts * count);
  at::parallel_for(0, rows * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels.peaks(call, i / parts, i % parts * kPart, last(i), &peaks[i * count]);
  });
  for (int64_t i = 0; i < rows * parts * count; ++i) {  // merged into the maxima of the row's first part
    A& all = peaks[i / (parts * count) * parts * count + i % count];
    all = std::max(all, peaks[i]);
  }
  at::parallel_for(0, rows * parts, 1, [&](int64_t begin, int64_t end) {
    A* buffer = scratch<A>(divergence_scratch(experts));
    for (int64_t i = begin; i < end; ++i)
      kernels.sums(call, i / parts, i % parts * kPart, last(i), &peaks[i / parts * parts * count], &sums[i * count],
                   buffer);
  });
  for (int64_t row = 0; row < rows; ++row) {
    ExpertSums* all = &sums[row * parts * count];
    for (int64_t i = count; i < parts * count; ++i)
      all[i % count].mass += all[i].mass, all[i % count].weighted += all[i].weighted;
    finish(call, row, &peaks[row * parts * count], all, values);
  }
  return {value, saved};
}

template <class A>
Tensor backward(const Tensor& grad, const Tensor& saved, at::TensorList logits, const OptionalTensor& temperature,
                bool pairwise, bool detach) {
  Prepared<A> prepared(logits, temperature, pairwise);
  DivergenceCall<A>& call = prepared.call;
  ExpertGradient gradient(logits, prepared.rows);
  if (call.rows == 0) return gradient.result;
  const Tensor upstream = grad.to(dtype_of<A>()), kept = saved.contiguous();
  call.detach = detach;
  call.saved = const_cast<A*>(kept.const_data_ptr<A>());
  call.grad = upstream.const_data_ptr<A>();
  call.grad_e = upstream.stride(0), call.grad_n = upstream.stride(1);
  call.out = gradient.out.data(), call.out_stride = gradient.out_stride.data();
  call.stream = gradient.written.nbytes() >= kStream;
  const int64_t parts = ceil_div(call.classes, kPart);
  at::parallel_for(0, call.rows * parts, grain(call.experts * std::min(call.classes, kPart)),
                   [&](int64_t begin, int64_t end) {
                     prepared.kernels->gradient(call, begin, end, kPart, scratch<A>(divergence_scratch(call.experts)));
                   });
  return gradient.finish();
}

std::tuple<Tensor, Tensor> expert_divergence_fwd(at::TensorList logits, const OptionalTensor& temperature,
                                                 bool pairwise) {
  const auto run = logits[0].scalar_type() == at::kDouble ? forward<double> : forward<float>;
  return run(logits, temperature, pairwise);
}

Tensor expert_divergence_bwd(const Tensor& grad, const Tensor& saved, at::TensorList logits,
                             const OptionalTensor& temperature, bool pairwise, bool detach) {
  const auto run = logits[0].scalar_type() == at::kDouble ? backward<double> : backward<float>;
  return run(grad, saved, logits, temperature, pairwise, detach);
}

}  // namespace
}  // namespace ltk

TORCH_LIBRARY_IMPL(lt_kernels_native, CPU, m) {
  m.impl("expert_divergence_fwd", &ltk::expert_divergence_fwd);
  m.impl("expert_divergence_bwd", &ltk::expert_divergence_bwd);
}
