// Kernels that are compiled once per instruction set, as tables that the host code chooses from.
#pragma once

namespace ltk {

enum Dtype { kFloat, kBFloat16, kHalf, kDtypes };

// One operator's kernels of one instruction set: by the logits' dtype where float32 is computed with, and for float64.
template <template <class> class Kernels>
struct Tables {
  Kernels<float> single[kDtypes];
  Kernels<double> twofold;
};

// Filled from LTK_TABLE(T, A): kernels for logits of type T that compute in A.
#define LTK_TABLES \
  {{LTK_TABLE(float, float), LTK_TABLE(BFloat16, float), LTK_TABLE(Half, float)}, LTK_TABLE(double, double)}

#define LTK_DECLARE_TABLES(Kernels, name) \
  namespace isa_default {                 \
  extern const Tables<Kernels> name;      \
  }                                       \
  namespace isa_avx2 {                    \
  extern const Tables<Kernels> name;      \
  }                                       \
  namespace isa_avx512 {                  \
  extern const Tables<Kernels> name;      \
  }

}  // namespace ltk
