// The layouts of [N, C, K] tensors: rows (classes are contiguous) or panels (positions are contiguous).
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <limits>

#include "../common/tensors.h"

namespace ltk {

struct Layout {
  Tensor input;           // the given one, or a contiguous copy where neither layout fits
  int64_t classes, rows;  // rows of the call: N * K
  int64_t n, k;           // as the kernels count them
  bool is_rows;
  bool swapped = false;  // [N, C, 1] with contiguous samples, run as one sample of N positions

  explicit Layout(const Tensor& given) : input(given), classes(given.size(1)), rows(given.size(0) * given.size(2)) {
    const int64_t samples = given.size(0), positions = given.size(2);
    TORCH_CHECK_VALUE(classes <= std::numeric_limits<int32_t>::max(), "input: got ", classes,
                      " classes, expected at most 2147483647");
    is_rows = classes == 1 || given.stride(1) == 1;
    swapped = !is_rows && positions == 1 && given.stride(0) == 1;
    if (!is_rows && !swapped && (positions == 1 || given.stride(2) != 1)) {
      input = given.contiguous();
      is_rows = positions == 1;
    }
    n = swapped ? 1 : samples;
    k = swapped ? samples : positions;
  }

  bool fits(const Tensor& t) const {
    if (classes == 1 && is_rows) return true;
    return is_rows ? t.stride(1) == 1 : (swapped ? t.stride(0) == 1 : t.stride(2) == 1);
  }

  void strides(const Tensor& t, int64_t* s_n, int64_t* s_c, int64_t* s_k) const {
    *s_n = swapped ? 0 : t.stride(0);
    *s_c = is_rows ? 1 : t.stride(1);
    *s_k = swapped ? t.stride(0) : t.stride(2);
  }

  // Returns a tensor like t whose strides fit: t itself, or a fresh one.
  Tensor fitting(const Tensor& t) const {
    if (fits(t)) return t;
    if (is_rows) return at::empty({t.size(0), t.size(2), t.size(1)}, t.options()).transpose(1, 2);
    if (swapped) return at::empty({t.size(1), t.size(2), t.size(0)}, t.options()).permute({2, 0, 1});
    return at::empty(t.sizes(), t.options());
  }
};

// Refuses an `out` for the gradient of `input` that is neither the same memory nor apart from it.
inline void check_out(const Tensor& out, const Tensor& input) {
  TORCH_CHECK_VALUE(
      out.sizes() == input.sizes() && out.scalar_type() == input.scalar_type() && out.device() == input.device(),
      "out: got ", out.toString(), " ", out.sizes(), ", expected like input ", input.toString(), " ", input.sizes());
  at::assert_no_internal_overlap(out);
  at::assert_no_partial_overlap(out, input);
}

}  // namespace ltk
