// A call of the rows kernel on the CPU: checks, layouts and threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <vector>

#include "../cpu_host.h"
#include "arguments.h"
#include "cpu_call.h"
#include "layout.h"

namespace ltk {

constexpr int64_t kPanelScratch = 262144;  // bytes of a panel: what stays in a core's own cache

inline void check_targets(const Tensor& target, int64_t classes, int64_t ignore_index, const char* name) {
  const int64_t* values = target.const_data_ptr<int64_t>();
  const int64_t rows = target.numel();
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t value = values[row];
    TORCH_CHECK_INDEX((value >= 0 && value < classes) || value == ignore_index, name, ": row ", row, " has class ",
                      value, ", expected 0 <= class < ", classes, " or ignore_index=", ignore_index);
  }
}

// Owns what a Call points to. Layout: rows (columns next to each other) or a panel (positions next to each other).
template <class A>
struct Prepared {
  Layout layout;
  Call<A> call = {};
  const Kernels<A>* kernels;
  std::vector<Tensor> kept;  // keeps converted tensors alive

  Tensor keep(Tensor t) {
    kept.push_back(t);
    return t;
  }

  const A* pointer(const OptionalTensor& t) {
    if (!t.has_value()) return nullptr;
    return keep(t->to(dtype_of<A>()).contiguous()).template const_data_ptr<A>();
  }

  explicit Prepared(LTK_MARGIN_CROSS_ENTROPY_PARAMETERS) : layout(input) {
    call.classes = layout.classes;
    call.n = layout.n;
    call.k = layout.k;
    call.x = layout.input.const_data_ptr();
    layout.strides(layout.input, &call.x_n, &call.x_c, &call.x_k);
    kernels = &kernels_of<A>(LTK_TABLES_HERE(margin_cross_entropy), input.scalar_type());

    const A learned = learned_scale.has_value() ? static_cast<A>(learned_scale->item<double>()) : A(1);
    call.scale = static_cast<A>(scale) * learned;
    call.margin = static_cast<A>(margin);
    call.smoothing = static_cast<A>(label_smoothing);
    call.angular = angular;
    call.ignore_index = ignore_index;
    call.class_bias = pointer(class_bias);
    call.weight = pointer(weight);
    double total_weight = weight.has_value() ? 0.0 : static_cast<double>(call.classes);
    for (int64_t c = 0; call.weight && c < call.classes; ++c) total_weight += call.weight[c];  // in order: see above
    call.total_weight = static_cast<A>(total_weight);
    if (class_scale.has_value()) {
      call.cosine_scale = pointer(class_scale);
      call.class_scale = pointer(at::mul(*class_scale, static_cast<double>(call.scale)));
    }
    if (class_margin.has_value()) call.class_margin = pointer(at::add(*class_margin, margin));
    call.coefficient[0] = call.coefficient[1] = A(1);
    if (coefficient.has_value()) {
      const A* values = pointer(coefficient);
      call.coefficient[0] = values[0];
      call.coefficient[1] = values[coefficient->numel() - 1];
    }
    if (target.is_floating_point()) {
      Tensor q = target.to(dtype_of<A>());
      if (!layout.fits(q)) q = layout.fitting(q).copy_(q);
      keep(q);
      call.q = q.const_data_ptr<A>();
      layout.strides(q, &call.q_n, &call.q_c, &call.q_k);
    } else {
      const Tensor first = keep(target.contiguous());
      check_targets(first, call.classes, ignore_index, "target");
      call.target = first.const_data_ptr<int64_t>();
      if (mixed_target.has_value()) {
        const Tensor second = keep(mixed_target->contiguous());
        check_targets(second, call.classes, ignore_index, "mixed_target");
        call.mixed = second.const_data_ptr<int64_t>();
        call.share = pointer(mix_lambda);
        call.share_stride = mix_lambda->dim() == 0 ? 0 : 1;
      }
    }
  }

  // The tensor that kernels write to in place of `wanted`; copy back with `wanted.copy_(...)` where it is another.
  Tensor grad_target(const Tensor& wanted) {
    Tensor out = keep(layout.fitting(wanted));
    call.grad = out.mutable_data_ptr();
    layout.strides(out, &call.grad_n, &call.grad_c, &call.grad_k);
    return out;
  }
};

// Whether rows are cut into ranges of columns.
template <class A>
bool is_split(const Prepared<A>& prepared) {
  const int64_t largest = prepared.layout.rows < kFewRows ? kRange : kLargestRow / static_cast<int64_t>(sizeof(A));
  return prepared.layout.is_rows && prepared.call.classes > largest;
}

template <class A>
void run_forward(Prepared<A>& prepared) {
  const Call<A>& call = prepared.call;
  const Kernels<A>& kernels = *prepared.kernels;
  const int64_t classes = call.classes, rows = prepared.layout.rows;
  if (!prepared.layout.is_rows) {
    const int64_t most = kPanelScratch / static_cast<int64_t>(sizeof(A)) / classes;
    const int64_t width = std::clamp<int64_t>(most / kPadding * kPadding, kPadding, kPanel);
    const int64_t panels = (call.k + width - 1) / width;
    at::parallel_for(0, call.n * panels, grain(classes * width), [&](int64_t begin, int64_t end) {
      A* buffer = scratch<A>(classes * width);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % panels * width;
        kernels.forward_panel(call, i / panels, first, std::min(width, call.k - first), buffer);
      }
    });
  } else if (!is_split(prepared)) {
    at::parallel_for(0, rows, grain(classes), [&](int64_t begin, int64_t end) {
      kernels.forward_rows(call, begin, end, scratch<A>(2 * (classes + kPadding)));
    });
  } else {
    const int64_t ranges = (classes + kRange - 1) / kRange;
    auto last = [&](int64_t range) { return std::min(classes, (range + 1) * kRange); };
    std::vector<Partial<A>> parts(rows * ranges);
    std::vector<RowGradient<A>> gradients(rows);
    at::parallel_for(0, rows * ranges, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        parts[i] = kernels.range_statistics(call, i / ranges, i % ranges * kRange, last(i % ranges),
                                            scratch<A>(kRange + kPadding));
    });
    for (int64_t row = 0; row < rows; ++row)
      gradients[row] = kernels.finish(call, row, merge(&parts[row * ranges], ranges));
    if (call.grad == nullptr) return;
    at::parallel_for(0, rows * ranges, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        kernels.range_gradient(call, gradients[i / ranges], i / ranges, i % ranges * kRange, last(i % ranges), nullptr,
                               nullptr);
    });
  }
}

}  // namespace ltk
