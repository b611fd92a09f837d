// The operators on a block of similarities; lt_kernels/ops/partitioned_logsumexp/arguments.py defines them.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#define LTK_PARTITIONED_BLOCK_SCHEMA                                                                                  \
  "Tensor z, Tensor query_label, Tensor key_label, Tensor? exclude, int first, Tensor? key_bias, Tensor? key_scale, " \
  "Tensor? learned_scale, float scale"

#define LTK_PARTITIONED_LOGSUMEXP_SCHEMAS(m)                                                        \
  m.def("partitioned_logsumexp_fwd(" LTK_PARTITIONED_BLOCK_SCHEMA ", bool with_slopes) -> Tensor"); \
  m.def("partitioned_logsumexp_bwd(" LTK_PARTITIONED_BLOCK_SCHEMA                                   \
        ", Tensor terms, bool[] needs, Tensor(a!)? out) -> (Tensor sum, Tensor weighted_sum)")

#define LTK_PARTITIONED_BLOCK_PARAMETERS                                                                \
  const at::Tensor &z, const at::Tensor &query_label, const at::Tensor &key_label,                      \
      const std::optional<at::Tensor>&exclude, int64_t first, const std::optional<at::Tensor>&key_bias, \
      const std::optional<at::Tensor>&key_scale, const std::optional<at::Tensor>&learned_scale, double scale

#define LTK_PARTITIONED_BLOCK_ARGUMENTS \
  z, query_label, key_label, exclude, first, key_bias, key_scale, learned_scale, scale

namespace ltk {

#define LTK_DECLARE(device)                                                                          \
  at::Tensor partitioned_logsumexp_fwd_##device(LTK_PARTITIONED_BLOCK_PARAMETERS, bool with_slopes); \
  std::tuple<at::Tensor, at::Tensor> partitioned_logsumexp_bwd_##device(                             \
      LTK_PARTITIONED_BLOCK_PARAMETERS, const at::Tensor& terms, const c10::List<bool>& needs,       \
      const std::optional<at::Tensor>& out);
LTK_DECLARE(cpu)
LTK_DECLARE(cuda)
#undef LTK_DECLARE

}  // namespace ltk
