// csrc/cuda_host.h for a machine without a GPU. LTK_EMULATED_DEVICE="largest_cluster shared_per_block
// shared_per_processor" chooses the chip (default: that of sm_90).
#pragma once

#include <c10/core/Device.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <sstream>

namespace ltk::device {

struct Guard {
  explicit Guard(c10::Device) {}
};

inline Stream current_stream() { return 0; }
inline void check(Error error) { TORCH_CHECK(error == 0, "emulated launch failed with ", error); }

struct Facts {
  int64_t shared_per_block, shared_per_processor;
};

inline Facts facts() {
  Facts f = {232448, 233472};
  int largest_cluster = 0;
  if (const char* given = std::getenv("LTK_EMULATED_DEVICE"))
    std::istringstream(given) >> largest_cluster >> f.shared_per_block >> f.shared_per_processor;
  return f;
}

}  // namespace ltk::device
