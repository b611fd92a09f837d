// Sums over rows on the CPU, in an order that depends on the number of rows alone.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

namespace ltk {

// Returns the sum of values, as Result.
template <class Result, class A>
Result ordered_sum(const A* values, int64_t count) {
  std::array<double, 8> sums = {};  // a single one would wait for itself at each addition
  for (int64_t i = 0; i < count; i += 8)
    for (int64_t j = i; j < std::min(count, i + 8); ++j) sums[j - i] += static_cast<double>(values[j]);
  double total = 0;
  for (const double sum : sums) total += sum;
  return static_cast<Result>(total);
}

// Returns 1 / total class weight of the targets that are not ignored; inf over none. Classes out of range count as the
// nearest one: the kernels refuse them.
template <class A>
A mean_coefficient(const int64_t* target, int64_t rows, const A* weight, int64_t ignore_index, int64_t classes) {
  double total = 0;
  for (int64_t row = 0; row < rows; ++row)
    if (target[row] != ignore_index)
      total += weight ? static_cast<double>(weight[std::clamp<int64_t>(target[row], 0, classes - 1)]) : 1.0;
  return A(1) / static_cast<A>(total);
}

}  // namespace ltk
