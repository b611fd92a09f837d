// The rows kernel on a GPU: layouts, launches and memory; the arithmetic is in cuda_kernels.h. The host never waits for
// the device nor reads a value on it.
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/stack.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/cuda/host.h"
#include "../common/registration.h"
#include "cuda_call.h"
#include "prepared.h"

namespace ltk {
namespace {

using cuda::Call;
using cuda::Kernels;
using cuda::RowsShape;

constexpr int64_t kGroupBytes = 16;
constexpr int64_t kPartGroups = 2048;        // groups of a block that reads a part of a row
constexpr int64_t kScaleBlocks = 2 * 132;    // two per processor: gone soon where the factor is 1
constexpr int64_t kBlocks = 1024;            // if their number is free: several per processor of any chip
constexpr int64_t kShortRows = 64;           // at least this many rows per sum over rows
constexpr int64_t kReservedPerBlock = 1024;  // bytes of shared memory that the system takes
constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

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

template <class A>
struct Prepared : PreparedRows<A, Call<A>> {
  using PreparedRows<A, Call<A>>::call;
  using PreparedRows<A, Call<A>>::layout;
  const Kernels<A>& kernels;
  device::Stream stream;

  Prepared(const Tensor& input, const RowOptions& o)
      : PreparedRows<A, Call<A>>(input, o),
        kernels(kernels_for<A>(input.scalar_type())),
        stream(device::current_stream()) {
    TORCH_CHECK_VALUE(layout.rows <= kMost / 8, "input: got ", layout.rows, " rows, expected at most ", kMost / 8);
    auto pointer = [&](const OptionalTensor& t) { return this->template pointer<A>(t); };
    call.scale = static_cast<A>(o.scale);
    call.learned_scale = pointer(o.learned_scale);
    call.margin = {static_cast<A>(o.margin), static_cast<A>(std::cos(o.margin)), static_cast<A>(std::sin(o.margin))};
    call.class_scale = pointer(o.class_scale);
    const OptionalTensor& smooth_weight = o.smooth_weight.has_value() ? o.smooth_weight : o.weight;
    if (smooth_weight.has_value() && o.label_smoothing > 0 && !o.soft())
      call.smooth_total = pointer(smooth_weight->sum());
    if (o.class_margin.has_value()) {
      const Tensor m = at::add(*o.class_margin, o.margin);
      call.class_margin = pointer(o.angular ? at::stack({m, m.cos(), m.sin()}) : m);
    }
    if (o.soft()) this->set_probabilities(o.target);
  }

  int64_t groups() const { return layout.classes * layout.input.element_size() / kGroupBytes; }

  bool general() const { return call.class_scale || call.q || call.smoothing > A(0) || call.prediction; }

  // Returns whether positions can be read 8 bytes at a time: every class of every sample is so aligned.
  bool wide_panels() const {
    const int64_t count = 8 / layout.input.element_size();
    auto fits = [&](const void* data, int64_t n, int64_t c) {
      return data == nullptr || (reinterpret_cast<uintptr_t>(data) % 8 == 0 && n % count == 0 && c % count == 0);
    };
    return layout.k % count == 0 && fits(call.x, call.x_n, call.x_c) && fits(call.grad, call.grad_n, call.grad_c);
  }

  // Returns whether two 16-bit columns can be read at once in every row.
  bool paired_columns() const {
    auto fits = [](const void* data, int64_t n, int64_t k) {
      return data == nullptr || (reinterpret_cast<uintptr_t>(data) % 4 == 0 && n % 2 == 0 && k % 2 == 0);
    };
    const int64_t x_k = layout.k > 1 ? call.x_k : 0, grad_k = layout.k > 1 ? call.grad_k : 0;
    return layout.input.element_size() == 2 && fits(call.x, call.x_n, x_k) && fits(call.grad, call.grad_n, grad_k);
  }

