// The rows kernel on a GPU: layouts, launches and memory; the arithmetic is in cuda_kernels.h. Nothing here waits for
// the device or looks at a value on it.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../cuda_host.h"
#include "arguments.h"
#include "cuda_call.h"
#include "layout.h"

namespace ltk {
namespace {

using cuda::Call;
using cuda::Kernels;
using cuda::RowsShape;

constexpr int64_t kGroupBytes = 16;
constexpr int64_t kSplitGroups = 2048;       // of a block that reads part of a row
constexpr int64_t kBlocks = 1024;            // where their number is free: several per processor of any chip
constexpr int64_t kShortRows = 64;           // at least this many rows per sum over rows
constexpr int64_t kReservedPerBlock = 1024;  // bytes of shared memory that the system takes
constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class A>
const Kernels<A>& kernels_for(at::ScalarType dtype);
template <>
const Kernels<double>& kernels_for<double>(at::ScalarType) {
  return cuda::kernels_double;
}
template <>
const Kernels<float>& kernels_for<float>(at::ScalarType dtype) {
  return dtype == at::kFloat ? cuda::kernels_float : dtype == at::kHalf ? cuda::kernels_half : cuda::kernels_bfloat16;
}

cuda::Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kBFloat16:
      return cuda::kBFloat16;
    case at::kHalf:
      return cuda::kHalf;
    case at::kDouble:
      return cuda::kDouble;
    default:
      return cuda::kFloat;
  }
}

// How a row whose gradient is wanted stays on the chip; threads 0 where it cannot.
template <class A>
RowsShape shape_of(int64_t classes, int64_t itemsize, const device::Facts& facts, const Kernels<A>& kernels) {
  const int64_t groups = classes * itemsize / kGroupBytes;
  if (groups <= 128) return {32, 4, 1};
  if (groups <= 512) return {128, 4, 1};
  if (groups <= 1024) return {128, 8, 1};
  if (groups <= 2048) return {256, 8, 1};
  // two blocks per processor, so that one computes while the other waits for memory; else one
  const int64_t room[] = {facts.shared_per_processor / 2 - kReservedPerBlock, facts.shared_per_block};
  const int largest_cluster = kernels.largest_cluster();
  for (const int64_t bytes : room)
    for (int cluster = 1; cluster <= largest_cluster; cluster *= 2)
      if (ceil_div(groups, cluster) * kGroupBytes + cuda::kRowBytesReserved <= std::min(bytes, facts.shared_per_block))
        return {cuda::kSharedThreads, 0, cluster};
  return {0, 0, 0};
}

// Owns what a Call points to.
template <class A>
struct Prepared {
  Layout layout;
  Call<A> call = {};
  const Kernels<A>& kernels;
  device::Stream stream;
  std::vector<Tensor> kept;

  Tensor keep(Tensor t) {
    kept.push_back(t);
    return t;
  }

  static at::ScalarType dtype() { return sizeof(A) == 8 ? at::kDouble : at::kFloat; }

  const A* pointer(const OptionalTensor& t) {
    if (!t.has_value()) return nullptr;
    return keep(t->to(dtype()).contiguous()).template const_data_ptr<A>();
  }

  explicit Prepared(LTK_MARGIN_CROSS_ENTROPY_PARAMETERS)
      : layout(input), kernels(kernels_for<A>(input.scalar_type())), stream(device::current_stream()) {
    const Tensor& x = layout.input;
    TORCH_CHECK_VALUE(layout.rows <= kMost / 8, "input: got ", layout.rows, " rows, expected at most ", kMost / 8);
    call.rows = layout.rows;
    call.k = layout.k;
    call.classes = static_cast<int>(layout.classes);
    call.x = x.const_data_ptr();
    layout.strides(x, &call.x_n, &call.x_c, &call.x_k);

    call.scale = static_cast<A>(scale);
    call.learned_scale = pointer(learned_scale);
    call.margin = {static_cast<A>(margin), static_cast<A>(std::cos(margin)), static_cast<A>(std::sin(margin))};
    call.smoothing = static_cast<A>(label_smoothing);
    call.angular = angular;
    call.ignore_index = ignore_index;
    call.class_scale = pointer(class_scale);
    call.class_bias = pointer(class_bias);
    call.weight = pointer(weight);
    if (weight.has_value() && label_smoothing > 0 && !target.is_floating_point())
      call.total_weight = pointer(weight->sum());
    if (class_margin.has_value()) {
      const Tensor m = at::add(*class_margin, margin);
      call.class_margin = pointer(angular ? at::stack({m, m.cos(), m.sin()}) : m);
    }
    call.coefficient =
        pointer(coefficient.has_value() && mixed_target.has_value() ? coefficient->expand({2}) : coefficient);
    if (target.is_floating_point()) {
      const Tensor q = keep(layout.fits(target) ? target : layout.fitting(target).copy_(target));
      call.q = q.const_data_ptr();
      call.q_dtype = dtype_of(q);
      layout.strides(q, &call.q_n, &call.q_c, &call.q_k);
    } else {
      call.target = keep(target.contiguous()).template const_data_ptr<int64_t>();
      if (mixed_target.has_value()) {
        call.mixed = keep(mixed_target->contiguous()).template const_data_ptr<int64_t>();
        call.share = pointer(mix_lambda);
        call.share_stride = mix_lambda->dim() == 0 ? 0 : 1;
      }
    }
  }

