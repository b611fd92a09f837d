// csrc/common/cuda/device.h for a machine without a GPU: every thread of a block (of all blocks of a cluster) is a
// fiber of this thread, which runs until it has to wait for others. LTK_EMULATED_ORDER=reversed runs them, and the
// blocks, in the opposite order: a kernel that lacks a barrier then gives other results.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <sstream>

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

constexpr int kLargestCluster = 8;

// LTK_EMULATED_DEVICE="clusters shared_per_block shared_per_processor processors", the last three optional: the largest
// cluster that code may use, bytes of shared memory, and the processors that share a cluster. Default: sm_90.
struct Chip {
  int64_t clusters = kLargestCluster, shared_per_block = 232448, shared_per_processor = 233472, processors = 16;

  Chip() {
    if (const char* given = std::getenv("LTK_EMULATED_DEVICE")) {
      std::istringstream in(given);
      for (int64_t* number : {&clusters, &shared_per_block, &shared_per_processor, &processors})
        if (int64_t value; in >> value) *number = value;
    }
  }
};

inline bool can_place(int cluster, int threads, size_t shared_bytes) {
  const Chip chip;
  const int64_t reserved = 1024;  // bytes per block, for the system
  const int64_t blocks = std::min<int64_t>(chip.shared_per_processor / (shared_bytes + reserved), 2048 / threads);
  return cluster == 1 || (cluster <= chip.clusters && cluster <= blocks * chip.processors);
}

template <auto kernel>
int largest_cluster(int threads, size_t shared_bytes) {
  int cluster = kLargestCluster;
  while (!can_place(cluster, threads, shared_bytes)) cluster /= 2;
  return cluster;
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
