// Compiles LTK_KERNELS, an operator's CPU kernels, for AVX2, FMA and F16C.
#if defined(__x86_64__)
// Headers first: what they define must not be compiled for this instruction set.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define LTK_ISA isa_avx2
#define LTK_BYTES 32
#define LTK_LEVEL 1
#include LTK_KERNELS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