  // The tensor that kernels write to in place of `wanted`; copy back where it is another.
  Tensor grad_target(const Tensor& wanted) {
    Tensor out = keep(layout.fitting(wanted));
    call.grad = out.mutable_data_ptr();
    layout.strides(out, &call.grad_n, &call.grad_c, &call.grad_k);
    return out;
  }

  bool general() const { return call.class_scale || call.q || call.smoothing > A(0) || call.prediction; }

  // Whether positions can be read 8 bytes at a time: every class of every sample starts on such an address.
  bool wide_panels() const {
    const int64_t count = 8 / layout.input.element_size();
    auto fits = [&](const void* data, int64_t n, int64_t c) {
      return data == nullptr || (reinterpret_cast<uintptr_t>(data) % 8 == 0 && n % count == 0 && c % count == 0);
    };
    return layout.k % count == 0 && fits(call.x, call.x_n, call.x_c) && fits(call.grad, call.grad_n, call.grad_c);
  }

  // Whether two 16-bit columns can be read at once in every row.
  bool paired_columns() const {
    auto fits = [](const void* data, int64_t n, int64_t k) {
      return data == nullptr || (reinterpret_cast<uintptr_t>(data) % 4 == 0 && n % 2 == 0 && k % 2 == 0);
    };
    const int64_t x_k = layout.k > 1 ? call.x_k : 0, grad_k = layout.k > 1 ? call.grad_k : 0;
    return layout.input.element_size() == 2 && fits(call.x, call.x_n, x_k) && fits(call.grad, call.grad_n, grad_k);
  }

  Tensor bytes(int64_t size) { return keep(at::empty({size}, layout.input.options().dtype(at::kByte))); }
};

template <class A>
void forward_rows(Prepared<A>& p) {
  Call<A>& call = p.call;
  const int64_t itemsize = p.layout.input.element_size(), groups = p.layout.classes * itemsize / kGroupBytes;
  const RowsShape shape = shape_of(p.layout.classes, itemsize, device::facts(), p.kernels);
  if (shape.groups > 0 || (call.grad && shape.threads > 0)) {
    device::check(p.kernels.rows_forward(call, shape, p.general(), p.stream));
    return;
  }
  call.splits = static_cast<int>(ceil_div(groups, kSplitGroups));  // two passes, or one that only reads
  call.parts =
      static_cast<cuda::Sums<A>*>(p.bytes(p.layout.rows * call.splits * sizeof(cuda::Sums<A>)).mutable_data_ptr());
  if (call.grad)
    call.records = static_cast<cuda::Record<A>*>(p.bytes(p.layout.rows * sizeof(cuda::Record<A>)).mutable_data_ptr());
  device::check(p.kernels.rows_statistics(call, p.general(), p.stream));
  device::check(p.kernels.rows_finish(call, p.stream));
  if (call.grad) device::check(p.kernels.rows_gradient(call, p.general(), p.stream));
}

