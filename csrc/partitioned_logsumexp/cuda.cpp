// The partitioned log-sum-exp of a block on a GPU: memory and launches. Nothing here waits for the device or looks at a
// value on it.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../cuda_host.h"
#include "arguments.h"
#include "cuda_call.h"
#include "statistics.h"

namespace ltk {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kManyBlocks = 512;      // rows are split until there are about so many
constexpr int64_t kShortestSplit = 4096;  // columns of a row that are not worth a split
constexpr int64_t kAlignment = 16;        // bytes that are read at a time

bool aligned(const Tensor& t) {
  const int64_t row = t.stride(0) * static_cast<int64_t>(t.element_size());
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kAlignment == 0 && (t.size(0) == 1 || row % kAlignment == 0);
}

template <class A>
struct Prepared {
  std::vector<Tensor> kept;
  cuda::PartitionedCall<A> call = {};
  cuda::Dtype dtype;
  at::ScalarType compute_dtype;
  int64_t rows, columns, group;  // elements of 16 bytes

  explicit Prepared(LTK_PARTITIONED_BLOCK_PARAMETERS)
      : rows(z.size(0)), columns(z.size(1)), group(kAlignment / static_cast<int64_t>(z.element_size())) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    TORCH_CHECK_VALUE(rows <= kMost && columns <= kMost, "z: got ", rows, " rows of ", columns,
                      " columns, expected at most 2147483647 of each");
    compute_dtype = std::is_same_v<A, double> ? at::kDouble : at::kFloat;
    dtype = z.scalar_type() == at::kDouble     ? cuda::kDouble
            : z.scalar_type() == at::kFloat    ? cuda::kFloat
            : z.scalar_type() == at::kBFloat16 ? cuda::kBFloat16
                                               : cuda::kHalf;
    kept.push_back(columns > 1 && z.stride(1) != 1 ? z.contiguous() : z);
    call.z = kept[0].const_data_ptr(), call.z_stride = kept[0].stride(0);
    call.rows = rows, call.columns = static_cast<int>(columns);
    call.query_label = pointer<int32_t>(query_label), call.key_label = pointer<int32_t>(key_label);
    call.exclude = pointer<int32_t>(exclude);
    call.first = first;
    call.key_bias = pointer<A>(key_bias), call.key_scale = pointer<A>(key_scale);
    call.learned_scale = pointer<A>(learned_scale);
    call.scale = scale;
    call.wide = aligned(kept[0]);
  }

  template <class V>
  const V* pointer(const OptionalTensor& t) {
    if (!t.has_value()) return nullptr;
    kept.push_back(t->contiguous());
    return kept.back().template const_data_ptr<V>();
  }

  // Threads of a block that takes so many columns, as many at a time as there are in 16 bytes.
  int threads(int64_t of_columns) const {
    const int64_t wanted = of_columns / (call.wide ? group : 1);
    return wanted <= 64 ? 32 : wanted <= 512 ? 128 : cuda::kPartitionedThreads;
  }
};

template <class A>
Tensor forward(LTK_PARTITIONED_BLOCK_PARAMETERS, bool with_slopes) {
  Prepared<A> prepared(LTK_PARTITIONED_BLOCK_ARGUMENTS);
  cuda::PartitionedCall<A>& call = prepared.call;
  const int64_t rows = prepared.rows, columns = prepared.columns;
  const auto options = z.options().dtype(prepared.compute_dtype);
  Tensor statistics = at::empty({kStatistics + (with_slopes ? kSlopes : 0), rows}, options);
  if (rows == 0) return statistics;
  call.statistics = statistics.mutable_data_ptr<A>();
  call.with_slopes = with_slopes;
  const int64_t most = std::max<int64_t>(1, columns / kShortestSplit);
  const int64_t wanted = std::min(most, std::max<int64_t>(1, kManyBlocks / rows));
  const int64_t each = (columns + wanted - 1) / wanted, group = prepared.group;
  call.split_columns = static_cast<int>(std::max<int64_t>(group, (each + group - 1) / group * group));
  call.splits = static_cast<int>(std::max<int64_t>(1, (columns + call.split_columns - 1) / call.split_columns));
  call.threads = prepared.threads(std::min<int64_t>(columns, call.split_columns));
  Tensor parts;
  if (call.splits > 1) {
    parts = at::empty({rows, call.splits, kStatistics + kSlopes}, options);
    call.parts = parts.mutable_data_ptr<A>();
  }
  device::check(cuda::partitioned_forward(call, prepared.dtype, device::current_stream()));
  return statistics;
}