  template <class V>
  V* allocate(int64_t count) {
    const auto options = layout.input.options().dtype(at::kByte);
    return static_cast<V*>(
        this->keep(at::empty({count * static_cast<int64_t>(sizeof(V))}, options)).mutable_data_ptr());
  }
};

// Returns how a row whose gradient is wanted stays on the chip; threads 0 where it cannot.
template <class A>
RowsShape choose_shape(const Prepared<A>& p) {
  const int64_t groups = p.groups();
  if (groups <= 128) return {32, 4, 1};
  if (groups <= 512) return {128, 4, 1};
  if (groups <= 1024) return {128, 8, 1};
  if (groups <= 2048) return {256, 8, 1};
  const device::Facts facts = device::facts();
  // two blocks per processor, so that one computes while the other waits for memory; else one
  for (const int64_t room : {facts.shared_per_processor / 2 - kReservedPerBlock, facts.shared_per_block}) {
    const int64_t bytes = std::min(room, facts.shared_per_block);
    for (int cluster = 1; cluster <= device::kLargestCluster; cluster *= 2) {
      if (ceil_div(groups, cluster) * kGroupBytes + cuda::kRowBytesReserved > bytes) continue;
      if (cluster > 1 && cluster > p.kernels.largest_cluster(p.general(), bytes)) break;
      return {cuda::kSharedThreads, 0, cluster};
    }
  }
  return {0, 0, 0};
}

template <class A>
void forward_rows(Prepared<A>& p) {
  Call<A>& call = p.call;
  const RowsShape shape = choose_shape(p);
  if (shape.groups > 0 || (call.grad && shape.threads > 0)) {
    device::check(p.kernels.rows_forward(call, shape, p.general(), p.stream));
    return;
  }
  call.parts = static_cast<int>(ceil_div(p.groups(), kPartGroups));  // two passes, or one that only reads
  call.part_sums = p.template allocate<cuda::Sums<A>>(call.rows * call.parts);
  if (call.grad) call.records = p.template allocate<cuda::Record<A>>(call.rows);
  device::check(p.kernels.rows_statistics(call, p.general(), p.stream));
  device::check(p.kernels.rows_finish(call, p.stream));
  if (call.grad) device::check(p.kernels.rows_gradient(call, p.general(), p.stream));
}

Tensor empty_like(const Tensor& t) { return at::empty_like(t); }

template <class A>
ForwardResult forward(const Tensor& input, const RowOptions& o, bool with_prediction, bool with_grad,
                      const OptionalTensor& out) {
  if (out.has_value()) check_out(*out, input);
  Prepared<A> p(input, o);
  const auto run = [&](const Tensor&) {
    if (p.layout.is_rows) return forward_rows(p);
    const device::Facts facts = device::facts();
    p.call.panel_room = std::min(facts.shared_per_block, facts.shared_per_processor / 2 - kReservedPerBlock);
    device::check(p.kernels.panels(p.call, false, p.wide_panels(), p.general(), p.stream));
  };
  return p.forward(input, with_prediction, with_grad, out, &empty_like, run);
}

// Launches backward. Returns the sums over rows of every class, in chunks: [chunks, kColumnSums, classes].
template <class A>
Tensor run_backward(Prepared<A>& p, bool summed) {
  Call<A>& call = p.call;
  auto allocate_sums = [&](int64_t chunks) {
    const Tensor sums =
        at::empty({chunks, cuda::kColumnSums, p.layout.classes}, p.layout.input.options().dtype(dtype_of<A>()));
    call.column_sums = sums.mutable_data_ptr<A>();
    call.chunks = static_cast<int>(chunks);
    return sums;
  };
  Tensor sums;
  if (!p.layout.is_rows) {
    const bool wide = p.wide_panels();
    const int64_t positions = 32 * (wide ? 8 / p.layout.input.element_size() : 1);
    if (summed) sums = allocate_sums(std::min(p.layout.n * ceil_div(p.layout.k, positions), kBlocks));
    device::check(p.kernels.panels(call, true, wide, p.general(), p.stream));
    return sums;
  }
  call.records = p.template allocate<cuda::Record<A>>(call.rows);
  device::check(p.kernels.rows_records(call, p.stream));
  if (summed) {
    const bool paired = p.paired_columns();
    const int64_t blocks = ceil_div(p.layout.classes, cuda::kColumnThreads * (paired ? 2 : 1));
    sums = allocate_sums(std::clamp<int64_t>(kBlocks / blocks, 1, ceil_div(call.rows, kShortRows)));
    device::check(p.kernels.columns_gradient(call, paired, p.stream));
  } else {
    device::check(p.kernels.rows_gradient(call, p.general(), p.stream));
  }
  return sums;
}

template <class A>
std::vector<Tensor> backward(const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& rest,
                             const Tensor& input, const RowOptions& o, const c10::List<bool>& needs,
                             const OptionalTensor& out) {
  if (out.has_value()) check_out(*out, input);
  Prepared<A> p(input, o);
  constexpr at::ScalarType dtype = dtype_of<A>();
  std::vector<Tensor> grads = empty_gradients(input, o.target, needs, out, dtype, &empty_like);
  if (p.layout.rows == 0 || std::none_of(needs.begin(), needs.end(), [](bool need) { return need; })) {
    zero_options(grads, needs, p.layout.classes);
    return grads;
  }
  p.set_upstream(grad_loss, grad_lse, rest);
  if (needs.get(kInput)) p.set_grad(out.has_value() ? *out : grads[kInput]);
  if (needs.get(kTarget)) p.set_grad_probabilities(grads[kTarget], o.target.scalar_type());
  Tensor z;
  if (needs.get(kLearnedScale)) {
    z = at::empty({p.layout.rows}, input.options().dtype(dtype));
    p.call.z = z.mutable_data_ptr<A>();
  }
  const bool summed =
      needs.get(kClassBias) || needs.get(kClassScale) || needs.get(kClassMargin) || needs.get(kLearnedScale);
  Tensor sums = run_backward(p, summed);
  p.copy_back();
  if (!summed) return grads;

  sums = sums.sum(0, false, at::kDouble);  // over chunks
  auto scaled = [&](const Tensor& t) {
    const Tensor product = t.mul(o.scale);
    return (o.learned_scale.has_value() ? product.mul(*o.learned_scale) : product).to(dtype);
  };
  if (needs.get(kClassBias)) grads[kClassBias] = sums[cuda::kSumDu].to(dtype);
  if (needs.get(kClassScale)) grads[kClassScale] = scaled(sums[cuda::kSumDx].add(sums[cuda::kSumTargetDx]));
  if (needs.get(kClassMargin)) grads[kClassMargin] = scaled(sums[cuda::kSumDm]);
  if (needs.get(kLearnedScale)) {
    const Tensor columns = o.class_scale.has_value() ? sums[cuda::kSumDx].mul(*o.class_scale) : sums[cuda::kSumDx];
    grads[kLearnedScale] = columns.sum().add(z.sum(at::kDouble)).mul(o.scale).to(dtype);
  }
  return grads;
}

template <class A>
void scale(const Tensor& gradient, const Tensor& factor) {
  const Tensor f = factor.to(sizeof(A) == 8 ? at::kDouble : at::kFloat);
  const int64_t blocks = std::clamp<int64_t>(gradient.nbytes() / (256 * kGroupBytes * 4), 1, kScaleBlocks);
  device::check(kernels_for<A>(gradient.scalar_type())
                    .scale(gradient.mutable_data_ptr(), gradient.numel(), f.const_data_ptr<A>(), blocks,
                           device::current_stream()));
}

ForwardResult margin_cross_entropy_fwd(const Tensor& input LTK_ROW_OPTIONS(LTK_PARAMETER), bool with_prediction,
                                       bool with_grad, const OptionalTensor& out) {
  const device::Guard guard(input.device());
  const auto run = input.scalar_type() == at::kDouble ? forward<double> : forward<float>;
  return run(input, {LTK_ROW_OPTIONS(LTK_VALUE)}, with_prediction, with_grad, out);
}

std::vector<Tensor> margin_cross_entropy_bwd(const Tensor& grad_loss, const OptionalTensor& grad_lse,
                                             const Tensor& rest, const Tensor& input LTK_ROW_OPTIONS(LTK_PARAMETER),
                                             const c10::List<bool>& needs, const OptionalTensor& out) {
  const device::Guard guard(input.device());
  const auto run = input.scalar_type() == at::kDouble ? backward<double> : backward<float>;
  return run(grad_loss, grad_lse, rest, input, {LTK_ROW_OPTIONS(LTK_VALUE)}, needs, out);
}

void scale_gradient_(Tensor& gradient, const Tensor& factor) {
  if (gradient.numel() == 0) return;
  TORCH_CHECK_VALUE(gradient.is_non_overlapping_and_dense() &&
                        reinterpret_cast<uintptr_t>(gradient.const_data_ptr()) % kGroupBytes == 0,
                    "gradient: got a tensor that is not dense and 16-byte aligned");
  const device::Guard guard(gradient.device());
  gradient.scalar_type() == at::kDouble ? scale<double>(gradient, factor) : scale<float>(gradient, factor);
}

}  // namespace
}  // namespace ltk

TORCH_LIBRARY_IMPL(LTK_LIBRARY, LTK_CUDA, m) {
  m.impl("margin_cross_entropy_fwd", &ltk::margin_cross_entropy_fwd);
  m.impl("margin_cross_entropy_bwd", &ltk::margin_cross_entropy_bwd);
  m.impl("scale_gradient_", &ltk::scale_gradient_);
}
