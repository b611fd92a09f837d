// Compiles LTK_KERNELS, an operator's CPU kernels, for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
// Headers first: what they define must not be compiled for this instruction set.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define LTK_ISA isa_avx512
#define LTK_BYTES 64
#define LTK_LEVEL 2
#include LTK_KERNELS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
