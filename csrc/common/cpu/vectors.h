// Vectors of the CPU kernels: arithmetic, exponentials, and storage of logits in every dtype. Each operator's
// cpu_<isa>.cpp includes it through <isa>.h, which defines the namespace (LTK_ISA), the vector width in
// bytes (LTK_BYTES) and the level (LTK_LEVEL: 0 baseline, 1 AVX2, 2 AVX-512). All functions have internal linkage.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../inline.h"

namespace ltk {
namespace LTK_ISA {
namespace {

// ------------------------------------------------------------------------------------------------------- arithmetic

template <class A>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(LTK_BYTES)));
  typedef float U __attribute__((vector_size(LTK_BYTES), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(LTK_BYTES)));
  typedef uint32_t Bits __attribute__((vector_size(LTK_BYTES)));
  typedef uint16_t H __attribute__((vector_size(LTK_BYTES / 2)));
  typedef uint16_t HU __attribute__((vector_size(LTK_BYTES / 2), aligned(2), may_alias));
  static constexpr int64_t W = LTK_BYTES / 4;
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(LTK_BYTES)));
  typedef double U __attribute__((vector_size(LTK_BYTES), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(LTK_BYTES)));
  static constexpr int64_t W = LTK_BYTES / 8;
};

template <class A>
using Vec = typename Simd<A>::V;
template <class A>
using Int = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
using F = Simd<float>;

// Terms that one accumulator takes before it is added to a second one: sums of many float32 terms keep their exactness.
constexpr int64_t kTerms = 64;

template <class A>
LTK_INLINE Vec<A> splat(A value) {
  return value - Vec<A>{};  // value - 0 keeps the sign of zero and compiles to a broadcast
}

template <class A>
LTK_INLINE Vec<A> load(const A* p) {
  return *reinterpret_cast<const typename Simd<A>::U*>(p);
}

template <class A>
LTK_INLINE void store(A* p, Vec<A> v) {
  *reinterpret_cast<typename Simd<A>::U*>(p) = v;
}

