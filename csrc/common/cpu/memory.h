// Memory of the CPU that keeps its pages. The system zeroes a fresh page when it is first touched, and for 100 MB that
// costs more than the arithmetic that fills them; so large tensors of every step (gradients, a head's logits) share a
// small pool: a tensor's memory returns to it when the tensor dies, and the next one of about that size takes it.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace ltk {

// Besides the tensors alive, the pool holds at most kMostBuffers buffers, together at most most_bytes(). Beyond that,
// the buffer returned longest ago goes back to the system. A tensor gets the smallest buffer that holds it and is at
// most an eighth larger than it needs. Tensors below kSmallest bytes are torch's own.
class MemoryPool {
 public:
  static constexpr size_t kSmallest = size_t(1) << 20;
  static constexpr size_t kMostBuffers = 8;

  // A sixteenth of the machine's memory, but at least 512 MiB and at most 4 GiB.
  static size_t most_bytes() {
    constexpr size_t kLeast = size_t(512) << 20, kMost = size_t(4) << 30;
#if defined(__linux__)
    static const size_t found = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(getpagesize()) / 16;
    return std::min(std::max(found, kLeast), kMost);
#else
    return kLeast;
#endif
  }

  static at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
    const at::Tensor shape = at::empty(sizes, at::TensorOptions().dtype(dtype).device(at::kMeta));
    if (shape.nbytes() < kSmallest) return at::empty(sizes, shape.options().device(at::kCPU));
    return empty_dense(shape);
  }

  static at::Tensor empty_like(const at::Tensor& t) {
    if (t.nbytes() < kSmallest) return at::empty_like(t);
    return empty_dense(at::empty_like(t, t.options().device(at::kMeta)));
  }

 private:
  static constexpr size_t kPage = size_t(2) << 20;
  struct Buffer {
    void* data;
    size_t size;
    int64_t used;
  };
  std::mutex mutex_;
  std::vector<Buffer> free_;  // in the order of their return

  // A tensor with the sizes, strides and dtype of `shape`, a dense one without memory.
  static at::Tensor empty_dense(const at::Tensor& shape) {
    const size_t bytes = shape.nbytes();
    TORCH_INTERNAL_ASSERT(shape.is_non_overlapping_and_dense());
    auto* buffer = new Buffer(instance().take((bytes + kPage - 1) / kPage * kPage));
    buffer->used = static_cast<int64_t>(bytes);
    report(buffer->data, buffer->used);
    auto release = [](void* context) {
      const std::unique_ptr<Buffer> dead(static_cast<Buffer*>(context));
      report(dead->data, -dead->used);
      instance().give(*dead);
    };
    // resizable, like any storage of torch: code that frees gradients by resizing their storage goes on working
    c10::Storage storage(c10::Storage::use_byte_size_t(), bytes,
                         at::DataPtr(buffer->data, buffer, release, c10::Device(c10::kCPU)),
                         c10::GetAllocator(c10::kCPU), true);
    return at::empty({0}, shape.options().device(at::kCPU)).set_(storage, 0, shape.sizes(), shape.strides());
  }

  static void report(void* data, int64_t bytes) {  // so that torch's profiler counts these tensors as it does others
    if (c10::memoryProfilingEnabled()) c10::reportMemoryUsageToProfiler(data, bytes, 0, 0, c10::Device(c10::kCPU));
  }

  static MemoryPool& instance() {
    static MemoryPool* pool = new MemoryPool;  // outlives tensors that die at exit
    return *pool;
  }

  Buffer take(size_t size) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = free_.end();
      for (auto it = free_.begin(); it != free_.end(); ++it)
        if (it->size >= size && it->size <= size + size / 8 && (best == free_.end() || it->size < best->size))
          best = it;
      if (best != free_.end()) {
        const Buffer found = *best;
        free_.erase(best);
        return found;
      }
    }
    void* data = ::operator new(size, std::align_val_t(kPage));
#if defined(MADV_HUGEPAGE)
    madvise(data, size, MADV_HUGEPAGE);
#endif
    return {data, size, 0};
  }

  void give(const Buffer& buffer) {
    std::vector<Buffer> dropped;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      free_.push_back(buffer);
      size_t held = 0;
      for (const Buffer& each : free_) held += each.size;
      while (free_.size() > kMostBuffers || held > most_bytes()) {
        held -= free_.front().size;
        dropped.push_back(free_.front());
        free_.erase(free_.begin());
      }
    }
    for (const Buffer& each : dropped) ::operator delete(each.data, std::align_val_t(kPage));
  }
};

}  // namespace ltk
