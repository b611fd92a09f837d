// Tables of the kernels that are compiled once per instruction set; the host code chooses one.
#pragma once

#include "../dtypes.h"

namespace ltk {

// One operator's kernels for one instruction set: by dtype for logits computed in float32, and for float64.
template <template <class> class Kernels>
struct Tables {
  Kernels<float> single[kDouble];
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
