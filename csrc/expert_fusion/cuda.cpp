// The experts' fusion on a GPU: memory and launches. The host never waits for the device nor
// reads a value on it.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/sort.h>

#include "../common/cuda/experts_host.h"
#include "arguments.h"
#include "cuda_call.h"

namespace ltk {
namespace {

constexpr int64_t kMostRounds = 64;  // classes that the kernel selects; more are sorted

template <class A>
FusionResult fuse(const FusionArguments& a, int64_t k, bool with_log_probs) {
  Experts x(a.logits);
  const int64_t n = x.rows.rows, classes = x.rows.classes, count = x.rows.count;
  const auto options = a.logits[0].options().dtype(x.compute_dtype);
  Tensor values = at::empty({n, k}, options), chosen = at::empty({n, k}, options.dtype(at::kLong));
  Tensor mass = at::empty({n}, options);
  Tensor log_probs = with_log_probs ? at::empty({n, classes}, options) : at::empty({0}, options);
  if (n == 0) return {values, chosen, mass, log_probs};

  cuda::FusionCall<A> call = {};
  call.x = x.rows;
  if (count <= cuda::kFewExperts) {
    for (int64_t e = 0; e < count; ++e) call.weight[e] = static_cast<A>(a.weights[e]);
    call.expert_weight = x.pointer<A>(a.expert_weight);
  } else {  // written on the device, so that nothing is copied to it
    std::vector<Tensor> each;
    for (const double weight : a.weights) each.push_back(at::full({1}, weight, options));
    const Tensor all = at::cat(each);
    call.expert_weight = x.pointer<A>(a.expert_weight.has_value() ? all.mul(*a.expert_weight) : all);
  }
  call.class_shift = x.pointer<A>(a.class_shift);
  call.learned_scale = x.pointer<A>(a.learned_scale);
  call.scale = static_cast<A>(a.scale);

  const bool sorted = k > kMostRounds;
  call.k = sorted ? 0 : static_cast<int>(k);
  call.values = values.mutable_data_ptr<A>();
  call.chosen = chosen.mutable_data_ptr<int64_t>();
  call.mass = mass.mutable_data_ptr<A>();
  call.normalize = a.normalize && !sorted;
  call.keep = k > 1 || with_log_probs;
  call.log_probs = with_log_probs ? log_probs.mutable_data_ptr<A>() : nullptr;

  const device::Facts facts = device::facts();
  call.tile = cuda::tile_shape(call.x, x.itemsize, std::min(cuda::kTileBytes, room_of_two(facts)));
  int64_t shared = call.tile.bytes + count * static_cast<int64_t>(sizeof(A)) + cuda::kTileScratch;
  check_room(shared, facts, count);
  Tensor u;
  if (call.keep) {
    const int64_t kept = classes * static_cast<int64_t>(sizeof(A));
    if (sorted || shared + kept > facts.shared_per_block) {
      u = with_log_probs && !sorted ? log_probs : at::empty({n, classes}, options);
      call.u = u.mutable_data_ptr<A>();
    } else {
      shared += kept;
    }
  }
  device::check(cuda::expert_fusion(call, x.dtype, shared, device::current_stream()));
  if (sorted) {
    const auto [all_values, all_classes] = at::sort(u, /*stable=*/true, /*dim=*/1, /*descending=*/true);
    values.copy_(all_values.narrow(1, 0, k));
    chosen.copy_(all_classes.narrow(1, 0, k));
    if (a.normalize) {
      const Tensor peak = values.narrow(1, 0, 1).clone();
      values.sub_(peak).exp_().div_(mass.unsqueeze(1));
      mass.log_().add_(peak.squeeze(1)).masked_fill_(peak.squeeze(1).eq(-INFINITY), -INFINITY);
    }
  }
  return {values, chosen, mass, log_probs};
}

FusionResult expert_fusion(at::TensorList logits LTK_FUSION(LTK_PARAMETER), int64_t k, bool with_log_probs) {
  const device::Guard guard(logits[0].device());
  const auto run = logits[0].scalar_type() == at::kDouble ? fuse<double> : fuse<float>;
  return run({logits, LTK_FUSION(LTK_VALUE)}, k, with_log_probs);
}

}  // namespace
}  // namespace ltk

TORCH_LIBRARY_IMPL(LTK_LIBRARY, LTK_CUDA, m) { m.impl("expert_fusion", &ltk::expert_fusion); }