template <class A>
std::tuple<Tensor, Tensor> backward(LTK_PARTITIONED_BLOCK_PARAMETERS, const Tensor& terms, const c10::List<bool>& needs,
                                    const OptionalTensor& out) {
  Prepared<A> prepared(LTK_PARTITIONED_BLOCK_ARGUMENTS);
  cuda::PartitionedCall<A>& call = prepared.call;
  const int64_t rows = prepared.rows, columns = prepared.columns;
  const bool need_sum = needs.get(1), need_weighted = needs.get(2);
  const auto options = z.options().dtype(prepared.compute_dtype);
  if (rows == 0 || columns == 0)
    return {at::zeros({need_sum ? columns : 0}, options), at::zeros({need_weighted ? columns : 0}, options)};
  prepared.kept.push_back(rows > 1 && terms.stride(1) != 1 ? terms.contiguous() : terms);
  call.terms = prepared.kept.back().template const_data_ptr<A>();
  call.terms_stride = prepared.kept.back().stride(0);
  if (needs.get(0)) {
    TORCH_INTERNAL_ASSERT(out.has_value() && (columns == 1 || out->stride(1) == 1));
    call.out = out->mutable_data_ptr(), call.out_stride = out->stride(0);
    call.wide = call.wide && aligned(*out);
  }
  const int64_t chunks = (rows + cuda::kRowsTogether - 1) / cuda::kRowsTogether;
  Tensor sum = at::empty({need_sum ? chunks : 0, columns}, options);
  Tensor weighted_sum = at::empty({need_weighted ? chunks : 0, columns}, options);
  call.sums = need_sum ? sum.mutable_data_ptr<A>() : nullptr;
  call.weighted_sums = need_weighted ? weighted_sum.mutable_data_ptr<A>() : nullptr;
  call.threads = std::min(128, prepared.threads(columns));
  const int64_t width = call.threads * (call.wide ? prepared.group : 1);
  call.tiles = static_cast<int>((columns + width - 1) / width);
  TORCH_CHECK_VALUE(chunks * call.tiles <= std::numeric_limits<int32_t>::max(), "z: got ", rows, " rows of ", columns,
                    " columns, too many for one call");
  device::check(cuda::partitioned_backward(call, prepared.dtype, device::current_stream()));
  const auto over_chunks = [&](const Tensor& t, bool needed) {
    return needed ? t.sum(0, false, at::kDouble).to(prepared.compute_dtype) : at::empty({0}, options);
  };
  return {over_chunks(sum, need_sum), over_chunks(weighted_sum, need_weighted)};
}

}  // namespace

Tensor partitioned_logsumexp_fwd_cuda(LTK_PARTITIONED_BLOCK_PARAMETERS, bool with_slopes) {
  const device::Guard guard(z.device());
  return z.scalar_type() == at::kDouble ? forward<double>(LTK_PARTITIONED_BLOCK_ARGUMENTS, with_slopes)
                                        : forward<float>(LTK_PARTITIONED_BLOCK_ARGUMENTS, with_slopes);
}

std::tuple<Tensor, Tensor> partitioned_logsumexp_bwd_cuda(LTK_PARTITIONED_BLOCK_PARAMETERS, const Tensor& terms,
                                                          const c10::List<bool>& needs, const OptionalTensor& out) {
  const device::Guard guard(z.device());
  return z.scalar_type() == at::kDouble ? backward<double>(LTK_PARTITIONED_BLOCK_ARGUMENTS, terms, needs, out)
                                        : backward<float>(LTK_PARTITIONED_BLOCK_ARGUMENTS, terms, needs, out);
}

}  // namespace ltk
