// Logits of several experts as arguments of the CUDA kernels.
#pragma once

#include <cstdint>

#include "device.h"
#include "../dtypes.h"

namespace ltk::cuda {

constexpr int kFewExperts = 8;     // that fit the kernels' parameters
constexpr int kTileThreads = 256;  // of a block, at most
// Blocks per processor that registers must leave room for: the compiler's own choice spills doubles.
template <class A>
constexpr int kTileBlocks = sizeof(A) == 8 ? 2 : 6;
constexpr int kTileScratch = 2048;         // bytes of shared memory for what does not depend on sizes, at most
constexpr int64_t kTileBytes = 24 * 1024;  // of a tile of any size: several blocks fit a processor

// Rows whose classes are contiguous. Strides are in elements.
struct ExpertRows {
  const void* first[kFewExperts];  // of each expert; where there are more: first[0] + expert * expert_stride
  int64_t row_stride[kFewExperts];
  int64_t expert_stride;
  int64_t rows;
  int count, classes;
};

// The tile of a sample that a block has in shared memory at a time: so many columns of all experts.
struct TileShape {
  int columns;  // a multiple of threads, or all
  int threads;
  int pitch;  // elements from one expert to the next
  int64_t bytes;
};

// Chooses a tile of at most `room` bytes.
inline TileShape tile_shape(const ExpertRows& x, int64_t itemsize, int64_t room) {
  const int64_t group = 16 / itemsize;
  TileShape shape = {};
  shape.threads = x.classes <= 256 ? 32 : x.classes <= 1024 ? 128 : kTileThreads;
  int64_t columns = room / (x.count * itemsize) - 2 * group;
  if (columns < shape.threads) shape.threads = 32;  // very many experts
  columns = columns < 32 ? 32 : columns / shape.threads * shape.threads;
  shape.columns = static_cast<int>(columns < x.classes ? columns : x.classes);
  shape.pitch = static_cast<int>((shape.columns + group - 1) / group * group + group);
  shape.bytes = x.count * shape.pitch * itemsize;
  return shape;
}

}  // namespace ltk::cuda
