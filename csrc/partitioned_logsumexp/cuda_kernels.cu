// The partitioned log-sum-exp of a block, as lt_kernels/ops/partitioned_logsumexp/arguments.py defines it.
//
// Forward: a block of threads per row, or several for each of few long rows. Each thread keeps maxima and sums of
// exponentials of both sides; they are merged in a fixed order. A group of columns is added to the negatives with its
// positive columns masked; positive columns, if the group has any, are added one by one. Backward: a thread has the
// same columns of kRowsTogether rows: it reads the columns' vectors once for them, and sums over rows need no atomics.
#include "../common/cuda/reductions.h"
#include "cuda_call.h"
#include "statistics.h"

namespace ltk::cuda {
namespace {

constexpr int kAhead = 4;  // groups of a thread that are read before the first one is used
// Blocks per processor that registers must leave room for: the compiler's own choice spills doubles.
constexpr int kBlocks = 2;

template <class T, int kCount>
LTK_DEVICE void load_columns(const typename T::Stored* from, typename T::A (&to)[kCount]) {
  if constexpr (kCount == T::kGroup) {
    const Group group = *reinterpret_cast<const Group*>(from);
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = T::at(group, i);
  } else {
    static_assert(kCount == 1);
    to[0] = T::get(*from);
  }
}

template <class T, int kCount>
LTK_DEVICE void store_columns(typename T::Stored* to, const typename T::A (&from)[kCount]) {
  if constexpr (kCount == T::kGroup) {
    *reinterpret_cast<Group*>(to) = T::pack(from);
  } else {
    static_assert(kCount == 1);
    *to = T::put(from[0]);
  }
}

template <class A>
LTK_DEVICE A load_scale(const PartitionedCall<A>& call) {
  return static_cast<A>(call.learned_scale ? call.scale * static_cast<double>(*call.learned_scale) : call.scale);
}

// The labels, scales and biases of consecutive columns.
template <class A, int kCount>
struct Keys {
  int32_t label[kCount];
  A own_scale[kCount], bias[kCount];

  LTK_MEMBER Keys(const PartitionedCall<A>& call, int column) {
    load_values<kCount>(call.key_label + column, label);
#pragma unroll
    for (int i = 0; i < kCount; ++i) own_scale[i] = A(1), bias[i] = A(0);
    if (call.key_scale) load_values<kCount>(call.key_scale + column, own_scale);
    if (call.key_bias) load_values<kCount>(call.key_bias + column, bias);
  }

  // One expression for both directions, which must agree to the last bit.
  LTK_MEMBER A logit(int i, A z, A scale) const { return std::fma(z, scale * own_scale[i], bias[i]); }
};

// Returns the column that a row leaves out, -1 if it is not in the block.
template <class A>
LTK_DEVICE int excluded_column(const PartitionedCall<A>& call, int64_t row) {
  if (call.exclude == nullptr) return -1;
  const int64_t column = call.exclude[row] - call.first;
  return column >= 0 && column < call.columns ? static_cast<int>(column) : -1;
}

// ------------------------------------------------------------------------------------------------------------ forward

// The largest u of a side and sums of exp(u - largest), and of that times key_scale z.
template <class A>
struct Side {
  A peak = -infinity<A>(), mass = 0, slope = 0;

  template <int kCount>
  LTK_MEMBER void add(const A (&u)[kCount], const A (&weight)[kCount]) {
    A high = u[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) high = std::fmax(high, u[i]);
    if (high > peak) {
      const A kept = fast_exp(peak - high);  // 0 before the first column
      mass *= kept, slope *= kept, peak = high;
    }
    const A base = reference(peak);
    A added = 0, added_slope = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const A e = fast_exp(u[i] - base);
      added += e, added_slope += e * weight[i];
    }
    mass += added, slope += added_slope;
  }

