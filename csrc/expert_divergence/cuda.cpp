// Divergences between experts on a GPU: memory and launches. The host never waits for the device nor reads
// a value on it.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "../common/cuda/experts_host.h"
#include "../common/registration.h"
#include "cuda_call.h"

namespace ltk {
namespace {

template <class A>
std::tuple<Tensor, Tensor> forward(at::TensorList logits, const OptionalTensor& temperature, bool pairwise) {
  Experts x(logits);
  const int64_t n = x.rows.rows, count = x.rows.count;
  const auto options = logits[0].options().dtype(x.compute_dtype);
  Tensor value = at::empty({count, n}, options), saved = at::empty({3 * count + 2, n}, options);
  if (n == 0) return {value, saved};
  cuda::DivergenceCall<A> call = {};
  call.x = x.rows;
  call.temperature = x.pointer<A>(temperature);
  call.pairwise = pairwise;
  call.value = value.mutable_data_ptr<A>();
  call.saved = saved.mutable_data_ptr<A>();
  const device::Facts facts = device::facts();
  const int64_t sums = count * static_cast<int64_t>(2 * sizeof(double) + sizeof(A));
  call.tile = cuda::tile_shape(call.x, x.itemsize, room_of_two(facts) - sums);
  if (call.tile.columns < call.x.classes)  // read twice: rather many blocks
    call.tile = cuda::tile_shape(call.x, x.itemsize, std::min(cuda::kTileBytes, room_of_two(facts) - sums));
  const int64_t shared = call.tile.bytes + sums + cuda::kTileScratch;
  check_room(shared, facts, count);
  device::check(cuda::divergence_forward(call, x.dtype, shared, device::current_stream()));
  return {value, saved};
}

template <class A>
Tensor backward(const Tensor& grad, const Tensor& saved, at::TensorList logits, const OptionalTensor& temperature,
                bool pairwise, bool detach) {
  Experts x(logits);
  const int64_t n = x.rows.rows, classes = x.rows.classes, count = x.rows.count;
  const Tensor result =
      logits[0].dim() == 3 ? at::empty_like(logits[0]) : at::empty({count, n, classes}, logits[0].options());
  if (n == 0) return result;
  const Tensor out = classes == 1 || result.stride(2) == 1 ? result : at::empty({count, n, classes}, result.options());
  cuda::DivergenceCall<A> call = {};
  call.x = x.rows;
  call.temperature = x.pointer<A>(temperature);
  call.pairwise = pairwise, call.detach = detach;
  call.grad = x.pointer<A>(grad);
  call.saved = const_cast<A*>(x.pointer<A>(saved));
  call.out = out.mutable_data_ptr();
  call.out_expert = out.stride(0), call.out_row = out.stride(1);
  const device::Facts facts = device::facts();
  const int64_t scalars = 4 * count * static_cast<int64_t>(sizeof(A));
  call.tile = cuda::tile_shape(call.x, x.itemsize, std::min(cuda::kTileBytes, room_of_two(facts) - scalars));
  const int64_t shared = call.tile.bytes + scalars;
  check_room(shared, facts, count);
  const int64_t chunks = ceil_div(classes, call.tile.columns);
  TORCH_CHECK_VALUE(n * chunks <= std::numeric_limits<int32_t>::max(), "logits: got ", n, " rows of ", classes,
                    " classes, too many for one call");
  call.chunks = static_cast<int>(chunks);
  device::check(cuda::divergence_backward(call, x.dtype, shared, device::current_stream()));
  if (!out.is_same(result)) result.copy_(out);
  return result;
}

std::tuple<Tensor, Tensor> expert_divergence_fwd(at::TensorList logits, const OptionalTensor& temperature,
                                                 bool pairwise) {
  const device::Guard guard(logits[0].device());
  const auto run = logits[0].scalar_type() == at::kDouble ? forward<double> : forward<float>;
  return run(logits, temperature, pairwise);
}

Tensor expert_divergence_bwd(const Tensor& grad, const Tensor& saved, at::TensorList logits,
                             const OptionalTensor& temperature, bool pairwise, bool detach) {
  const device::Guard guard(logits[0].device());
  const auto run = logits[0].scalar_type() == at::kDouble ? backward<double> : backward<float>;
  return run(grad, saved, logits, temperature, pairwise, detach);
}

}  // namespace
}  // namespace ltk

TORCH_LIBRARY_IMPL(LTK_LIBRARY, LTK_CUDA, m) {
  m.impl("expert_divergence_fwd", &ltk::expert_divergence_fwd);
  m.impl("expert_divergence_bwd", &ltk::expert_divergence_bwd);
}
