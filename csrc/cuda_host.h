// The host's side of a GPU: streams, device guards, errors, and what the chip offers.
#pragma once

#include "device.h"

#if defined(LTK_EMULATED)
#include "emulated_host.h"  // in tests/emulator
#else

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <array>

namespace ltk::device {

using Guard = c10::cuda::CUDAGuard;

inline Stream current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }
inline void check(Error error) { C10_CUDA_CHECK(error); }

struct Facts {
  int major;                 // of the compute capability
  int64_t shared_per_block;  // bytes of shared memory that a block can ask for
  int64_t shared_per_processor;
  int64_t l2;  // bytes of the second-level cache
  int processors;
};

// Of the current device.
inline Facts facts() {
  static std::array<Facts, 64> known = {};  // two threads may both fill an entry, with the same values
  int device = 0;
  check(cudaGetDevice(&device));
  TORCH_CHECK(device < static_cast<int>(known.size()), "device ", device, ": expected one of the first 64");
  Facts& f = known[device];
  if (f.processors == 0) {
    auto value = [&](cudaDeviceAttr attribute) {
      int v = 0;
      check(cudaDeviceGetAttribute(&v, attribute, device));
      return v;
    };
    f.major = value(cudaDevAttrComputeCapabilityMajor);
    f.shared_per_block = value(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    f.shared_per_processor = value(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    f.l2 = value(cudaDevAttrL2CacheSize);
    f.processors = value(cudaDevAttrMultiProcessorCount);
  }
  return f;
}

}  // namespace ltk::device
#endif
