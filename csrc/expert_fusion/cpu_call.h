// Arguments of the CPU kernels, which are compiled once per instruction set.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/cpu/tables.h"
#include "../common/inline.h"

namespace ltk {

template <class A>
struct FusionCall {
  int64_t experts, classes;
  const void* const* x;     // [experts] logits
  const int64_t* x_stride;  // [experts] from row to row
  const A* weights;         // [experts]
  const A* shift;           // [classes], or null
  A scale;
  A* log_probs;  // [rows, classes], or null
};

// A sum of exponentials relative to the largest exponent; its logarithm is peak + log(total).
struct LogSum {
  double peak, total;
};

constexpr LogSum kEmptySum = {-INFINITY, 0};

LTK_INLINE void add(LogSum& sum, const LogSum& part) {
  if (part.peak > sum.peak) {
    sum = {part.peak, sum.total * std::exp(sum.peak - part.peak) + part.total};
  } else {
    sum.total += part.peak == sum.peak ? part.total : part.total * std::exp(part.peak - sum.peak);
  }
}

template <class A>
struct Candidate {
  A value;
  int64_t column;
};

// The first k candidates offered so far, as a heap whose root is the last of them.
template <class A>
struct Top {
  Candidate<A>* items;
  int64_t k, size;
};

template <class A>
LTK_INLINE bool precedes(const Candidate<A>& a, const Candidate<A>& b) {  // NaN first, the lower class where equal
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan != b_nan) return a_nan;
  return a.value > b.value || ((a_nan || a.value == b.value) && a.column < b.column);
}

// Puts c into a heap of that size in place of its root.
template <class A>
LTK_INLINE void sift_down(Candidate<A>* items, int64_t size, const Candidate<A>& c) {
  int64_t place = 0;
  for (int64_t child = 1; child < size; child = 2 * place + 1) {
    if (child + 1 < size && precedes(items[child], items[child + 1])) ++child;
    if (!precedes(c, items[child])) break;
    items[place] = items[child];
    place = child;
  }
  items[place] = c;
}

template <class A>
LTK_INLINE void offer(Top<A>& top, const Candidate<A>& c) {
  if (top.size == top.k) {
    if (precedes(c, top.items[0])) sift_down(top.items, top.size, c);
    return;
  }
  int64_t place = top.size++;
  for (; place > 0 && precedes(top.items[(place - 1) / 2], c); place = (place - 1) / 2)
    top.items[place] = top.items[(place - 1) / 2];
  top.items[place] = c;
}

template <class A>
LTK_INLINE void sort(Top<A>& top) {  // the items are then no heap
  for (int64_t size = top.size - 1; size > 0; --size) {
    const Candidate<A> last = top.items[0];
    sift_down(top.items, size, Candidate<A>(top.items[size]));
    top.items[size] = last;
  }
}

template <class A>
struct FusionKernels {
  // Returns the log-sum-exp of columns [begin, end) of a row; offers them to `top`, and writes u to log_probs, if any.
  LogSum (*fuse_part)(const FusionCall<A>&, int64_t row, int64_t begin, int64_t end, Top<A>& top);
  // Turns u into u - log-sum-exp in log_probs.
  void (*subtract_log_sum)(const FusionCall<A>&, int64_t row, int64_t begin, int64_t end, const LogSum&);
  // Returns u of one column.
  A (*fuse_column)(const FusionCall<A>&, int64_t row, int64_t column);
};

LTK_DECLARE_TABLES(FusionKernels, expert_fusion)

}  // namespace ltk
