// csrc/device.h for a machine without a GPU: every thread of a block (of all blocks of a cluster) is a fiber of this
// thread, which runs until it has to wait for others. LTK_EMULATED_ORDER=reversed runs them, and the blocks, in the
// opposite order: a kernel that lacks a barrier then gives other results.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define LTK_DEVICE static inline
#define LTK_METHOD static inline
#define LTK_MEMBER inline

namespace ltk::device {

using Stream = int;
using Error = int;

struct Fiber;
int thread_index();
int64_t block_index();
int64_t block_count();
unsigned char* shared_memory();
void block_barrier();
void warp_barrier();
int cluster_size();
int cluster_rank();
void cluster_barrier();
inline void cluster_arrive() {}
void cluster_wait();
void copy_async(void* shared, const void* global);
void wait_for_copies();
void* peer_address(void* mine, int rank);
uint64_t exchange(uint64_t value, int mask);  // with the lane whose number differs in the bits of mask

template <class V>
V* peer_memory(V* mine, int rank) {
  return static_cast<V*>(peer_address(mine, rank));
}

template <class V>
V shuffle_xor(V value, int mask) {
  static_assert(sizeof(V) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(V));
  bits = exchange(bits, mask);
  std::memcpy(&value, &bits, sizeof(V));
  return value;
}

template <class V>
void store_whole(V* to, V value) {
  *to = value;
}

inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline double multiply_add(double a, double b, double c) { return std::fma(a, b, c); }

inline float fast_exp(float x) { return std::exp(x); }
inline double fast_exp(double x) { return std::exp(x); }

float float_from_half(uint16_t bits);
uint32_t pack_halves(float low, float high);
uint32_t pack_bfloat16s(float low, float high);

template <class To, class From>
To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class Kernel>
int largest_cluster(Kernel*) {
  const char* device = std::getenv("LTK_EMULATED_DEVICE");
  return device == nullptr ? 8 : std::atoi(device);
}

struct Launch {
  int64_t blocks;
  int threads;
  size_t shared_bytes;
  int cluster;
  Stream stream;
};

Error run_blocks(const Launch& launch, void (*body)(const void*), const void* argument);

template <class Argument>
struct Kernel {
  void (*function)(Argument);
  const Argument& argument;
  static void run(const void* self) {
    const auto* kernel = static_cast<const Kernel*>(self);
    kernel->function(kernel->argument);
  }
};

template <class Argument>
Error launch(void (*kernel)(Argument), const Launch& l, const Argument& argument) {
  const Kernel<Argument> bound = {kernel, argument};
  return run_blocks(l, &Kernel<Argument>::run, &bound);
}

}  // namespace ltk::device
