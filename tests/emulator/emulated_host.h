// csrc/common/cuda/host.h for a machine without a GPU.
#pragma once

#include <c10/core/Device.h>
#include <c10/util/Exception.h>

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
  const Chip chip;
  return {chip.shared_per_block, chip.shared_per_processor};
}

}  // namespace ltk::device
