// Elements of the CUDA kernels: one struct per dtype of logits, in groups of 16 bytes.
#pragma once

#include <cmath>

#include "../dtypes.h"
#include "device.h"

namespace ltk::cuda {
namespace {

using namespace ltk::device;

constexpr int kNoColumn = 0x7fffffff;

// Divides numbers of rows, positions or blocks, which are below 2^31: a 64-bit division is a slow call.
LTK_DEVICE int64_t divide(int64_t a, int64_t b) { return static_cast<uint32_t>(a) / static_cast<uint32_t>(b); }

template <class A>
LTK_DEVICE A infinity() {
  return static_cast<A>(__builtin_huge_val());
}
template <class A>
LTK_DEVICE A not_a_number() {
  return infinity<A>() - infinity<A>();
}

struct alignas(16) Group {  // 16 bytes of logits
  uint32_t word[4];
};

struct Float {
  using A = float;
  using Stored = float;
  static constexpr int kGroup = 4;
  LTK_METHOD A get(Stored s) { return s; }
  LTK_METHOD Stored put(A v) { return v; }
  LTK_METHOD A at(const Group& g, int i) { return bits_as<float>(g.word[i]); }
  LTK_METHOD Group pack(const A (&v)[kGroup]) {
    return {{bits_as<uint32_t>(v[0]), bits_as<uint32_t>(v[1]), bits_as<uint32_t>(v[2]), bits_as<uint32_t>(v[3])}};
  }
};

struct BFloat16 {
  using A = float;
  using Stored = uint16_t;
  static constexpr int kGroup = 8;
  LTK_METHOD A get(Stored s) { return bits_as<float>(static_cast<uint32_t>(s) << 16); }
  LTK_METHOD Stored put(A v) { return static_cast<Stored>(pack_bfloat16s(v, v)); }
  LTK_METHOD A at(const Group& g, int i) {
    const uint32_t word = g.word[i / 2];
    return bits_as<float>(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
  }
  LTK_METHOD Group pack(const A (&v)[kGroup]) {
    return {{pack_bfloat16s(v[0], v[1]), pack_bfloat16s(v[2], v[3]), pack_bfloat16s(v[4], v[5]),
             pack_bfloat16s(v[6], v[7])}};
  }
};

struct Half {
  using A = float;
  using Stored = uint16_t;
  static constexpr int kGroup = 8;
  LTK_METHOD A get(Stored s) { return float_from_half(s); }
  LTK_METHOD Stored put(A v) { return static_cast<Stored>(pack_halves(v, v)); }
  LTK_METHOD A at(const Group& g, int i) {
    return float_from_half(static_cast<uint16_t>(i % 2 == 0 ? g.word[i / 2] & 0xffffu : g.word[i / 2] >> 16));
  }
  LTK_METHOD Group pack(const A (&v)[kGroup]) {
    return {{pack_halves(v[0], v[1]), pack_halves(v[2], v[3]), pack_halves(v[4], v[5]), pack_halves(v[6], v[7])}};
  }
};

struct Double {
  using A = double;
  using Stored = double;
  static constexpr int kGroup = 2;
  LTK_METHOD A get(Stored s) { return s; }
  LTK_METHOD Stored put(A v) { return v; }
  LTK_METHOD A at(const Group& g, int i) {
    return bits_as<double>(static_cast<uint64_t>(g.word[2 * i + 1]) << 32 | g.word[2 * i]);
  }
  LTK_METHOD Group pack(const A (&v)[kGroup]) {
    const uint64_t low = bits_as<uint64_t>(v[0]), high = bits_as<uint64_t>(v[1]);
    return {{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
             static_cast<uint32_t>(high >> 32)}};
  }
};

// Calls f with the elements of a dtype whose arithmetic is in A.
template <class A, class F>
Error with_elements(Dtype dtype, const F& f) {
  if constexpr (sizeof(A) == sizeof(double)) {
    return f(Double{});
  } else {
    if (dtype == kBFloat16) return f(BFloat16{});
    if (dtype == kHalf) return f(Half{});
    return f(Float{});
  }
}

template <class V, int kCount>
struct alignas(sizeof(V) * kCount) Pack {
  V value[kCount];
};

template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint64_t;
};

// Stores a pack in one access: as a number, or the compiler may write value by value.
template <class P>
LTK_DEVICE void store_pack(void* to, const P& pack) {
  using W = typename Word<sizeof(P)>::type;
  store_whole(static_cast<W*>(to), bits_as<W>(pack));
}

// Loads kCount consecutive values of a class vector, with the widest accesses that their address allows.
template <int kCount, class A>
LTK_DEVICE void load_values(const A* from, A (&to)[kCount]) {
  constexpr int kWide = 16 / sizeof(A) < kCount ? 16 / sizeof(A) : kCount, kHalf = kWide > 1 ? kWide / 2 : 1;
  const uintptr_t address = reinterpret_cast<uintptr_t>(from);
  auto load = [&](auto pack) {
    using P = decltype(pack);
    constexpr int kStep = sizeof(P) / sizeof(A);
#pragma unroll
    for (int i = 0; i < kCount; i += kStep) {
      const P p = *reinterpret_cast<const P*>(from + i);
#pragma unroll
      for (int j = 0; j < kStep; ++j) to[i + j] = p.value[j];
    }
  };
  if (address % (kWide * sizeof(A)) == 0) {
    load(Pack<A, kWide>{});
  } else if (address % (kHalf * sizeof(A)) == 0) {
    load(Pack<A, kHalf>{});
  } else {
    load(Pack<A, 1>{});
  }
}

}  // namespace
}  // namespace ltk::cuda