template <class A>
ForwardResult forward(LTK_MARGIN_CROSS_ENTROPY_PARAMETERS, bool with_prediction, bool with_grad,
                      const OptionalTensor& out) {
  if (out.has_value()) check_out(*out, input);
  Prepared<A> p(LTK_MARGIN_CROSS_ENTROPY_ARGUMENTS);
  Call<A>& call = p.call;
  const int64_t n = input.size(0), k = input.size(2);
  const auto options = input.options().dtype(Prepared<A>::dtype());
  Tensor loss = at::empty({n, k}, options), lse = at::empty({n, k}, options), rest = at::empty({2, n, k}, options);
  Tensor prediction = at::empty({0}, input.options().dtype(at::kLong));
  if (with_prediction) prediction = at::empty({n, k}, prediction.options());
  const Tensor result = with_grad && !out.has_value() ? at::empty_like(input) : at::empty({0}, input.options());
  const Tensor& grad = out.has_value() ? *out : result;
  if (p.layout.rows == 0) return {loss, lse, prediction, rest, result};
  call.loss = loss.mutable_data_ptr<A>();
  call.lse = lse.mutable_data_ptr<A>();
  call.peak = rest.mutable_data_ptr<A>();
  call.total = call.peak + p.layout.rows;
  call.prediction = with_prediction ? prediction.mutable_data_ptr<int64_t>() : nullptr;
  Tensor written;
  if (with_grad) written = p.grad_target(grad);
  if (p.layout.is_rows) {
    forward_rows(p);
  } else {
    const bool wide = p.wide_panels();
    const device::Facts facts = device::facts();
    call.panel_room = std::min(facts.shared_per_block, facts.shared_per_processor / 2 - kReservedPerBlock);
    device::check(p.kernels.panels(call, false, wide, p.general(), p.stream));
  }
  if (with_grad && !written.is_same(grad)) grad.copy_(written);
  return {loss, lse, prediction, rest, result};
}

template <class A>
std::vector<Tensor> backward(const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& rest,
                             LTK_MARGIN_CROSS_ENTROPY_PARAMETERS, c10::List<bool> needs, const OptionalTensor& out) {
  if (out.has_value()) check_out(*out, input);
  Prepared<A> p(LTK_MARGIN_CROSS_ENTROPY_ARGUMENTS);
  Call<A>& call = p.call;
  const auto options = input.options().dtype(Prepared<A>::dtype());
  std::vector<Tensor> grads(needs.size());
  for (Tensor& grad : grads) grad = at::empty({0}, options);
  if (needs.get(kInput) && !out.has_value()) grads[kInput] = at::empty_like(input);
  if (needs.get(kTarget)) grads[kTarget] = at::empty_like(target);
  if (p.layout.rows == 0 || std::none_of(needs.begin(), needs.end(), [](bool need) { return need; })) {
    for (const int i : {kClassBias, kClassScale, kClassMargin})
      if (needs.get(i)) grads[i] = at::zeros({p.layout.classes}, options);
    if (needs.get(kLearnedScale)) grads[kLearnedScale] = at::zeros({}, options);
    return grads;
  }

  const Tensor saved = p.keep(rest.contiguous());
  call.peak = const_cast<A*>(saved.const_data_ptr<A>());
  call.total = call.peak + p.layout.rows;
  auto upstream = [&](const Tensor& grad, int64_t* stride) {
    *stride = is_single(grad) ? 0 : 1;
    return p.pointer(is_single(grad) && grad.dim() > 0 ? grad.select(0, 0).select(0, 0) : grad);
  };
  call.grad_loss = upstream(grad_loss, &call.grad_loss_stride);
  if (grad_lse.has_value()) call.grad_lse = upstream(*grad_lse, &call.grad_lse_stride);

  Tensor written, written_q, sums, z;
  const Tensor& grad_input = out.has_value() ? *out : grads[kInput];
  if (needs.get(kInput)) written = p.grad_target(grad_input);
  if (needs.get(kTarget)) {
    written_q = p.keep(p.layout.fitting(grads[kTarget]));
    call.grad_q = written_q.mutable_data_ptr();
    p.layout.strides(written_q, &call.grad_q_n, &call.grad_q_c, &call.grad_q_k);
  }
  const bool summed =
      needs.get(kClassBias) || needs.get(kClassScale) || needs.get(kClassMargin) || needs.get(kLearnedScale);
  if (needs.get(kLearnedScale)) {
    z = at::empty({p.layout.rows}, options);
    call.z = z.mutable_data_ptr<A>();
  }
  auto make_sums = [&](int64_t chunks) {
    sums = at::empty({chunks, 3, p.layout.classes}, options);
    call.column_sums = sums.mutable_data_ptr<A>();
    call.chunks = static_cast<int>(chunks);
  };
  if (p.layout.is_rows) {
    call.records = static_cast<cuda::Record<A>*>(p.bytes(p.layout.rows * sizeof(cuda::Record<A>)).mutable_data_ptr());
    device::check(p.kernels.rows_records(call, p.stream));
    if (summed) {
      const bool paired = p.paired_columns();
      const int64_t blocks = ceil_div(p.layout.classes, cuda::kColumnThreads * (paired ? 2 : 1));
      make_sums(std::clamp<int64_t>(kBlocks / blocks, 1, ceil_div(p.layout.rows, kShortRows)));
      device::check(p.kernels.columns_gradient(call, paired, p.stream));
    } else {
      device::check(p.kernels.rows_gradient(call, p.general(), p.stream));
    }
  } else {
    const bool wide = p.wide_panels();
    const int64_t positions = 32 * (wide ? 8 / input.element_size() : 1);
    if (summed) make_sums(std::min(p.layout.n * ceil_div(p.layout.k, positions), kBlocks));
    device::check(p.kernels.panels(call, true, wide, p.general(), p.stream));
  }
  if (needs.get(kInput) && !written.is_same(grad_input)) grad_input.copy_(written);
  if (needs.get(kTarget) && !written_q.is_same(grads[kTarget])) grads[kTarget].copy_(written_q);
  if (!summed) return grads;

  sums = sums.sum(0, false, at::kDouble);  // over chunks; du, dc * x and dm of every class
  auto scaled = [&](const Tensor& t) {
    const Tensor product = t * scale;
    return learned_scale.has_value() ? product * *learned_scale : product;
  };
  if (needs.get(kClassBias)) grads[kClassBias] = sums[0].to(Prepared<A>::dtype());
  if (needs.get(kClassScale)) grads[kClassScale] = scaled(sums[1]).to(Prepared<A>::dtype());
  if (needs.get(kClassMargin)) grads[kClassMargin] = scaled(sums[2]).to(Prepared<A>::dtype());
  if (needs.get(kLearnedScale)) {
    const Tensor columns = class_scale.has_value() ? sums[1] * *class_scale : sums[1];
    grads[kLearnedScale] = ((columns.sum() + z.sum(at::kDouble)) * scale).to(Prepared<A>::dtype());
  }
  return grads;
}

