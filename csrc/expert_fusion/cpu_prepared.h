// A call of the experts' fusion on the CPU: layouts, and how rows are cut.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "../cpu_experts.h"
#include "../cpu_host.h"
#include "cpu_call.h"

namespace ltk {

template <class A>
struct PreparedFusion {
  ExpertRows rows;
  std::vector<A> weights;
  at::Tensor shift;
  FusionCall<A> call = {};
  const FusionKernels<A>* kernels;
  int64_t k;

  PreparedFusion(at::TensorList logits, const std::optional<at::Tensor>& expert_weight,
                 const std::optional<at::Tensor>& class_shift, const std::optional<at::Tensor>& learned_scale,
                 at::ArrayRef<double> fixed_weights, double scale, int64_t k)
      : rows(logits), weights(fixed_weights.begin(), fixed_weights.end()), k(k) {
    if (expert_weight.has_value()) {
      const at::Tensor learned = expert_weight->to(dtype_of<A>()).contiguous();
      for (int64_t e = 0; e < rows.experts; ++e) weights[e] *= learned.const_data_ptr<A>()[e];
    }
    if (class_shift.has_value()) shift = class_shift->to(dtype_of<A>()).contiguous();
    call.experts = rows.experts, call.classes = rows.classes;
    call.x = rows.x.data(), call.x_stride = rows.x_stride.data();
    call.weights = weights.data();
    call.shift = shift.defined() ? shift.const_data_ptr<A>() : nullptr;
    call.scale = static_cast<A>(scale);
    if (learned_scale.has_value()) call.scale *= static_cast<A>(learned_scale->item<double>());
    kernels = &kernels_of<A>(LTK_TABLES_HERE(expert_fusion), logits[0].scalar_type());
  }

  // Calls use(row, log-sum-exp, candidates in order) for every row, on any thread.
  template <class Use>
  void run(const Use& use) const {
    const int64_t classes = rows.classes;
    const bool split = rows.rows < kFewRows && classes > kRange;
    if (!split) {
      at::parallel_for(0, rows.rows, grain(rows.experts * classes), [&](int64_t begin, int64_t end) {
        std::vector<Candidate<A>> items(k);
        for (int64_t row = begin; row < end; ++row) run_row(row, items.data(), use);
      });
      return;
    }
    const int64_t ranges = (classes + kRange - 1) / kRange, most = std::min(k, kRange);
    std::vector<Candidate<A>> items(rows.rows * ranges * most);
    std::vector<Top<A>> tops(rows.rows * ranges);
    std::vector<LogSum> sums(rows.rows * ranges);
    const auto last = [&](int64_t i) { return std::min(classes, (i % ranges + 1) * kRange); };
    at::parallel_for(0, rows.rows * ranges, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        tops[i] = {&items[i * most], std::min(k, last(i) - i % ranges * kRange), 0};
        sums[i] = kernels->range(call, i / ranges, i % ranges * kRange, last(i), tops[i]);
      }
    });
    std::vector<Candidate<A>> best(k);
    for (int64_t row = 0; row < rows.rows; ++row) {
      Top<A> top = {best.data(), k, 0};
      LogSum& sum = sums[row * ranges];
      for (int64_t i = row * ranges; i < (row + 1) * ranges; ++i) {
        if (i > row * ranges) add(sum, sums[i]);
        for (int64_t j = 0; j < tops[i].size; ++j) offer(top, tops[i].items[j]);
      }
      sort(top);
      use(row, sum, top.items);
    }
    if (call.log_probs == nullptr) return;
    at::parallel_for(0, rows.rows * ranges, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        kernels->subtract(call, i / ranges, i % ranges * kRange, last(i), sums[i / ranges * ranges]);
    });
  }

  template <class Use>
  void run_row(int64_t row, Candidate<A>* items, const Use& use) const {
    Top<A> top = {items, k, 0};
    const LogSum sum = kernels->range(call, row, 0, rows.classes, top);
    sort(top);
    use(row, sum, top.items);
    if (call.log_probs) kernels->subtract(call, row, 0, rows.classes, sum);
  }
};

}  // namespace ltk
