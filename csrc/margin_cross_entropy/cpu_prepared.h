// A call of the rows kernel on the CPU: checks, layouts and threads; expert_cross_entropy calls it too.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/add.h>
#include <ATen/ops/mul.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <vector>

#include "../common/cpu/host.h"
#include "../common/cpu/memory.h"
#include "cpu_call.h"
#include "prepared.h"

namespace ltk {

constexpr int64_t kPanelScratch = 262144;  // bytes of a panel that stay in a core's own cache
constexpr int64_t kRecent = 4 << 20;       // bytes of cut rows that stay in the last cache from sums to gradient

template <class A>
struct Prepared : PreparedRows<A, Call<A>> {
  using PreparedRows<A, Call<A>>::call;
  using PreparedRows<A, Call<A>>::layout;
  const Kernels<A>* kernels;
  int64_t itemsize;  // of a logit

  Prepared(const Tensor& input, const RowOptions& o) : PreparedRows<A, Call<A>>(input, o) {
    auto pointer = [&](const OptionalTensor& t) { return this->template pointer<A>(t); };
    call.n = layout.n;
    itemsize = input.element_size();
    kernels = &kernels_of<A>(LTK_TABLES_HERE(margin_cross_entropy), input.scalar_type());
    const A learned = o.learned_scale.has_value() ? static_cast<A>(o.learned_scale->item<double>()) : A(1);
    call.scale = static_cast<A>(o.scale) * learned;
    call.margin = static_cast<A>(o.margin);
    double total = call.smooth_weight ? 0.0 : static_cast<double>(call.classes);
    for (int64_t c = 0; call.smooth_weight && c < call.classes; ++c)
      total += call.smooth_weight[c];  // in a fixed order
    call.smooth_total = static_cast<A>(total);
    if (o.class_scale.has_value()) {
      call.cosine_scale = pointer(o.class_scale);
      call.class_scale = pointer(at::mul(*o.class_scale, static_cast<double>(call.scale)));
    }
    if (o.class_margin.has_value()) call.class_margin = pointer(at::add(*o.class_margin, o.margin));
    if (o.soft()) this->set_probabilities(o.target.to(dtype_of<A>()));
    check_classes(call.target, "target");
    check_classes(call.mixed, "mixed_target");
  }

 private:
  void check_classes(const int64_t* target, const char* name) const {
    for (int64_t row = 0; target && row < layout.rows; ++row) {
      const int64_t value = target[row];
      TORCH_CHECK_INDEX((value >= 0 && value < call.classes) || value == call.ignore_index, name, ": row ", row,
                        " has class ", value, ", expected 0 <= class < ", call.classes,
                        " or ignore_index=", call.ignore_index);
    }
  }
};

// Returns whether rows are cut into parts of columns.
template <class A>
bool is_cut(const Prepared<A>& prepared) {
  const int64_t largest = prepared.layout.rows < kFewRows ? kPart : kLargestRow / static_cast<int64_t>(sizeof(A));
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
    const int64_t panels = ceil_div(call.k, width);
    at::parallel_for(0, call.n * panels, grain(classes * width), [&](int64_t begin, int64_t end) {
      A* buffer = scratch<A>(classes * width);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % panels * width;
        kernels.forward_panel(call, i / panels, first, std::min(width, call.k - first), buffer);
      }
    });
  } else if (!is_cut(prepared)) {
    at::parallel_for(0, rows, grain(classes), [&](int64_t begin, int64_t end) {
      kernels.forward_rows(call, begin, end, scratch<A>(2 * (classes + kPadding)));
    });
  } else {
    const int64_t parts = ceil_div(classes, kPart);
    const int64_t together = std::max<int64_t>(1, kRecent / (classes * prepared.itemsize));
    auto last = [&](int64_t part) { return std::min(classes, (part + 1) * kPart); };
    std::vector<PartSums<A>> sums(together * parts);
    std::vector<RowGradient<A>> gradients(together);
    for (int64_t first = 0; first < rows; first += together) {
      const int64_t count = std::min(together, rows - first);
      at::parallel_for(0, count * parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          sums[i] = kernels.sum_part(call, first + i / parts, i % parts * kPart, last(i % parts),
                                     scratch<A>(kPart + kPadding));
      });
      for (int64_t i = 0; i < count; ++i)
        gradients[i] = kernels.finish_row(call, first + i, merge(&sums[i * parts], parts));
      if (call.grad == nullptr) continue;
      at::parallel_for(0, count * parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          kernels.write_part_gradient(call, gradients[i / parts], first + i / parts, i % parts * kPart, last(i % parts),
                                      nullptr, nullptr);
      });
    }
  }
}

// Allocates the outputs and runs forward.
template <class A>
ForwardResult run_forward(Prepared<A>& prepared, const Tensor& input, bool with_prediction, bool with_grad,
                          const OptionalTensor& out) {
  const auto run = [&](const Tensor& grad) {
    prepared.call.stream = grad.defined() && !out.has_value() && grad.nbytes() >= kStream;  // `out` is about to be read
    run_forward(prepared);
  };
  return prepared.forward(input, with_prediction, with_grad, out, &MemoryPool::empty_like, run);
}

// Returns the gradients of one call, as the operator margin_cross_entropy_bwd does.
std::vector<Tensor> run_backward(const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& rest,
                                 const Tensor& input, const RowOptions& o, const c10::List<bool>& needs,
                                 const OptionalTensor& out);

// gradient *= factor (0-dim); memory is not touched where that is 1.
void scale_gradient_(Tensor& gradient, const Tensor& factor);

}  // namespace ltk
