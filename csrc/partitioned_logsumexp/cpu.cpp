// The partitioned log-sum-exp of a block on the CPU; the arithmetic is in cpu_kernels.h.
#include "arguments.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../cpu_host.h"
#include "cpu_call.h"
#include "statistics.h"

namespace ltk {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kStrip = 512;  // columns whose sums over rows are kept in the first-level cache
constexpr int64_t kFewColumns = 2048;
constexpr int64_t kNarrowStrip = 128;  // where there are few, so that all threads have some
constexpr int64_t kShortSums = 64;     // rows that are added up in the compute dtype; their sums are, in double

template <class A>
struct Prepared {
  std::vector<Tensor> kept;
  PartitionedCall<A> call = {};
  const PartitionedKernels<A>* kernels;

  explicit Prepared(LTK_PARTITIONED_BLOCK_PARAMETERS) {
    call.rows = z.size(0), call.columns = z.size(1);
    kept.push_back(call.columns > 1 && z.stride(1) != 1 ? z.contiguous() : z);
    call.z = kept[0].const_data_ptr(), call.z_stride = kept[0].stride(0);
    call.query_label = pointer<int32_t>(query_label), call.key_label = pointer<int32_t>(key_label);
    if (exclude.has_value()) call.exclude = pointer<int32_t>(*exclude);
    call.first = first;
    if (key_bias.has_value()) call.key_bias = pointer<A>(*key_bias);
    if (key_scale.has_value()) call.key_scale = pointer<A>(*key_scale);
    call.scale = static_cast<A>(learned_scale.has_value() ? scale * learned_scale->item<double>() : scale);
    kernels = &kernels_of<A>(LTK_TABLES_HERE(partitioned_logsumexp), z.scalar_type());
  }

  template <class V>
  const V* pointer(const Tensor& t) {
    kept.push_back(t.contiguous());
    return kept.back().template const_data_ptr<V>();
  }
};

// The statistics of one row from the sums over its ranges of columns, in their order.
template <class A>
void finish(const PartitionedSums<A>* parts, int64_t count, bool with_slopes, A* statistics, int64_t stride) {
  double sum = 0, positives = 0;
  for (int64_t i = 0; i < count; ++i) sum += parts[i].sum, positives += static_cast<double>(parts[i].count);
  statistics[kPosSum * stride] = static_cast<A>(sum);
  statistics[kNumPos * stride] = static_cast<A>(positives);
  for (int side = 0; side < 2; ++side) {
    A peak = -std::numeric_limits<A>::infinity();
    double mass = 0, slope = 0;
    for (int64_t i = 0; i < count; ++i) peak = std::max(peak, parts[i].peak[side]);
    const double base = std::isinf(peak) && peak < 0 ? 0 : peak;
    for (int64_t i = 0; i < count; ++i) {
      const double kept = count == 1 ? 1 : std::exp(static_cast<double>(parts[i].peak[side]) - base);
      const bool none = parts[i].mass[side] == 0;
      mass += none ? 0 : parts[i].mass[side] * kept, slope += parts[i].slope[side] * kept;
    }
    if (std::isnan(mass)) mass = slope = std::numeric_limits<double>::quiet_NaN();
    // maxima pass over NaN
    const double largest = std::isnan(mass) && !(std::isinf(peak) && peak > 0) ? mass : base;
    statistics[(side == 0 ? kNegPeak : kPosPeak) * stride] = static_cast<A>(largest);
    statistics[(side == 0 ? kNegMass : kPosMass) * stride] = static_cast<A>(mass);
    if (with_slopes) statistics[(side == 0 ? kNegSlope : kPosSlope) * stride] = static_cast<A>(slope);
  }
}

template <class A>
Tensor forward(LTK_PARTITIONED_BLOCK_PARAMETERS, bool with_slopes) {
  Prepared<A> prepared(LTK_PARTITIONED_BLOCK_ARGUMENTS);
  PartitionedCall<A>& call = prepared.call;
  call.with_slopes = with_slopes;
  const int64_t rows = call.rows, columns = call.columns;
  Tensor result = at::empty({kStatistics + (with_slopes ? kSlopes : 0), rows}, z.options().dtype(dtype_of<A>()));
  A* statistics = result.template mutable_data_ptr<A>();
  const int64_t ranges = std::max<int64_t>(1, (columns + kRange - 1) / kRange);
  std::vector<PartitionedSums<A>> parts(ranges > 1 ? rows * ranges : 0);
  at::parallel_for(0, rows * ranges, grain(std::min(columns, kRange)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / ranges, from = i % ranges * kRange;
      const auto sums = prepared.kernels->sums(call, row, from, std::min(columns, from + kRange));
      if (ranges > 1) {
        parts[i] = sums;
      } else {
        finish(&sums, 1, with_slopes, statistics + row, rows);
      }
    }
  });
  if (ranges > 1)
    for (int64_t row = 0; row < rows; ++row) finish(&parts[row * ranges], ranges, with_slopes, statistics + row, rows);
  return result;
}

