// The experts' fusion on the CPU; the arithmetic is in cpu_kernels.h.
#include <ATen/ops/empty.h>

#include "../common/cpu/memory.h"
#include "cpu_prepared.h"
#include "schema.h"

namespace ltk {
namespace {

template <class A>
FusionResult fuse(const FusionArguments& a, int64_t k, bool with_log_probs) {
  PreparedFusion<A> prepared(a, k);
  const int64_t rows = prepared.rows.rows, classes = prepared.rows.classes;
  const auto options = at::TensorOptions().dtype(dtype_of<A>());
  Tensor values = at::empty({rows, k}, options), found = at::empty({rows, k}, options.dtype(at::kLong));
  Tensor mass = at::empty({rows}, options), log_probs = at::empty({0}, options);
  if (with_log_probs) log_probs = MemoryPool::empty({rows, classes}, dtype_of<A>());
  if (rows > 0) {
    A* value = values.mutable_data_ptr<A>();
    int64_t* column = found.mutable_data_ptr<int64_t>();
    A* masses = mass.mutable_data_ptr<A>();
    if (with_log_probs) prepared.call.log_probs = log_probs.mutable_data_ptr<A>();
    prepared.run([&](int64_t row, const LogSum& sum, const Candidate<A>* best) {
      const A total = static_cast<A>(sum.total > 0 ? sum.total : NAN);  // 0: all are -inf
      for (int64_t i = 0; i < k; ++i) {
        value[row * k + i] = a.normalize ? std::exp(best[i].value - best[0].value) / total : best[i].value;
        column[row * k + i] = best[i].column;
      }
      masses[row] = a.normalize ? static_cast<A>(sum.peak + std::log(sum.total)) : total;
    });
  }
  return {values, found, mass, log_probs};
}

FusionResult expert_fusion(at::TensorList logits LTK_FUSION(LTK_PARAMETER), int64_t k, bool with_log_probs) {
  const auto run = logits[0].scalar_type() == at::kDouble ? fuse<double> : fuse<float>;
  return run({logits, LTK_FUSION(LTK_VALUE)}, k, with_log_probs);
}

}  // namespace
}  // namespace ltk

TORCH_LIBRARY_IMPL(lt_kernels_native, CPU, m) { m.impl("expert_fusion", &ltk::expert_fusion); }
