// The emulated device: fibers, barriers, asynchronous copies. See cuda/device.h for what it promises.
//
// One block runs at a time. A fiber runs until it meets a barrier that is not complete, then another runnable one is
// picked: in even blocks so that warps keep pace, in odd ones so that a warp gets as far ahead of the others as block
// barriers let it.
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <vector>

#include "cuda/device.h"
#include "cuda/launch.h"

namespace foveal::cuda {
namespace emulation {
namespace {

constexpr size_t kStackNbytes = 128 * 1024;
constexpr int kWarp = 32;

struct Copy {
  uint32_t shared;
  const void* global;
  bool valid;
};

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
  bool flag = false;    // what arrives
  bool result[2] = {};  // by the parity of the generation that it completed
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started = false;
  bool done = false;
  const Barrier* waits_for = nullptr;
  unsigned waits_generation = 0;
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;
};

struct WarpState {
  Barrier barrier;
  Words slot[2][kWarp];  // by parity of the exchange: a lane cannot be two exchanges ahead of another
};

struct Block {
  Kernel kernel = nullptr;
  Params params;
  int64_t index = 0, grid = 0;
  int num_threads = 0;
  std::vector<Fiber> fibers;
  std::vector<WarpState> warps;
  Barrier barrier;
  std::vector<char> shared;
  char* shared_base = nullptr;
  size_t shared_nbytes = 0;
  int current = 0;
  jmp_buf scheduler;
  ucontext_t scheduler_context;
  uint64_t random = 0x9e3779b97f4a7c15;
};

Block block;
std::vector<std::unique_ptr<char[]>> stacks;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulated device: %s (block %lld, thread %d)\n", what, static_cast<long long>(block.index),
               block.current);
  std::abort();
}

void fiber_main() {
  block.kernel(block.params);
  Fiber& fiber = block.fibers[block.current];
  if (!fiber.open_group.empty()) fail("a copy was never committed");
  fiber.done = true;
  _longjmp(block.scheduler, 1);
}

void suspend() {
  Fiber& fiber = block.fibers[block.current];
  if (_setjmp(fiber.resume) == 0) _longjmp(block.scheduler, 1);
}

// Arrives, waits for the other `count - 1`, and returns the generation that was completed.
unsigned arrive(Barrier& barrier, int count, bool flag) {
  const unsigned generation = barrier.generation;
  barrier.flag |= flag;
  if (++barrier.arrived == count) {
    barrier.result[generation & 1] = barrier.flag;
    barrier.flag = false;
    barrier.arrived = 0;
    ++barrier.generation;
    return generation;
  }
  Fiber& fiber = block.fibers[block.current];
  fiber.waits_for = &barrier;
  fiber.waits_generation = generation;
  while (barrier.generation == generation) suspend();
  fiber.waits_for = nullptr;
  return generation;
}

bool runnable(const Fiber& fiber) {
  return !fiber.done && (fiber.waits_for == nullptr || fiber.waits_for->generation != fiber.waits_generation);
}

// A runnable fiber, the search starting anywhere.
int pick() {
  block.random ^= block.random << 13;
  block.random ^= block.random >> 7;
  block.random ^= block.random << 17;
  // Mostly the next in line, so that a search is short; now and then anywhere, so that no order is relied on.
  const bool jump = block.random % 8 == 0;
  if (block.index % 2 == 1) {
    const int warp = block.current / kWarp * kWarp;
    for (int i = 0; i < kWarp; ++i) {
      const int candidate = warp + (block.current + 1 + i) % kWarp;
      if (runnable(block.fibers[candidate])) return candidate;
    }
  }
  const int first = jump ? static_cast<int>(block.random / 8 % block.num_threads) : block.current + 1;
  for (int i = 0; i < block.num_threads; ++i) {
    const int candidate = (first + i) % block.num_threads;
    if (runnable(block.fibers[candidate])) return candidate;
  }
  return -1;
}

