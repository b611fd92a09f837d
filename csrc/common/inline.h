// Functions with internal linkage in every file: the CPU kernels are compiled once per instruction set, and a function
// that the linker shared between those objects could carry instructions that the machine lacks.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LTK_INLINE static __host__ __device__ __forceinline__
#define LTK_UNROLL _Pragma("unroll")  // so that arrays indexed by the loop stay in registers
#else
#define LTK_INLINE static inline
#define LTK_UNROLL
#endif

namespace ltk {

LTK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace ltk