  // Makes the sums relative to a peak at least as high.
  LTK_MEMBER void move_to(A higher) {
    if (peak != -infinity<A>()) {
      const A kept = std::exp(peak - reference(higher));
      mass *= kept, slope *= kept;
    }
    peak = higher;
  }
};

// A row's sums over some columns.
template <class A>
struct RowSums {
  Side<A> negatives, positives;
  A sum = 0, count = 0;  // of z of the positives; their number

  LTK_MEMBER void merge(RowSums other) {
    const A negative_peak = std::fmax(negatives.peak, other.negatives.peak);
    const A positive_peak = std::fmax(positives.peak, other.positives.peak);
    negatives.move_to(negative_peak), other.negatives.move_to(negative_peak);
    positives.move_to(positive_peak), other.positives.move_to(positive_peak);
    negatives.mass += other.negatives.mass, negatives.slope += other.negatives.slope;
    positives.mass += other.positives.mass, positives.slope += other.positives.slope;
    sum += other.sum, count += other.count;
  }
};

template <class A>
LTK_DEVICE void write_side(const PartitionedCall<A>& call, int64_t row, const Side<A>& side, int first, int slope) {
  A* to = call.statistics + row;
  // maxima pass over NaN, sums do not
  const bool nan = side.mass != side.mass && side.peak != infinity<A>();
  to[first * call.rows] = nan ? side.mass : reference(side.peak);
  to[(first + 1) * call.rows] = side.mass;
  if (call.with_slopes) to[slope * call.rows] = side.slope;
}

template <class A>
LTK_DEVICE void write_statistics(const PartitionedCall<A>& call, int64_t row, const RowSums<A>& sums) {
  write_side(call, row, sums.negatives, kNegPeak, kNegSlope);
  write_side(call, row, sums.positives, kPosPeak, kPosSlope);
  call.statistics[kPosSum * call.rows + row] = sums.sum;
  call.statistics[kNumPos * call.rows + row] = sums.count;
}

template <class A, int kCount>
LTK_DEVICE void add_columns(RowSums<A>& sums, const PartitionedCall<A>& call, int column, const A (&z)[kCount], A scale,
                            int32_t label, int excluded) {
  const Keys<A, kCount> keys(call, column);
  A u[kCount], weight[kCount];
  bool any = false;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const bool other = keys.label[i] != label && column + i != excluded;
    u[i] = other ? keys.logit(i, z[i], scale) : -infinity<A>();
    weight[i] = other ? keys.own_scale[i] * z[i] : A(0);
    any |= keys.label[i] == label;
  }
  sums.negatives.add(u, weight);
  if (!any) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (keys.label[i] != label || column + i == excluded) continue;
    const A one[1] = {keys.logit(i, z[i], scale)}, one_weight[1] = {keys.own_scale[i] * z[i]};
    sums.positives.add(one, one_weight);
    sums.sum += z[i], sums.count += A(1);
  }
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kPartitionedThreads, kBlocks)
    partitioned_forward_kernel(const __grid_constant__ PartitionedCall<typename T::A> call) {
  using A = typename T::A;
  constexpr int kCount = kWide ? T::kGroup : 1;
  const int thread = thread_index(), threads = call.threads;
  const int64_t row = divide(block_index(), call.parts);
  const int part = static_cast<int>(block_index() - row * call.parts);
  const int begin = part * call.part_columns;
  const int columns = call.columns - begin < call.part_columns ? call.columns - begin : call.part_columns;
  const auto* z = static_cast<const typename T::Stored*>(call.z) + row * call.z_stride;
  const A scale = load_scale(call);
  const int32_t label = call.query_label[row];
  const int excluded = excluded_column(call, row);

  RowSums<A> sums;
  const int groups = columns / kCount;
  for (int g = thread; g < groups; g += kAhead * threads) {
    A values[kAhead][kCount];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (g + i * threads < groups) load_columns<T>(z + begin + (g + i * threads) * kCount, values[i]);
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (g + i * threads < groups)
        add_columns(sums, call, begin + (g + i * threads) * kCount, values[i], scale, label, excluded);
  }
  if (kWide && groups * kCount + thread < columns) {
    const int column = begin + groups * kCount + thread;
    const A value[1] = {T::get(z[column])};
    add_columns(sums, call, column, value, scale, label, excluded);
  }

  A* partial = reinterpret_cast<A*>(shared_memory());  // [threads / 32, 6]
  A* result = partial + threads / 32 * 6;              // [6]
  A peaks[2] = {sums.negatives.peak, sums.positives.peak};
  reduce_block<Maximum>(peaks, partial, result, threads);
  sums.negatives.move_to(result[0]), sums.positives.move_to(result[1]);
  A each[6] = {sums.negatives.mass, sums.negatives.slope, sums.positives.mass, sums.positives.slope, sums.sum,
               sums.count};
  reduce_block<Sum>(each, partial, result, threads);
  if (thread > 0) return;
  sums.negatives.mass = result[0], sums.negatives.slope = result[1];
  sums.positives.mass = result[2], sums.positives.slope = result[3];
  sums.sum = result[4], sums.count = result[5];
  if (call.parts == 1) {
    write_statistics(call, row, sums);
  } else {
    reinterpret_cast<RowSums<A>*>(call.part_sums)[block_index()] = sums;
  }
}