template <class A>
void scale(const Tensor& gradient, const Tensor& factor) {
  const Tensor f = factor.to(sizeof(A) == 8 ? at::kDouble : at::kFloat);
  const int64_t blocks = std::clamp<int64_t>(gradient.nbytes() / (256 * kGroupBytes * 4), 1, kBlocks);
  device::check(kernels_for<A>(gradient.scalar_type())
                    .scale(gradient.mutable_data_ptr(), gradient.numel(), f.const_data_ptr<A>(), blocks,
                           device::current_stream()));
}

}  // namespace

ForwardResult margin_cross_entropy_fwd_cuda(LTK_MARGIN_CROSS_ENTROPY_PARAMETERS, bool with_prediction, bool with_grad,
                                            const OptionalTensor& out) {
  const device::Guard guard(input.device());
  return input.scalar_type() == at::kDouble
             ? forward<double>(LTK_MARGIN_CROSS_ENTROPY_ARGUMENTS, with_prediction, with_grad, out)
             : forward<float>(LTK_MARGIN_CROSS_ENTROPY_ARGUMENTS, with_prediction, with_grad, out);
}

std::vector<Tensor> margin_cross_entropy_bwd_cuda(const Tensor& grad_loss, const OptionalTensor& grad_lse,
                                                  const Tensor& rest, LTK_MARGIN_CROSS_ENTROPY_PARAMETERS,
                                                  c10::List<bool> needs, const OptionalTensor& out) {
  const device::Guard guard(input.device());
  return input.scalar_type() == at::kDouble
             ? backward<double>(grad_loss, grad_lse, rest, LTK_MARGIN_CROSS_ENTROPY_ARGUMENTS, needs, out)
             : backward<float>(grad_loss, grad_lse, rest, LTK_MARGIN_CROSS_ENTROPY_ARGUMENTS, needs, out);
}

void scale_gradient_cuda(Tensor& gradient, const Tensor& factor) {
  if (gradient.numel() == 0) return;
  TORCH_CHECK_VALUE(gradient.is_non_overlapping_and_dense() &&
                        reinterpret_cast<uintptr_t>(gradient.const_data_ptr()) % kGroupBytes == 0,
                    "gradient: got a tensor that is not dense and 16-byte aligned");
  const device::Guard guard(gradient.device());
  gradient.scalar_type() == at::kDouble ? scale<double>(gradient, factor) : scale<float>(gradient, factor);
}

}  // namespace ltk
