// The fibers behind emulated_device.h.
#include <torch/library.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <vector>

#include "common/cuda/device.h"

namespace ltk::device {

enum class Wait { kNothing, kWarp, kBlock, kCluster, kDone };

using Jump = void* [5];  // of the compiler's own setjmp, which leaves signals alone

struct Fiber {
  int thread;  // within its block
  int rank;    // of the block within its cluster
  int64_t block;
  Wait wait = Wait::kNothing;
  // What it offers to exchange(), in turns: nobody overwrites what another lane has yet to read.
  uint64_t values[2] = {0, 0};
  int64_t exchanges = 0;
  Fiber* warp = nullptr;  // the first lane of its warp
  Jump state;
  bool started = false;
  std::unique_ptr<char[]> stack;
};

namespace {

constexpr size_t kStack = 64 * 1024;
constexpr unsigned char kPoison = 0xff;  // as floating point: NaN

std::vector<Fiber> fibers;
std::vector<std::vector<unsigned char>> shared;  // per block of the cluster
struct Copy {
  void* to;
  unsigned char data[16];
};
std::vector<std::vector<Copy>> copies;  // per fiber: arrive when waited for
Fiber* running = nullptr;
Jump scheduler;
const Launch* launched = nullptr;
int launched_cluster = 1;
void (*entry)(const void*) = nullptr;
const void* entry_argument = nullptr;
bool reversed = false;
bool unfinished = false;  // an error left fibers in the middle of a launch

[[gnu::noipa]] void leave() { __builtin_longjmp(scheduler, 1); }

[[gnu::noipa]] void yield(Wait wait) {
  running->wait = wait;
  if (__builtin_setjmp(running->state) == 0) leave();
}

// Runs one thread of every block that the fiber is given.
[[gnu::noipa]] void run_fiber() {
  while (true) {
    entry(entry_argument);
    yield(Wait::kDone);
  }
}

[[gnu::noipa]] void resume(Fiber& fiber) {
  running = &fiber;
  if (__builtin_setjmp(scheduler) != 0) return;
  if (fiber.started) __builtin_longjmp(fiber.state, 1);
  fiber.started = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = fiber.stack.get();
  start.uc_stack.ss_size = kStack;
  start.uc_link = nullptr;
  makecontext(&start, run_fiber, 0);
  setcontext(&start);
}

// Frees the fibers of [first, last) if each of them waits for `wait` or has ended.
bool release(Fiber* first, Fiber* last, Wait wait) {
  bool any = false;
  for (Fiber* f = first; f != last; ++f) {
    if (f->wait != wait && f->wait != Wait::kDone) return false;
    any |= f->wait == wait;
  }
  for (Fiber* f = first; any && f != last; ++f)
    if (f->wait == wait) f->wait = Wait::kNothing;
  return any;
}

void run_cluster(int count) {
  const int threads = launched->threads;
  while (true) {
    bool done = true;
    for (int i = 0; i < count; ++i) {
      Fiber& f = fibers[reversed ? count - 1 - i : i];
      if (f.wait == Wait::kNothing) resume(f);
      done &= f.wait == Wait::kDone;
    }
    if (done) return;
    bool moved = false;
    for (int i = 0; i < count; i += 32)
      moved |= release(&fibers[i], &fibers[i] + std::min(32, threads - i % threads), Wait::kWarp);
    for (int i = 0; i < count; i += threads) moved |= release(&fibers[i], &fibers[i] + threads, Wait::kBlock);
    moved |= release(fibers.data(), fibers.data() + count, Wait::kCluster);
    TORCH_CHECK(moved, "emulator: threads wait for different barriers");
  }
}

}  // namespace

int thread_index() { return running->thread; }
int64_t block_index() { return running->block; }
int64_t block_count() { return launched->blocks; }
unsigned char* shared_memory() { return shared[running->rank].data(); }
void block_barrier() { yield(Wait::kBlock); }
void warp_barrier() { yield(Wait::kWarp); }
int cluster_size() { return launched->cluster; }
int cluster_rank() { return running->rank; }
void cluster_barrier() { yield(Wait::kCluster); }
void cluster_wait() { yield(Wait::kCluster); }

void* peer_address(void* mine, int rank) {
  return shared[rank].data() + (static_cast<unsigned char*>(mine) - shared_memory());
}

void copy_async(void* to, const void* global) {
  Copy copy;
  copy.to = to;
  std::memcpy(copy.data, global, sizeof(copy.data));
  copies[running - fibers.data()].push_back(copy);
}

void wait_for_copies() {
  for (const Copy& copy : copies[running - fibers.data()]) std::memcpy(copy.to, copy.data, sizeof(copy.data));
  copies[running - fibers.data()].clear();
}

uint64_t exchange(uint64_t value, int mask) {
  const int64_t turn = ++running->exchanges;
  running->values[turn % 2] = value;
  yield(Wait::kWarp);
  const Fiber& other = running->warp[(running->thread % 32) ^ mask];
  TORCH_CHECK(other.exchanges >= turn, "emulator: a shuffle with a lane that has ended");
  return other.values[turn % 2];
}

float float_from_half(uint16_t bits) { return static_cast<float>(c10::Half(bits, c10::Half::from_bits())); }
uint32_t pack_halves(float low, float high) {
  return static_cast<uint32_t>(c10::Half(low).x) | static_cast<uint32_t>(c10::Half(high).x) << 16;
}
uint32_t pack_bfloat16s(float low, float high) {
  return static_cast<uint32_t>(c10::BFloat16(low).x) | static_cast<uint32_t>(c10::BFloat16(high).x) << 16;
}

Error run_blocks(const Launch& l, void (*body)(const void*), const void* argument) {
  TORCH_CHECK(l.blocks > 0 && l.blocks <= 2147483647 && l.blocks % l.cluster == 0, "emulator: ", l.blocks, " blocks");
  TORCH_CHECK(l.threads % 32 == 0 && l.threads <= 1024, "emulator: ", l.threads, " threads");
  if (!can_place(l.cluster, l.threads, l.shared_bytes)) return 1;
  const char* order = std::getenv("LTK_EMULATED_ORDER");
  reversed = order != nullptr && std::strcmp(order, "reversed") == 0;
  launched = &l, launched_cluster = l.cluster, entry = body, entry_argument = argument;
  const int count = l.threads * l.cluster;
  if (static_cast<int>(fibers.size()) < count || unfinished) {
    fibers.clear();
    fibers.resize(count);
    for (Fiber& f : fibers) f.stack.reset(new char[kStack]);
  }
  unfinished = true;
  copies.assign(count, {});
  for (int64_t done = 0; done < l.blocks; done += l.cluster) {
    const int64_t first = reversed ? l.blocks - l.cluster - done : done;
    shared.assign(l.cluster, std::vector<unsigned char>(l.shared_bytes + 16, kPoison));
    for (int i = 0; i < count; ++i) {
      Fiber& f = fibers[i];
      f.rank = i / l.threads, f.thread = i % l.threads, f.block = first + f.rank;
      f.wait = Wait::kNothing, f.exchanges = 0;
      f.warp = &fibers[i - f.thread % 32];
    }
    run_cluster(count);
  }
  unfinished = false;
  return 0;
}

}  // namespace ltk::device

// Returns the blocks per cluster of the latest launch.
TORCH_LIBRARY_FRAGMENT(lt_kernels_emulated, m) {
  m.def("last_cluster() -> int", [] { return static_cast<int64_t>(ltk::device::launched_cluster); });
}