void run_block() {
  std::memset(block.shared.data(), 0xff, block.shared.size());
  block.fibers = std::vector<Fiber>(block.num_threads);
  block.warps = std::vector<WarpState>(block.num_threads / kWarp);
  block.barrier = {};
  while (static_cast<int>(stacks.size()) < block.num_threads) stacks.push_back(std::make_unique<char[]>(kStackNbytes));
  for (;;) {
    _setjmp(block.scheduler);
    const int next = pick();
    if (next < 0) break;
    block.current = next;
    Fiber& fiber = block.fibers[next];
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks[next].get();
    fiber.start.uc_stack.ss_size = kStackNbytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
    setcontext(&fiber.start);
  }
  for (const Fiber& fiber : block.fibers) {
    if (!fiber.done) fail("deadlock: some threads wait at a barrier that others never reach");
  }
}

}  // namespace

int thread_index() { return block.current; }
int block_index() { return static_cast<int>(block.index); }
int grid_size() { return static_cast<int>(block.grid); }
char* shared_memory() { return block.shared_base; }

void check_shared(uint32_t address, int nbytes, int alignment) {
  if (address % alignment != 0) fail("misaligned shared address");
  if (address + nbytes > block.shared_nbytes) fail("shared address out of range");
}

void block_barrier() { arrive(block.barrier, block.num_threads, false); }

bool block_barrier_or(bool flag) {
  const unsigned generation = arrive(block.barrier, block.num_threads, flag);
  return block.barrier.result[generation & 1];
}

const Words* exchange(const Words& own) {
  WarpState& warp = block.warps[block.current / kWarp];
  Words* slots = warp.slot[warp.barrier.generation & 1];
  slots[block.current % kWarp] = own;
  arrive(warp.barrier, kWarp, false);
  return slots;
}

void copy_begin(uint32_t shared, const void* global, bool valid) {
  check_shared(shared, 16, 16);
  if (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("misaligned global address");
  std::memset(block.shared_base + shared, 0xff, 16);
  block.fibers[block.current].open_group.push_back({shared, global, valid});
}

void copy_commit() {
  Fiber& fiber = block.fibers[block.current];
  fiber.groups.push_back(std::move(fiber.open_group));
  fiber.open_group.clear();
}

void copy_wait(int pending) {
  Fiber& fiber = block.fibers[block.current];
  while (static_cast<int>(fiber.groups.size()) > pending) {
    for (const Copy& copy : fiber.groups.front()) {
      if (copy.valid) {
        std::memcpy(block.shared_base + copy.shared, copy.global, 16);
      } else {
        std::memset(block.shared_base + copy.shared, 0, 16);
      }
    }
    fiber.groups.pop_front();
  }
}

namespace {

float decode_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int mantissa = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31)
    return mantissa ? std::numeric_limits<float>::quiet_NaN() : sign * std::numeric_limits<float>::infinity();
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return std::bit_cast<float>((static_cast<uint32_t>(bits & 0x8000) << 16) |
                              static_cast<uint32_t>(exponent + 112) << 23 | static_cast<uint32_t>(mantissa) << 13);
}

}  // namespace

float widen_half(uint16_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (int i = 0; i < 1 << 16; ++i) values[i] = decode_half(static_cast<uint16_t>(i));
    return values;
  }();
  return table[bits];
}

uint16_t round_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
  const uint32_t bits = std::bit_cast<uint32_t>(magnitude);
  const uint32_t rounded = bits + 0xfff + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded >> 13) - (112 << 10));
}

uint16_t round_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulation

Error launch(Kernel kernel, int64_t num_blocks, int num_threads, int shared_nbytes, void*, Params params) {
  using namespace emulation;
  block.kernel = kernel;
  block.params = params;
  block.grid = num_blocks;
  block.num_threads = num_threads;
  block.shared.resize(static_cast<size_t>(shared_nbytes) + 1024);
  block.shared_base = block.shared.data() + (1024 - reinterpret_cast<uintptr_t>(block.shared.data()) % 1024) % 1024;
  block.shared_nbytes = static_cast<size_t>(shared_nbytes);
  for (int64_t i = 0; i < num_blocks; ++i) {
    block.index = i;
    run_block();
  }
  return kSuccess;
}

}  // namespace foveal::cuda
