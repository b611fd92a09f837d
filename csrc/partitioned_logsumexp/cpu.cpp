// The partitioned log-sum-exp of a block on the CPU; the arithmetic is in cpu_kernels.h.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/cpu/host.h"
#include "cpu_block.h"
#include "cpu_call.h"
#include "prepared.h"
#include "statistics.h"
#include "schema.h"

namespace ltk {
namespace {

constexpr int64_t kStrip = 512;  // columns whose sums over rows are kept in the first-level cache
constexpr int64_t kFewColumns = 2048;
constexpr int64_t kNarrowStrip = 128;  // where there are few, so that all threads have some
constexpr int64_t kShortSums = 64;     // rows that are added up in the compute dtype; their sums are, in double

template <class A>
struct Prepared : PreparedBlock<A, PartitionedCall<A>> {
  using PreparedBlock<A, PartitionedCall<A>>::call;
  const PartitionedKernels<A>* kernels;

  explicit Prepared(const Block& block) : PreparedBlock<A, PartitionedCall<A>>(block) {
    const double learned = block.learned_scale.has_value() ? block.learned_scale->item<double>() : 1.0;
    call.scale = static_cast<A>(block.scale * learned);
    kernels = &kernels_of<A>(LTK_TABLES_HERE(partitioned_logsumexp), block.z.scalar_type());
  }
};

// The statistics of one row from the sums over its parts, in their order.
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
Tensor forward(const Block& block, bool with_slopes) {
  Prepared<A> prepared(block);
  PartitionedCall<A>& call = prepared.call;
  call.with_slopes = with_slopes;
  const int64_t rows = call.rows, columns = call.columns;
  Tensor result = at::empty({kStatistics + (with_slopes ? kSlopes : 0), rows}, block.z.options().dtype(dtype_of<A>()));
  A* statistics = result.template mutable_data_ptr<A>();
  const int64_t parts = std::max<int64_t>(1, ceil_div(columns, kPart));
  std::vector<PartitionedSums<A>> part_sums(parts > 1 ? rows * parts : 0);
  at::parallel_for(0, rows * parts, grain(std::min(columns, kPart)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / parts, from = i % parts * kPart;
      const auto sums = prepared.kernels->sums(call, row, from, std::min(columns, from + kPart));
      if (parts > 1) {
        part_sums[i] = sums;
      } else {
        finish(&sums, 1, with_slopes, statistics + row, rows);
      }
    }
  });
  if (parts > 1)
    for (int64_t row = 0; row < rows; ++row)
      finish(&part_sums[row * parts], parts, with_slopes, statistics + row, rows);
  return result;
}

template <class A>
std::tuple<Tensor, Tensor> backward(const Block& block, const Tensor& terms, const c10::List<bool>& needs,
                                    const OptionalTensor& out) {
  Prepared<A> prepared(block);
  PartitionedCall<A>& call = prepared.call;
  const int64_t rows = call.rows, columns = call.columns;
  const bool need_sum = needs.get(1), need_weighted = needs.get(2);
  const auto options = block.z.options().dtype(dtype_of<A>());
  Tensor sum = at::zeros({need_sum ? columns : 0}, options);
  Tensor weighted_sum = at::zeros({need_weighted ? columns : 0}, options);
  if (rows == 0 || columns == 0) return {sum, weighted_sum};
  prepared.set_upstream(terms, needs, out);
  if (!need_sum && !need_weighted) {
    const int64_t parts = ceil_div(columns, kPart);
    at::parallel_for(0, rows * parts, grain(std::min(columns, kPart)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t from = i % parts * kPart;
        prepared.kernels->gradient(call, i / parts, from, std::min(columns, from + kPart), nullptr, nullptr);
      }
    });
    return {sum, weighted_sum};
  }
  A* sums = need_sum ? sum.template mutable_data_ptr<A>() : nullptr;
  A* weighted_sums = need_weighted ? weighted_sum.template mutable_data_ptr<A>() : nullptr;
  const int64_t width = columns < kFewColumns ? kNarrowStrip : kStrip;
  at::parallel_for(0, ceil_div(columns, width), grain(rows * width), [&](int64_t begin, int64_t end) {
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

Tensor partitioned_logsumexp_fwd(const Tensor& z LTK_BLOCK(LTK_PARAMETER), bool with_slopes) {
  return run_statistics({z, LTK_BLOCK(LTK_VALUE)}, with_slopes);
}

std::tuple<Tensor, Tensor> partitioned_logsumexp_bwd(const Tensor& z LTK_BLOCK(LTK_PARAMETER), const Tensor& terms,
                                                     const c10::List<bool>& needs, const OptionalTensor& out) {
  return run_gradient({z, LTK_BLOCK(LTK_VALUE)}, terms, needs, out);
}

}  // namespace

Tensor run_statistics(const Block& block, bool with_slopes) {
  const auto run = block.z.scalar_type() == at::kDouble ? forward<double> : forward<float>;
  return run(block, with_slopes);
}

std::tuple<Tensor, Tensor> run_gradient(const Block& block, const Tensor& terms, const c10::List<bool>& needs,
                                        const OptionalTensor& out) {
  const auto run = block.z.scalar_type() == at::kDouble ? backward<double> : backward<float>;
  return run(block, terms, needs, out);
}

}  // namespace ltk

TORCH_LIBRARY_IMPL(lt_kernels_native, CPU, m) {
  m.impl("partitioned_logsumexp_fwd", &ltk::partitioned_logsumexp_fwd);
  m.impl("partitioned_logsumexp_bwd", &ltk::partitioned_logsumexp_bwd);
}
