// The CUDA language behind names of our own, so that tests/emulator can run the same kernels without a GPU
// (LTK_EMULATED). Include this instead of CUDA's headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(LTK_EMULATED)
#include "emulated_device.h"  // in tests/emulator
#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

namespace ltk::device {

using Stream = cudaStream_t;
using Error = cudaError_t;

constexpr int kLargestCluster = 8;  // blocks, on every chip that has clusters

#if defined(__CUDACC__)

#define LTK_DEVICE static __device__ __forceinline__  // a function
#define LTK_METHOD static __device__ __forceinline__  // of a class, without an object
#define LTK_MEMBER __device__ __forceinline__

LTK_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
LTK_DEVICE int64_t block_index() { return blockIdx.x; }
LTK_DEVICE int64_t block_count() { return gridDim.x; }

// Dynamic shared memory of this block, 16-byte aligned.
LTK_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

LTK_DEVICE void block_barrier() { __syncthreads(); }
LTK_DEVICE void warp_barrier() { __syncwarp(); }

template <class V>
LTK_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Thread-block clusters exist from compute capability 9.0 on; elsewhere a cluster is one block.
LTK_DEVICE int cluster_size() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
#else
  return 1;
#endif
}

LTK_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(cooperative_groups::this_cluster().block_rank());
#else
  return 0;
#endif
}

LTK_DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}

// A barrier in two halves. Before a thread arrives, all that it reads from others must be in its registers.
LTK_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
LTK_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait;" ::: "memory");
#endif
}

// Returns the same place in the shared memory of another block of the cluster.
template <class V>
LTK_DEVICE V* peer_memory(V* mine, int rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
#else
  return mine;
#endif
}

// Stores in one access: the compiler does not take it apart.
LTK_DEVICE void store_whole(uint16_t* to, uint16_t value) { __stwb(to, value); }
LTK_DEVICE void store_whole(uint32_t* to, uint32_t value) { __stwb(to, value); }
LTK_DEVICE void store_whole(uint64_t* to, uint64_t value) { __stwb(reinterpret_cast<unsigned long long*>(to), value); }

// Copies 16 bytes from global to shared memory; complete for this thread after wait_for_copies().
LTK_DEVICE void copy_async(void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
LTK_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Returns a b + c with one rounding; nothing else is fused with it.
LTK_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
LTK_DEVICE double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }

// Returns exp(x) with the accuracy of the hardware's 2^x; results below 1e-38 are 0.
LTK_DEVICE float fast_exp(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
  return result;
}
LTK_DEVICE double fast_exp(double x) { return exp(x); }

LTK_DEVICE float float_from_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
LTK_DEVICE uint32_t pack_halves(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
LTK_DEVICE uint32_t pack_bfloat16s(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <class To, class From>
LTK_DEVICE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

struct Launch {
  int64_t blocks;
  int threads;
  size_t shared_bytes;
  int cluster;  // blocks per cluster; 1: none
  Stream stream;
};

// CUDA's description of a launch. It points into itself.
struct Config {
  cudaLaunchConfig_t value = {};
  cudaLaunchAttribute cluster = {};

  explicit Config(const Launch& l) {
    value.gridDim = dim3(static_cast<unsigned>(l.blocks));
    value.blockDim = dim3(static_cast<unsigned>(l.threads));
    value.dynamicSmemBytes = l.shared_bytes;
    value.stream = l.stream;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(l.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    value.attrs = &cluster;
    value.numAttrs = l.cluster > 1 ? 1 : 0;
  }
  Config(const Config&) = delete;
};

// Allows the kernel's blocks that much shared memory: always the most, for other threads launch too.
template <class Kernel>
Error allow_shared_memory(Kernel* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;  // needs no permission
  int device = 0, most = 0;
  Error error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);  // percent
  return error;
}

template <class Kernel>
int find_largest_cluster(Kernel* kernel, int threads, size_t shared_bytes) {
  cudaFuncAttributes attributes = {};
  Error error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) error = allow_shared_memory(kernel, shared_bytes);
  int cluster = error == cudaSuccess && attributes.ptxVersion >= 90 ? kLargestCluster : 1;
  for (; cluster > 1; cluster /= 2) {
    const Config config({cluster, threads, shared_bytes, cluster, nullptr});
    int active = 0;
    if (cudaOccupancyMaxActiveClusters(&active, kernel, &config.value) == cudaSuccess && active > 0) break;
  }
  cudaGetLastError();  // a refusal is an answer, and no error of a later launch
  return cluster;
}

// Returns the most blocks per cluster, a power of two, that the current device can place: few processors (of a slice of
// a chip) may not hold a large one. Code compiled for less than compute capability 9.0 has no clusters, on newer chips
// too. The device is asked once for each kernel and size.
template <auto kernel>
int largest_cluster(int threads, size_t shared_bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, size_t>, int> known;  // by device and bytes
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;  // the launch will say why
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [place, is_new] = known.try_emplace({device, shared_bytes}, 1);
  if (is_new) place->second = find_largest_cluster(kernel, threads, shared_bytes);
  return place->second;
}

template <class Argument>
Error launch(void (*kernel)(Argument), const Launch& l, const Argument& argument) {
  const Error error = allow_shared_memory(kernel, l.shared_bytes);
  if (error != cudaSuccess) return error;
  const Config config(l);
  return cudaLaunchKernelEx(&config.value, kernel, argument);
}

#endif  // __CUDACC__

}  // namespace ltk::device
#endif