// Merges a row's parts; a thread per row.
template <class A>
__global__ void __launch_bounds__(kPartitionedThreads)
    partitioned_merge_kernel(const __grid_constant__ PartitionedCall<A> call) {
  const int64_t row = block_index() * kPartitionedThreads + thread_index();
  if (row >= call.rows) return;
  const auto* parts = reinterpret_cast<const RowSums<A>*>(call.part_sums) + row * call.parts;
  RowSums<A> all = parts[0];
  for (int i = 1; i < call.parts; ++i) all.merge(parts[i]);
  write_statistics(call, row, all);
}

// ----------------------------------------------------------------------------------------------------------- backward

// The scalars of a row that backward needs.
template <class A>
struct RowTerms {
  A peak, slope, positive_peak, positive_slope;
  A through_sum;  // a POS_SUM
  int32_t label;
  int excluded;
};

template <class T, int kCount, bool kSums>
LTK_DEVICE void write_columns(const PartitionedCall<typename T::A>& call, const RowTerms<typename T::A>* terms,
                              int64_t first, int rows, int column, int64_t chunk) {
  using A = typename T::A;
  using Stored = typename T::Stored;
  const Keys<A, kCount> keys(call, column);
  const A scale = load_scale(call);
  const Stored* z = static_cast<const Stored*>(call.z) + first * call.z_stride + column;
  Stored* out = call.out ? static_cast<Stored*>(call.out) + first * call.out_stride + column : nullptr;
  A sum[kCount] = {}, weighted[kCount] = {};
  for (int r = 0; r < rows; r += kAhead) {
    A values[kAhead][kCount];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (r + i < rows) load_columns<T>(z + (r + i) * call.z_stride, values[i]);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (r + i >= rows) continue;
      const RowTerms<A>& row = terms[r + i];
      A dz[kCount];
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const bool positive = keys.label[j] == row.label, left_out = column + j == row.excluded;
        const A u = keys.logit(j, values[i][j], scale);
        const A e = fast_exp(u - (positive ? row.positive_peak : row.peak));
        const A g = left_out ? A(0) : (positive ? row.positive_slope : row.slope) * e;
        dz[j] = scale * keys.own_scale[j] * g + (positive && !left_out ? row.through_sum : A(0));
        if constexpr (kSums) sum[j] += g, weighted[j] += g * (scale * values[i][j]);
      }
      if (out) store_columns<T>(out + (r + i) * call.out_stride, dz);
    }
  }
  if constexpr (kSums) {
    const int64_t to = chunk * call.columns + column;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (call.sums) call.sums[to + j] = sum[j];
      if (call.weighted_sums) call.weighted_sums[to + j] = weighted[j];
    }
  }
}