template <class A>
LTK_INLINE typename Simd<A>::I load_index(const Int<A>* p) {
  typename Simd<A>::I v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class A>
LTK_INLINE void store_index(Int<A>* p, typename Simd<A>::I v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Stores past the caches, to an address aligned to the vector: memory that will not be read soon is then not fetched to
// be overwritten.
template <class V>
LTK_INLINE void store_past_caches(void* p, V v) {
#if LTK_LEVEL == 2
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#endif
#if LTK_LEVEL >= 1
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#endif
  __builtin_memcpy(p, &v, sizeof v);
}

template <class A>
LTK_INLINE Vec<A> maximum(Vec<A> a, Vec<A> b) {
  return a > b ? a : b;
}

// Whether any lane of a comparison's result is true.
template <class A>
LTK_INLINE bool any(typename Simd<A>::I mask) {
#if LTK_LEVEL == 2
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif LTK_LEVEL == 1
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
  uint64_t halves[2];
  __builtin_memcpy(halves, &mask, sizeof halves);
  return (halves[0] | halves[1]) != 0;
#endif
}

template <class A>
LTK_INLINE A sum_lanes(Vec<A> v) {
  A lanes[Simd<A>::W];
  store(lanes, v);
  for (int64_t half = Simd<A>::W / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

template <class A>
LTK_INLINE A max_lanes(Vec<A> v) {
  A lanes[Simd<A>::W];
  store(lanes, v);
  for (int64_t half = Simd<A>::W / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

// u = a x + b, in one expression so that compilers fuse it in every kernel or in none: forward and backward must agree
// on u to the last bit, or a probability near 1 loses the exactness that its exponential of 0 has.
template <class V, class S, class B>
LTK_INLINE V affine(V x, S a, B b) {
  return x * a + b;
}

// Returns the value, rounded: compilers may not fuse a product with the sum that takes it. Equal logits of several
// experts must give equal numbers.
template <class V>
LTK_INLINE V prevent_fusion(V value) {
#if defined(__x86_64__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
  return value;
}

// exp(x) for x <= 0 within a unit in the last place (AVX-512: 0.6); 0 below -87.33 (where the result would be
// subnormal); NaN for NaN. Larger x up to 88 work too; beyond, the result is meaningless and the callers replace it.
LTK_INLINE F::V exp_vector(F::V x) {
#if LTK_LEVEL == 2
  // x = n log(2) + r with n in sixteenths and |r| <= log(2) / 32: tables have 2^(n mod 1) and the logarithm of what
  // rounding has taken from it, a short polynomial has exp(r) - 1
  const __m512 table = _mm512_setr_ps(1.0f, 1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f,
                                      1.29683959f, 1.35425556f, 1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f,
                                      1.68179286f, 1.75625217f, 1.8340081f, 1.91520655f);
  const __m512 missing =
      _mm512_setr_ps(0.0f, 4.62854708e-08f, -1.19921571e-08f, 4.72978236e-08f, 3.19341809e-08f, 3.62105731e-08f,
                     -3.09907208e-08f, -7.47521317e-09f, 1.71142713e-08f, -3.04768342e-08f, 5.23333425e-09f,
                     6.10759162e-09f, -1.47196054e-08f, -5.25879512e-09f, -6.12825982e-09f, 5.14060921e-09f);
  const F::V magic = splat(786432.0f);  // 1.5 * 2^19: adding it rounds to sixteenths, 16 n in the low bits
  const F::V shifted = x * 1.44269504088896341f + magic;
  const F::V n = shifted - magic;
  const F::V low = n * 2.12194440e-4f + (F::V)_mm512_permutexvar_ps((__m512i)shifted, missing);
  const F::V r = (x - n * 0.693359375f) + low;
  F::V p = r * 1.6666667e-1f + 5.0001174e-1f;  // without bias over the interval: it lacks r^4 / 24
  p = p * (r * r) + r;
  const F::V power = (F::V)_mm512_permutexvar_ps((__m512i)shifted, table);
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.33f), _CMP_NLT_UQ);
  return (F::V)_mm512_maskz_scalef_ps(normal, (__m512)(power * p + power), (__m512)n);  // times 2^floor(n)
#else
  // 1.5 * 2^23 + 127: adding it rounds to an integer n in the low bits, which are then the exponent of 2^n
  const F::V magic = splat(12583039.0f);
  const F::V shifted = x * 1.44269504088896341f + magic;
  const F::V n = shifted - magic;
  F::V r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  F::V p = r * 1.3814467238e-3f + 8.3687808364e-3f;  // (exp(r) - 1 - r) / r^2, minimax on |r| <= log(2) / 2
  p = p * r + 4.1668392718e-2f;
  p = p * r + 1.6666519642e-1f;
  p = p * r + 4.9999994040e-1f;
  p = p * (r * r) + r + 1.0f;
  const F::V scaled = p * (F::V)((F::Bits)shifted << 23);  // a product, so that any NaN stays one
  return x < splat(-87.33f) ? F::V{} : scaled;
#endif
}

LTK_INLINE Simd<double>::V exp_vector(Simd<double>::V x) {
  for (int64_t i = 0; i < Simd<double>::W; ++i) x[i] = std::exp(x[i]);
  return x;
}

// ------------------------------------------------------------------------------------------------- storage of logits

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

LTK_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31u, fraction = h & 0x3ffu;
  if (exponent == 0) {
    const float value = fraction * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -value : value;
  }
  const uint32_t bits =
      exponent == 31 ? sign | 0x7f800000u | (fraction << 13) : sign | ((exponent + 112u) << 23) | (fraction << 13);
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

LTK_INLINE uint16_t float_to_half(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (bits <
      0x38800000u) {  // subnormal: round to a multiple of 2^-24 by adding 0.5 in a float whose last place is that
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    __builtin_memcpy(&bits, &magnitude, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000u);
  }
  bits += 0xfffu + ((bits >> 13) & 1u);
  return sign | static_cast<uint16_t>((bits - 0x38000000u) >> 13);
}

// How logits of type T are read into and written from vectors of A.
template <class T>
struct IO {  // float and double: T is the arithmetic type
  static inline T get(const T* p) { return *p; }
  static inline void put(T* p, T v) { *p = v; }
  static inline Vec<T> get_vector(const T* p) { return load(p); }
  static inline Vec<T> pack(Vec<T> v) { return v; }
  static inline Vec<T> pack_numbers(Vec<T> v) { return v; }  // none of them NaN
  static inline void put_vector(T* p, Vec<T> v) { store(p, v); }
};

template <>
struct IO<BFloat16> {
  static inline float get(const BFloat16* p) {
    const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
  }
  static inline F::V get_vector(const BFloat16* p) {
#if LTK_LEVEL == 2  // compilers split the generic conversion in two
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (F::V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
#else
    const F::H h = *reinterpret_cast<const F::HU*>(p);
    return (F::V)(__builtin_convertvector(h, F::Bits) << 16);
#endif
  }
  static inline F::Bits round_number(F::V v) {  // to nearest, ties to even; not for NaN
    const F::Bits bits = (F::Bits)v;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  }
  static inline F::Bits round(F::V v) {  // NaN stays NaN
    return v == v ? round_number(v) : ((F::Bits)v >> 16) | 0x40u;
  }
  static inline void put(BFloat16* p, float v) {
    F::V all = {};
    all[0] = v;
    p->bits = static_cast<uint16_t>(round(all)[0]);
  }
  static inline F::H narrow(F::Bits bits) {
#if LTK_LEVEL == 2
    return (F::H)_mm512_cvtepi32_epi16((__m512i)bits);
#else
    return __builtin_convertvector(bits, F::H);
#endif
  }
  static inline F::H pack(F::V v) { return narrow(round(v)); }
  static inline F::H pack_numbers(F::V v) { return narrow(round_number(v)); }
  static inline void put_vector(BFloat16* p, F::V v) { *reinterpret_cast<F::HU*>(p) = pack(v); }
};

template <>
struct IO<Half> {
  static inline float get(const Half* p) { return half_to_float(p->bits); }
  static inline void put(Half* p, float v) { p->bits = float_to_half(v); }
#if LTK_LEVEL == 2
  static inline F::V get_vector(const Half* p) {
    return (F::V)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static inline F::H pack(F::V v) { return (F::H)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif LTK_LEVEL == 1
  static inline F::V get_vector(const Half* p) {
    return (F::V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline F::H pack(F::V v) { return (F::H)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
  static inline F::V get_vector(const Half* p) {
    F::V v;
    for (int64_t i = 0; i < F::W; ++i) v[i] = half_to_float(p[i].bits);
    return v;
  }
  static inline F::H pack(F::V v) {
    F::H h;
    for (int64_t i = 0; i < F::W; ++i) h[i] = float_to_half(v[i]);
    return h;
  }
#endif
  static inline F::H pack_numbers(F::V v) { return pack(v); }
  static inline void put_vector(Half* p, F::V v) { *reinterpret_cast<F::HU*>(p) = pack(v); }
};

#if LTK_LEVEL == 2
LTK_INLINE __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>(count > 0 ? (1u << count) - 1 : 0); }
#endif

// The first `count` lanes (none where it is negative), the others `fill`.
template <class A, class T>
LTK_INLINE Vec<A> get_some(const T* p, int64_t count, A fill) {
  if (count >= Simd<A>::W) return IO<T>::get_vector(p);
#if LTK_LEVEL == 2  // masked: lanes that are left out touch no memory
  const __mmask16 mask = first_lanes(count);
  if constexpr (sizeof(T) == 8) return (Vec<A>)_mm512_mask_loadu_pd((__m512d)splat(fill), mask, p);
  if constexpr (sizeof(T) == 4) return (Vec<A>)_mm512_mask_loadu_ps((__m512)splat(fill), mask, p);
  if constexpr (sizeof(T) == 2) {
    T lanes[Simd<A>::W];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), _mm256_maskz_loadu_epi16(mask, p));
    return (Vec<A>)_mm512_mask_mov_ps((__m512)splat(fill), mask, (__m512)IO<T>::get_vector(lanes));
  }
#endif
  Vec<A> v = splat(fill);
  for (int64_t i = 0; i < count; ++i) v[i] = IO<T>::get(p + i);
  return v;
}

template <class A, class T>
LTK_INLINE void put_some(T* p, Vec<A> v, int64_t count) {
  if (count >= Simd<A>::W) return IO<T>::put_vector(p, v);
#if LTK_LEVEL == 2
  const __mmask16 mask = first_lanes(count);
  if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_pd(p, mask, (__m512d)v);
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, mask, (__m512)v);
  if constexpr (sizeof(T) == 2) return _mm256_mask_storeu_epi16(p, mask, (__m256i)IO<T>::pack(v));
#endif
  for (int64_t i = 0; i < count; ++i) IO<T>::put(p + i, v[i]);
}

// values / divisor (null: 1), past the caches where `stream`; then finish_stream before other threads may read.
template <class T, class A>
LTK_INLINE void put_row(T* out, const A* values, const A* divisor, int64_t count, bool stream) {
  constexpr int64_t W = Simd<A>::W;
  auto value = [&](int64_t j, int64_t left) {
    const Vec<A> v = get_some<A>(values + j, left, A(0));
    return divisor ? v / get_some<A>(divisor + j, left, A(1)) : v;
  };
  stream = stream && LTK_LEVEL > 0;
  const int64_t misaligned = stream ? static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) / sizeof(T)) % W : 0;
  int64_t j = 0;
  if (misaligned > 0) {
    j = count < W - misaligned ? count : W - misaligned;
    put_some<A>(out, value(0, j), j);
  }
  for (; j + W <= count; j += W) {
    if (stream) {
      store_past_caches(out + j, IO<T>::pack(value(j, W)));
    } else {
      IO<T>::put_vector(out + j, value(j, W));
    }
  }
  if (j < count) put_some<A>(out + j, value(j, count - j), count - j);
}

LTK_INLINE void finish_stream(bool stream) {
#if LTK_LEVEL > 0
  if (stream) _mm_sfence();
#endif
}

// ------------------------------------------------------------------------------------------------------------ flags

template <bool value>
struct Flag {
  static constexpr bool on = value;
};

template <class Function>
LTK_INLINE auto with_flags(bool a, bool b, Function f) {  // turn run-time flags into compile-time ones
  if (a) return b ? f(Flag<true>{}, Flag<true>{}) : f(Flag<true>{}, Flag<false>{});
  return b ? f(Flag<false>{}, Flag<true>{}) : f(Flag<false>{}, Flag<false>{});
}

template <class A>
LTK_INLINE A minus_infinity() {
  return -static_cast<A>(__builtin_inf());
}

}  // namespace
}  // namespace LTK_ISA
}  // namespace ltk
