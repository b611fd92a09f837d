// The host's side of a GPU: streams, device guards, errors, and facts about the chip.
#pragma once

#include "device.h"

#if defined(LTK_EMULATED)
#include "emulated_host.h"  // in tests/emulator
#else

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <vector>

namespace ltk::device {

using Guard = c10::cuda::CUDAGuard;

inline Stream current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }
inline void check(Error error) { C10_CUDA_CHECK(error); }

struct Facts {
  int64_t shared_per_block;  // bytes of shared memory that a block can ask for
  int64_t shared_per_processor;
};

// Returns the facts of the current device.
inline Facts facts() {
  static const std::vector<Facts> known = [] {
    int devices = 0;
    check(cudaGetDeviceCount(&devices));
    std::vector<Facts> all(devices);
    for (int device = 0; device < devices; ++device) {
      auto value = [&](cudaDeviceAttr attribute) {
        int v = 0;
        check(cudaDeviceGetAttribute(&v, attribute, device));
        return v;
      };
      all[device].shared_per_block = value(cudaDevAttrMaxSharedMemoryPerBlockOptin);
      all[device].shared_per_processor = value(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    }
    return all;
  }();
  int device = 0;
  check(cudaGetDevice(&device));
  return known.at(device);
}

}  // namespace ltk::device
#endif
