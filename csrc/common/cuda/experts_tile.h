// A tile of columns of all experts in shared memory.
#pragma once

#include "elements.h"
#include "experts.h"
#include "reductions.h"

namespace ltk::cuda {
namespace {

template <class T>
LTK_DEVICE const typename T::Stored* expert_row(const ExpertRows& x, int e, int64_t row) {
  const bool few = x.count <= kFewExperts;
  const auto* first = static_cast<const typename T::Stored*>(x.first[few ? e : 0]);
  return first + ((few ? 0 : e * x.expert_stride) + row * x.row_stride[few ? e : 0]);
}

// Some columns of one sample's logits of every expert. All rows of the tile begin at the 16-byte phase of the first
// expert's row; rows of that phase are copied 16 bytes at a time, others column by column.
template <class T>
struct Tile {
  using A = typename T::A;
  using Stored = typename T::Stored;
  Stored* memory;  // of the block, 16-byte aligned
  TileShape shape;
  Stored* column0;  // of the first expert
  int phase;        // of column 0, in elements

  LTK_MEMBER Tile(void* memory, const TileShape& shape)
      : memory(static_cast<Stored*>(memory)), shape(shape), column0(nullptr), phase(0) {}

  LTK_MEMBER A at(int e, int column) const { return T::get(column0[e * shape.pitch + column]); }
  LTK_MEMBER void put(int e, int column, A value) { column0[e * shape.pitch + column] = T::put(value); }

  LTK_METHOD int phase_of(const Stored* row) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(Stored) % T::kGroup);
  }

  // Loads columns [first, first + count) of a row. Every thread of the block calls it; it begins and ends with a
  // barrier.
  LTK_MEMBER void load(const ExpertRows& x, int64_t row, int first, int count) {
    block_barrier();
    phase = phase_of(expert_row<T>(x, 0, row) + first);
    column0 = memory + phase;
    auto rows = [&](int e) { return expert_row<T>(x, e, row) + first; };
    move(
        x.count, count, rows, [&](const Stored* from, Stored* to, int group) { copy_async(to + group, from + group); },
        [&](const Stored* from, Stored* to, int column) { to[column] = from[column]; });
    wait_for_copies();
    block_barrier();
  }

  // Writes the tile to rows(e), e < experts, after a barrier.
  template <class Rows>
  LTK_MEMBER void store(int experts, int count, const Rows& rows) {
    block_barrier();
    move(
        experts, count, rows,
        [&](Stored* to, const Stored* from, int group) {
          *reinterpret_cast<Group*>(to + group) = *reinterpret_cast<const Group*>(from + group);
        },
        [&](Stored* to, const Stored* from, int column) { to[column] = from[column]; });
  }

 private:
  // Calls group(outside, inside, first column) for every aligned group of every row, and column(outside, inside, its
  // number) for the other columns.
  template <class Rows, class OfGroup, class OfColumn>
  LTK_MEMBER void move(int experts, int count, const Rows& rows, const OfGroup& group, const OfColumn& column) {
    const int thread = thread_index(), aligned = phase == 0 ? 0 : T::kGroup - phase;
    const int head = aligned < count ? aligned : count, groups = (count - head) / T::kGroup;
    for (int e = 0; e < experts; ++e) {
      auto* outside = rows(e);
      Stored* inside = column0 + e * shape.pitch;
      if (phase_of(outside) == phase) {
        for (int g = thread; g < groups; g += shape.threads) group(outside, inside, head + g * T::kGroup);
      } else {
#pragma unroll 4
        for (int c = thread; c < count; c += shape.threads) column(outside, inside, c);
      }
    }
    const int lane = thread % 32, c = lane < head ? lane : lane + groups * T::kGroup;  // the edge: at most 14 columns
    if (c < count)
      for (int e = thread / 32; e < experts; e += shape.threads / 32) {
        auto* outside = rows(e);
        if (phase_of(outside) == phase) column(outside, column0 + e * shape.pitch, c);
      }
  }
};

}  // namespace
}  // namespace ltk::cuda