template <class T, bool kWide, bool kSums>
__global__ void __launch_bounds__(kPartitionedThreads, kBlocks)
    partitioned_backward_kernel(const __grid_constant__ PartitionedCall<typename T::A> call) {
  using A = typename T::A;
  constexpr int kCount = kWide ? T::kGroup : 1;
  const int thread = thread_index(), threads = call.threads;
  const int64_t chunk = divide(block_index(), call.tiles), first = chunk * kRowsTogether;
  const int tile = static_cast<int>(block_index() - chunk * call.tiles);
  const int rows = static_cast<int>(call.rows - first < kRowsTogether ? call.rows - first : kRowsTogether);
  auto* terms = reinterpret_cast<RowTerms<A>*>(shared_memory());  // [kRowsTogether]
  if (thread < rows) {
    const int64_t row = first + thread;
    const A* from = call.terms + row;
    terms[thread] = {from[0],
                     from[call.terms_stride],
                     from[2 * call.terms_stride],
                     from[3 * call.terms_stride],
                     load_scale(call) * from[4 * call.terms_stride],
                     call.query_label[row],
                     excluded_column(call, row)};
  }
  block_barrier();
  const int64_t column = (int64_t{tile} * threads + thread) * kCount;
  if (column >= call.columns) return;
  if (column + kCount <= call.columns) {
    write_columns<T, kCount, kSums>(call, terms, first, rows, static_cast<int>(column), chunk);
  } else {
    for (int c = static_cast<int>(column); c < call.columns; ++c)
      write_columns<T, 1, kSums>(call, terms, first, rows, c, chunk);
  }
}

// ------------------------------------------------------------------------------------------------------------ launches

template <class T>
Error launch_forward(const PartitionedCall<typename T::A>& call, Stream stream) {
  using A = typename T::A;
  const size_t shared = (call.threads / 32 + 1) * 6 * sizeof(A);
  const Launch l = {call.rows * call.parts, call.threads, shared, 1, stream};
  const Error error = call.wide ? launch(&partitioned_forward_kernel<T, true>, l, call)
                                : launch(&partitioned_forward_kernel<T, false>, l, call);
  if (call.parts == 1 || error != Error{}) return error;
  const int64_t blocks = (call.rows + kPartitionedThreads - 1) / kPartitionedThreads;
  return launch(&partitioned_merge_kernel<A>, {blocks, kPartitionedThreads, 0, 1, stream}, call);
}

template <class T>
Error launch_backward(const PartitionedCall<typename T::A>& call, Stream stream) {
  const int64_t chunks = (call.rows + kRowsTogether - 1) / kRowsTogether;
  const size_t shared = kRowsTogether * sizeof(RowTerms<typename T::A>);
  const Launch l = {chunks * call.tiles, call.threads, shared, 1, stream};
  if (call.sums || call.weighted_sums)
    return call.wide ? launch(&partitioned_backward_kernel<T, true, true>, l, call)
                     : launch(&partitioned_backward_kernel<T, false, true>, l, call);
  return call.wide ? launch(&partitioned_backward_kernel<T, true, false>, l, call)
                   : launch(&partitioned_backward_kernel<T, false, false>, l, call);
}

}  // namespace

template <class A>
device::Error partitioned_forward(const PartitionedCall<A>& call, Dtype dtype, device::Stream stream) {
  return with_elements<A>(dtype, [&](auto element) { return launch_forward<decltype(element)>(call, stream); });
}
template device::Error partitioned_forward(const PartitionedCall<float>&, Dtype, device::Stream);
template device::Error partitioned_forward(const PartitionedCall<double>&, Dtype, device::Stream);

template <class A>
device::Error partitioned_backward(const PartitionedCall<A>& call, Dtype dtype, device::Stream stream) {
  return with_elements<A>(dtype, [&](auto element) { return launch_backward<decltype(element)>(call, stream); });
}
template device::Error partitioned_backward(const PartitionedCall<float>&, Dtype, device::Stream);
template device::Error partitioned_backward(const PartitionedCall<double>&, Dtype, device::Stream);

}  // namespace ltk::cuda