template <class A>
std::tuple<Tensor, Tensor> backward(LTK_PARTITIONED_BLOCK_PARAMETERS, const Tensor& terms, const c10::List<bool>& needs,
                                    const OptionalTensor& out) {
  Prepared<A> prepared(LTK_PARTITIONED_BLOCK_ARGUMENTS);
  PartitionedCall<A>& call = prepared.call;
  const int64_t rows = call.rows, columns = call.columns;
  const bool need_sum = needs.get(1), need_weighted = needs.get(2);
  const auto options = z.options().dtype(dtype_of<A>());
  Tensor sum = at::zeros({need_sum ? columns : 0}, options);
  Tensor weighted_sum = at::zeros({need_weighted ? columns : 0}, options);
  if (rows == 0 || columns == 0) return {sum, weighted_sum};
  const Tensor upstream = rows > 1 && terms.stride(1) != 1 ? terms.contiguous() : terms;
  call.terms = upstream.const_data_ptr<A>(), call.terms_stride = upstream.stride(0);
  if (needs.get(0)) {
    TORCH_INTERNAL_ASSERT(out.has_value() && (columns == 1 || out->stride(1) == 1));
    call.out = out->mutable_data_ptr(), call.out_stride = out->stride(0);
  }
  if (!need_sum && !need_weighted) {
    const int64_t ranges = (columns + kRange - 1) / kRange;
    at::parallel_for(0, rows * ranges, grain(std::min(columns, kRange)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t from = i % ranges * kRange;
        prepared.kernels->gradient(call, i / ranges, from, std::min(columns, from + kRange), nullptr, nullptr);
      }
    });
    return {sum, weighted_sum};
  }
  A* sums = need_sum ? sum.template mutable_data_ptr<A>() : nullptr;
  A* weighted_sums = need_weighted ? weighted_sum.template mutable_data_ptr<A>() : nullptr;
  const int64_t width = columns < kFewColumns ? kNarrowStrip : kStrip;
  at::parallel_for(0, (columns + width - 1) / width, grain(rows * width), [&](int64_t begin, int64_t end) {
    A* short_sum = scratch<A>(2 * kStrip);
    A* short_weighted = short_sum + kStrip;
    std::vector<double> total(2 * kStrip);
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t from = strip * width, to = std::min(columns, from + width);
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t row = 0; row < rows;) {
        std::fill_n(short_sum, 2 * kStrip, A(0));
        for (const int64_t pause = std::min(rows, row + kShortSums); row < pause; ++row)
          prepared.kernels->gradient(call, row, from, to, need_sum ? short_sum : nullptr,
                                     need_weighted ? short_weighted : nullptr);
        for (int64_t j = 0; j < 2 * kStrip; ++j) total[j] += short_sum[j];
      }
      for (int64_t j = from; j < to; ++j) {
        if (sums) sums[j] = static_cast<A>(total[j - from]);
        if (weighted_sums)
          weighted_sums[j] = static_cast<A>(static_cast<double>(call.scale) * total[kStrip + j - from]);
      }
    }
  });
  return {sum, weighted_sum};
}

}  // namespace

Tensor partitioned_logsumexp_fwd_cpu(LTK_PARTITIONED_BLOCK_PARAMETERS, bool with_slopes) {
  return z.scalar_type() == at::kDouble ? forward<double>(LTK_PARTITIONED_BLOCK_ARGUMENTS, with_slopes)
                                        : forward<float>(LTK_PARTITIONED_BLOCK_ARGUMENTS, with_slopes);
}

std::tuple<Tensor, Tensor> partitioned_logsumexp_bwd_cpu(LTK_PARTITIONED_BLOCK_PARAMETERS, const Tensor& terms,
                                                         const c10::List<bool>& needs, const OptionalTensor& out) {
  return z.scalar_type() == at::kDouble ? backward<double>(LTK_PARTITIONED_BLOCK_ARGUMENTS, terms, needs, out)
                                        : backward<float>(LTK_PARTITIONED_BLOCK_ARGUMENTS, terms, needs, out);
}

}  // namespace ltk
