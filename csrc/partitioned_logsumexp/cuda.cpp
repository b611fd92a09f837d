// The partitioned log-sum-exp of a block on a GPU: memory and launches. The host never waits for the device nor
// reads a value on it.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../common/cuda/host.h"
#include "cuda_call.h"
#include "prepared.h"
#include "statistics.h"

namespace ltk {
namespace {

constexpr int64_t kManyBlocks = 512;     // rows are cut until there are about so many
constexpr int64_t kShortestPart = 4096;  // fewer columns are not worth a part
constexpr int64_t kAlignment = 16;       // bytes that are read at a time

bool aligned(const Tensor& t) {
  const int64_t row = t.stride(0) * static_cast<int64_t>(t.element_size());
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kAlignment == 0 && (t.size(0) == 1 || row % kAlignment == 0);
}

const Block& check_sizes(const Block& block) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const int64_t rows = block.z.size(0), columns = block.z.size(1);
  TORCH_CHECK_VALUE(rows <= kMost && columns <= kMost, "z: got ", rows, " rows of ", columns,
                    " columns, expected at most 2147483647 of each");
  return block;
}

template <class A>
struct Prepared : PreparedBlock<A, cuda::PartitionedCall<A>> {
  using PreparedBlock<A, cuda::PartitionedCall<A>>::call;
  Dtype dtype;
  int64_t rows, columns, group;  // group: elements of 16 bytes

  explicit Prepared(const Block& block)
      : PreparedBlock<A, cuda::PartitionedCall<A>>(check_sizes(block)),
        dtype(kernel_dtype(block.z.scalar_type())),
        rows(block.z.size(0)),
        columns(block.z.size(1)),
        group(kAlignment / static_cast<int64_t>(block.z.element_size())) {
    call.learned_scale = this->template pointer<A>(block.learned_scale);
    call.scale = block.scale;
    call.wide = aligned(this->kept[0]);
  }

  // Returns the threads of a block that takes so many columns, each as many at a time as 16 bytes hold.
  int threads(int64_t of_columns) const {
    const int64_t wanted = of_columns / (call.wide ? group : 1);
    return wanted <= 64 ? 32 : wanted <= 512 ? 128 : cuda::kPartitionedThreads;
  }
};

template <class A>
Tensor forward(const Block& block, bool with_slopes) {
  Prepared<A> prepared(block);
  cuda::PartitionedCall<A>& call = prepared.call;
  const int64_t rows = prepared.rows, columns = prepared.columns;
  const auto options = block.z.options().dtype(dtype_of<A>());
  Tensor statistics = at::empty({kStatistics + (with_slopes ? kSlopes : 0), rows}, options);
  if (rows == 0) return statistics;
  call.statistics = statistics.mutable_data_ptr<A>();
  call.with_slopes = with_slopes;
  const int64_t most = std::max<int64_t>(1, columns / kShortestPart);
  const int64_t wanted = std::min(most, std::max<int64_t>(1, kManyBlocks / rows));
  const int64_t each = ceil_div(columns, wanted), group = prepared.group;
  call.part_columns = static_cast<int>(std::max<int64_t>(group, ceil_div(each, group) * group));
  call.parts = static_cast<int>(std::max<int64_t>(1, ceil_div(columns, call.part_columns)));
  call.threads = prepared.threads(std::min<int64_t>(columns, call.part_columns));
  Tensor part_sums;
  if (call.parts > 1) {
    part_sums = at::empty({rows, call.parts, kStatistics + kSlopes}, options);
    call.part_sums = part_sums.mutable_data_ptr<A>();
  }
  device::check(cuda::partitioned_forward(call, prepared.dtype, device::current_stream()));
  return statistics;
}

template <class A>
std::tuple<Tensor, Tensor> backward(const Block& block, const Tensor& terms, const c10::List<bool>& needs,
                                    const OptionalTensor& out) {
  Prepared<A> prepared(block);
  cuda::PartitionedCall<A>& call = prepared.call;
  const int64_t rows = prepared.rows, columns = prepared.columns;
  const bool need_sum = needs.get(1), need_weighted = needs.get(2);
  const auto options = block.z.options().dtype(dtype_of<A>());
  if (rows == 0 || columns == 0)
    return {at::zeros({need_sum ? columns : 0}, options), at::zeros({need_weighted ? columns : 0}, options)};
  prepared.set_upstream(terms, needs, out);
  call.wide = call.wide && (call.out == nullptr || aligned(*out));
  const int64_t chunks = ceil_div(rows, cuda::kRowsTogether);
  Tensor sum = at::empty({need_sum ? chunks : 0, columns}, options);
  Tensor weighted_sum = at::empty({need_weighted ? chunks : 0, columns}, options);
  call.sums = need_sum ? sum.mutable_data_ptr<A>() : nullptr;
  call.weighted_sums = need_weighted ? weighted_sum.mutable_data_ptr<A>() : nullptr;
  call.threads = std::min(128, prepared.threads(columns));
  const int64_t width = call.threads * (call.wide ? prepared.group : 1);
  call.tiles = static_cast<int>(ceil_div(columns, width));
  TORCH_CHECK_VALUE(chunks * call.tiles <= std::numeric_limits<int32_t>::max(), "z: got ", rows, " rows of ", columns,
                    " columns, too many for one call");
  device::check(cuda::partitioned_backward(call, prepared.dtype, device::current_stream()));
  const auto over_chunks = [&](const Tensor& t, bool needed) {
    return needed ? t.sum(0, false, at::kDouble).to(dtype_of<A>()) : at::empty({0}, options);
  };
  return {over_chunks(sum, need_sum), over_chunks(weighted_sum, need_weighted)};
}

Tensor partitioned_logsumexp_fwd(const Tensor& z LTK_BLOCK(LTK_PARAMETER), bool with_slopes) {
  const device::Guard guard(z.device());
  const auto run = z.scalar_type() == at::kDouble ? forward<double> : forward<float>;
  return run({z, LTK_BLOCK(LTK_VALUE)}, with_slopes);
}

std::tuple<Tensor, Tensor> partitioned_logsumexp_bwd(const Tensor& z LTK_BLOCK(LTK_PARAMETER), const Tensor& terms,
                                                     const c10::List<bool>& needs, const OptionalTensor& out) {
  const device::Guard guard(z.device());
  const auto run = z.scalar_type() == at::kDouble ? backward<double> : backward<float>;
  return run({z, LTK_BLOCK(LTK_VALUE)}, terms, needs, out);
}

}  // namespace
}  // namespace ltk

TORCH_LIBRARY_IMPL(LTK_LIBRARY, LTK_CUDA, m) {
  m.impl("partitioned_logsumexp_fwd", &ltk::partitioned_logsumexp_fwd);
  m.impl("partitioned_logsumexp_bwd", &ltk::partitioned_logsumexp_bwd);
}
