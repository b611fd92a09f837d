// How the CPU operators' host code chooses an instruction set, cuts work and buffers it.
//
// Work is cut by sizes alone, never by the number of threads, and sums over parts are merged in a fixed order: results
// have the same bits for any thread count.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

#include "../tensors.h"
#include "tables.h"

namespace ltk {

constexpr int64_t kPart = 16384;              // columns per part where a row is cut
constexpr int64_t kFewRows = 8;               // fewer rows than this are cut
constexpr size_t kStream = size_t(12) << 20;  // gradients of this size and more are written past the caches

enum class Capability { kDefault, kAvx2, kAvx512 };

// The instruction set whose kernels run; LT_KERNELS_CPU_CAPABILITY names a lower one than the processor has.
Capability capability();
const char* cpu_capability();  // its name: "default", "avx2" or "avx512"

template <class A, template <class> class Kernels>
const Kernels<A>& kernels_of(const Tables<Kernels>& tables, at::ScalarType dtype) {
  if constexpr (std::is_same_v<A, double>) {
    return tables.twofold;
  } else {
    return tables.single[kernel_dtype(dtype)];
  }
}

// The tables of that name for this processor.
#if defined(__x86_64__)
#define LTK_TABLES_HERE(name)                             \
  (capability() == Capability::kAvx512 ? isa_avx512::name \
   : capability() == Capability::kAvx2 ? isa_avx2::name   \
                                       : isa_default::name)
#else
#define LTK_TABLES_HERE(name) isa_default::name
#endif

// Returns a buffer of this thread that keeps its pages from call to call; one at a time.
template <class A>
A* scratch(int64_t size) {
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<void, Free> buffer;
  thread_local size_t held = 0;
  const size_t bytes = static_cast<size_t>(size) * sizeof(A);
  if (bytes > held) {
    buffer.reset();
    held = 0;
    buffer.reset(::operator new(bytes, std::align_val_t(64)));
    held = bytes;
  }
  return static_cast<A*>(buffer.get());
}

inline int64_t grain(int64_t elements_per_item) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_per_item));
}

}  // namespace ltk
