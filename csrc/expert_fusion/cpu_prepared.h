// A call of the experts' fusion on the CPU: layouts and threads; expert_cross_entropy calls it too.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/cpu/experts.h"
#include "../common/cpu/host.h"
#include "arguments.h"
#include "cpu_call.h"

namespace ltk {

template <class A>
struct PreparedFusion : KeptTensors {
  ExpertRows rows;
  std::vector<A> weights;
  FusionCall<A> call = {};
  const FusionKernels<A>* kernels;
  int64_t k;

  PreparedFusion(const FusionArguments& a, int64_t k)
      : rows(a.logits), weights(a.weights.begin(), a.weights.end()), k(k) {
    if (const A* learned = this->template pointer<A>(a.expert_weight))
      for (int64_t e = 0; e < rows.experts; ++e) weights[e] *= learned[e];
    call.experts = rows.experts, call.classes = rows.classes;
    call.x = rows.x.data(), call.x_stride = rows.x_stride.data();
    call.weights = weights.data();
    call.shift = this->template pointer<A>(a.class_shift);
    call.scale = static_cast<A>(a.scale);
    if (a.learned_scale.has_value()) call.scale *= static_cast<A>(a.learned_scale->item<double>());
    kernels = &kernels_of<A>(LTK_TABLES_HERE(expert_fusion), a.logits[0].scalar_type());
  }

  // Calls use(row, log-sum-exp, candidates in order) for every row, on any thread.
  template <class Use>
  void run(const Use& use) const {
    const int64_t classes = rows.classes;
    const bool is_cut = rows.rows < kFewRows && classes > kPart;
    if (!is_cut) {
      at::parallel_for(0, rows.rows, grain(rows.experts * classes), [&](int64_t begin, int64_t end) {
        std::vector<Candidate<A>> items(k);
        for (int64_t row = begin; row < end; ++row) run_row(row, items.data(), use);
      });
      return;
    }
    const int64_t parts = ceil_div(classes, kPart), most = std::min(k, kPart);
    std::vector<Candidate<A>> items(rows.rows * parts * most);
    std::vector<Top<A>> tops(rows.rows * parts);
    std::vector<LogSum> sums(rows.rows * parts);
    const auto last = [&](int64_t i) { return std::min(classes, (i % parts + 1) * kPart); };
    at::parallel_for(0, rows.rows * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        tops[i] = {&items[i * most], std::min(k, last(i) - i % parts * kPart), 0};
        sums[i] = kernels->fuse_part(call, i / parts, i % parts * kPart, last(i), tops[i]);
      }
    });
    std::vector<Candidate<A>> best(k);
    for (int64_t row = 0; row < rows.rows; ++row) {
      Top<A> top = {best.data(), k, 0};
      LogSum& sum = sums[row * parts];
      for (int64_t i = row * parts; i < (row + 1) * parts; ++i) {
        if (i > row * parts) add(sum, sums[i]);
        for (int64_t j = 0; j < tops[i].size; ++j) offer(top, tops[i].items[j]);
      }
      sort(top);
      use(row, sum, top.items);
    }
    if (call.log_probs == nullptr) return;
    at::parallel_for(0, rows.rows * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        kernels->subtract_log_sum(call, i / parts, i % parts * kPart, last(i), sums[i / parts * parts]);
    });
  }

  template <class Use>
  void run_row(int64_t row, Candidate<A>* items, const Use& use) const {
    Top<A> top = {items, k, 0};
    const LogSum sum = kernels->fuse_part(call, row, 0, rows.classes, top);
    sort(top);
    use(row, sum, top.items);
    if (call.log_probs) kernels->subtract_log_sum(call, row, 0, rows.classes, sum);
  }
};

}  // namespace ltk
