// The rows kernel on the CPU: checks, layouts and threads; the arithmetic is in cpu_kernels.h.
//
// How the work is cut depends on sizes alone, never on the number of threads, and sums over pieces are merged in a
// fixed order: results have the same bits for any thread count.
#include "arguments.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "../cpu_memory.h"
#include "cpu_call.h"
#include "layout.h"

namespace ltk {
namespace {

constexpr int64_t kRange = 16384;             // columns per piece where a row is split
constexpr int64_t kPositions = 2048;          // positions per piece of a panel's gradient
constexpr int64_t kPanelScratch = 262144;     // bytes of a panel: what stays in a core's own cache
constexpr size_t kStream = size_t(12) << 20;  // gradients of this size and more are written past the caches

enum class Capability { kDefault, kAvx2, kAvx512 };

Capability detect() {
  Capability best = Capability::kDefault;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) best = Capability::kAvx2;
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = Capability::kAvx512;
#endif
  const char* asked = std::getenv("LT_KERNELS_CPU_CAPABILITY");
  if (asked == nullptr || *asked == '\0') return best;
  Capability wanted = Capability::kDefault;
  if (std::strcmp(asked, "avx512") == 0) {
    wanted = Capability::kAvx512;
  } else if (std::strcmp(asked, "avx2") == 0) {
    wanted = Capability::kAvx2;
  } else {
    TORCH_CHECK_VALUE(std::strcmp(asked, "default") == 0, "LT_KERNELS_CPU_CAPABILITY: got '", asked,
                      "', expected 'default', 'avx2' or 'avx512'");
  }
  TORCH_CHECK(wanted <= best, "LT_KERNELS_CPU_CAPABILITY: this processor does not run '", asked, "'");
  return wanted;
}

Capability capability() {
  static const Capability found = detect();
  return found;
}

template <class A>
const Kernels<A>& kernels_for(at::ScalarType dtype);

template <>
const Kernels<double>& kernels_for<double>(at::ScalarType) {
#if defined(__x86_64__)
  if (capability() == Capability::kAvx512) return isa_avx512::kernels_double;
  if (capability() == Capability::kAvx2) return isa_avx2::kernels_double;
#endif
  return isa_default::kernels_double;
}

template <>
const Kernels<float>& kernels_for<float>(at::ScalarType dtype) {
  const Dtype index = dtype == at::kFloat ? kFloat : dtype == at::kBFloat16 ? kBFloat16 : kHalf;
#if defined(__x86_64__)
  if (capability() == Capability::kAvx512) return isa_avx512::kernels[index];
  if (capability() == Capability::kAvx2) return isa_avx2::kernels[index];
#endif
  return isa_default::kernels[index];
}

// A buffer of this thread that keeps its pages from call to call.
template <class A>
A* scratch(int64_t size) {
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<void, Free> buffer;
  thread_local size_t held = 0;
  const size_t bytes = static_cast<size_t>(size) * sizeof(A);
  if (bytes > held) {
    buffer.reset();
    held = 0;
    buffer.reset(::operator new(bytes, std::align_val_t(64)));
    held = bytes;
  }
  return static_cast<A*>(buffer.get());
}

int64_t grain(int64_t elements_per_item) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_per_item));
}

void check_targets(const Tensor& target, int64_t classes, int64_t ignore_index, const char* name) {
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

  static at::ScalarType dtype() { return sizeof(A) == 8 ? at::kDouble : at::kFloat; }

  const A* pointer(const OptionalTensor& t) {
    if (!t.has_value()) return nullptr;
    return keep(t->to(dtype()).contiguous()).template const_data_ptr<A>();
  }

  explicit Prepared(LTK_MARGIN_CROSS_ENTROPY_PARAMETERS) : layout(input) {
    call.classes = layout.classes;
    call.n = layout.n;
    call.k = layout.k;
    call.x = layout.input.const_data_ptr();
    layout.strides(layout.input, &call.x_n, &call.x_c, &call.x_k);
    kernels = &kernels_for<A>(input.scalar_type());

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
      Tensor q = target.to(dtype());
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

template <class A>
void run_forward(Prepared<A>& prepared) {
  const Call<A>& call = prepared.call;
  const Kernels<A>& kernels = *prepared.kernels;
  const int64_t classes = call.classes, rows = prepared.layout.rows;
  const int64_t largest_row = kLargestRow / static_cast<int64_t>(sizeof(A));
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
  } else if (classes <= (rows < 8 ? kRange : largest_row)) {
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

template <class A>
ForwardResult forward(LTK_MARGIN_CROSS_ENTROPY_PARAMETERS, bool with_prediction, bool with_grad,
                      const OptionalTensor& out) {
  if (out.has_value()) check_out(*out, input);
  Prepared<A> prepared(LTK_MARGIN_CROSS_ENTROPY_ARGUMENTS);
  Call<A>& call = prepared.call;
  const int64_t n = input.size(0), k = input.size(2);
  const auto options = input.options().dtype(Prepared<A>::dtype());
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
  const auto options = input.options().dtype(Prepared<A>::dtype());
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
    const bool same = target.scalar_type() == Prepared<A>::dtype();
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

const char* cpu_capability() {
  switch (capability()) {
    case Capability::kAvx512:
      return "avx512";
    case Capability::kAvx2:
      return "avx2";
    default:
      return "default";
  }
}

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
