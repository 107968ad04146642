// As much of CUDA as csrc/cuda needs, for any C++ compiler: the kernels run on the CPU, exactly as they are written.
//
// Blocks run one after another, in an arbitrary order. The threads of a block are fibers; each runs until it waits, for
// its block or its warp, or now and then at an atomic operation, and which one goes on is drawn at random. So what lacks a
// barrier is found in some order (set_emulation_seed chooses among them), and under a sanitizer so is every step outside
// of an array. Shared memory is allocated anew for every block and filled with rubbish, as is its stack for a fiber.
// A barrier that some threads do not reach ends the program with a message; so do lanes of a warp that disagree.
//
// Not emulated: what blocks of one launch do to each other at the same time but by atomics, weak memory order, the
// rounding of CUDA's mathematical functions, and time.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define SPARSEBILEVEL_SHARED(name, ...) auto& name = emulation::shared<__VA_ARGS__>(__FILE__, __LINE__)
#define SPARSEBILEVEL_LAUNCH(kernel, blocks, threads, stream, ...) \
  (static_cast<void>(stream), emulation::launch(blocks, threads, [=] { kernel(__VA_ARGS__); }))

struct uint4 {
  unsigned x, y, z, w;
};
struct Dim {
  unsigned x = 0;
};
inline Dim threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kLanes = 32;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 1 << 16;
#else
constexpr size_t kStack = 1 << 14;
#endif
constexpr char kRubbish = static_cast<char>(0xa5);

enum class Wait { nothing, block, warp, finished };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Wait wait = Wait::nothing;
  const char* operation = nullptr;
  uint64_t value = 0;
};

struct Warp {
  int waiting = 0;
  uint64_t values[kLanes];  // those of the operation before
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned> runnable, idle;           // idle ones look again when something has happened: see wake
  std::vector<std::function<void()>> background;  // what goes on beside the threads
  std::vector<char> dynamic_shared;
  std::map<std::pair<const char*, int>, std::unique_ptr<char[]>> shared;  // by the line of its declaration
  unsigned waiting = 0;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  void* fake_stack = nullptr;
  std::function<void()> kernel;
};

inline Block block;
inline std::mt19937_64 random_order(0);

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

inline Fiber& current() { return *block.fibers[threadIdx.x]; }

// The sanitizer must know that the stack changes.
inline void begin_switch([[maybe_unused]] void** keep, [[maybe_unused]] const void* stack,
                         [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(keep, stack, size);
#endif
}
inline void end_switch([[maybe_unused]] void* kept, [[maybe_unused]] const void** stack,
                       [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(kept, stack, size);
#endif
}

// Back to the scheduler, until it chooses this thread again.
inline void pause() {
  void* fake_stack = nullptr;
  Fiber& fiber = current();
  begin_switch(&fake_stack, block.scheduler_stack, block.scheduler_stack_size);
  swapcontext(&fiber.context, &block.scheduler);
  end_switch(fake_stack, nullptr, nullptr);
}

// Has the threads that wait for something look again.
inline void wake() {
  block.runnable.insert(block.runnable.end(), block.idle.begin(), block.idle.end());
  block.idle.clear();
}

inline void run_fiber() {
  end_switch(nullptr, &block.scheduler_stack, &block.scheduler_stack_size);
  block.kernel();
  current().wait = Wait::finished;
  begin_switch(nullptr, block.scheduler_stack, block.scheduler_stack_size);
  setcontext(&block.scheduler);
}

inline void wait_for_block() {
  current().wait = Wait::block;
  if (++block.waiting == block.fibers.size()) {
    block.waiting = 0;
    for (unsigned i = 0; i < block.fibers.size(); ++i) {
      block.fibers[i]->wait = Wait::nothing;
      if (i != threadIdx.x) block.runnable.push_back(i);
    }
    block.runnable.push_back(threadIdx.x);
  }
  pause();
}

// Gives a value to the warp, and returns those of all lanes.
inline const uint64_t* exchange(unsigned lanes, const char* operation, uint64_t value) {
  if (lanes != 0xffffffffu) fail("only operations of whole warps are emulated");
  Fiber& fiber = current();
  const unsigned first = threadIdx.x / kLanes * kLanes;
  Warp& warp = block.warps[threadIdx.x / kLanes];
  fiber.wait = Wait::warp;
  fiber.operation = operation;
  fiber.value = value;
  if (++warp.waiting == kLanes) {
    warp.waiting = 0;
    for (unsigned i = 0; i < kLanes; ++i) {
      Fiber& other = *block.fibers[first + i];
      if (std::strcmp(other.operation, operation) != 0) fail("the lanes of a warp wait for different operations");
      warp.values[i] = other.value;
      other.wait = Wait::nothing;
      block.runnable.push_back(first + i);
    }
  }
  pause();
  return warp.values;
}

inline void maybe_pause() {
  if (random_order() % 16) return;
  block.runnable.push_back(threadIdx.x);
  pause();
}

inline void run_block(unsigned threads) {
  while (block.fibers.size() < threads) block.fibers.push_back(std::make_unique<Fiber>());
  block.fibers.resize(threads);
  block.warps.assign(threads / kLanes, {});
  block.shared.clear();
  block.waiting = 0;
  block.runnable.clear();
  block.idle.clear();
  std::fill(block.dynamic_shared.begin(), block.dynamic_shared.end(), kRubbish);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *block.fibers[i];
    fiber.wait = Wait::nothing;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack.get(), kStack);  // the frames of a finished fiber never returned
#endif
    std::memset(fiber.stack.get() + kStack / 2, kRubbish, kStack / 2);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
    block.runnable.push_back(i);
  }
  while (!block.runnable.empty() || !block.background.empty()) {
    if (block.runnable.empty() || (!block.background.empty() && random_order() % 1024 == 0)) {  // late, mostly
      const auto at = block.background.begin() + static_cast<std::ptrdiff_t>(random_order() % block.background.size());
      const auto operation = std::move(*at);
      block.background.erase(at);
      operation();
      continue;
    }
    const size_t drawn = random_order() % block.runnable.size();
    threadIdx.x = block.runnable[drawn];
    block.runnable[drawn] = block.runnable.back();
    block.runnable.pop_back();
    Fiber& fiber = current();
    void* fake_stack = nullptr;
    begin_switch(&fake_stack, fiber.stack.get(), kStack);
    swapcontext(&block.scheduler, &fiber.context);
    end_switch(fake_stack, nullptr, nullptr);
  }
  for (const auto& fiber : block.fibers)
    if (fiber->wait != Wait::finished) fail("a barrier that not all threads reach");
}

inline void launch(int64_t blocks, unsigned threads, std::function<void()> kernel, size_t shared = 0) {
  if (blocks < 1 || blocks > 0x7fffffff || threads < 1 || threads > 1024 || threads % kLanes) fail("bad launch");
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_order);
  block.kernel = std::move(kernel);
  block.dynamic_shared.resize(shared);
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = threads;
  for (const unsigned b : order) {
    blockIdx.x = b;
    run_block(threads);
  }
  block.shared.clear();
}

template <class T>
T& shared(const char* file, int line) {
  auto& memory = block.shared[{file, line}];
  if (!memory) {
    memory.reset(new char[sizeof(T)]);
    std::memset(memory.get(), kRubbish, sizeof(T));
  }
  return *reinterpret_cast<T*>(memory.get());
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait_for_block(); }
inline void __syncwarp() { emulation::exchange(0xffffffffu, "syncwarp", 0); }

template <class T>
T __shfl_sync(unsigned lanes, T value, int lane) {
  return static_cast<T>(emulation::exchange(lanes, "shfl", value)[lane % emulation::kLanes]);
}
template <class T>
T __shfl_up_sync(unsigned lanes, T value, int distance) {
  const int lane = static_cast<int>(threadIdx.x) % emulation::kLanes;
  return static_cast<T>(emulation::exchange(lanes, "shfl_up", value)[std::max(lane - distance, 0)]);
}
inline unsigned __ballot_sync(unsigned lanes, bool predicate) {
  const uint64_t* values = emulation::exchange(lanes, "ballot", predicate);
  unsigned bits = 0;
  for (int i = 0; i < emulation::kLanes; ++i) bits |= static_cast<unsigned>(values[i]) << i;
  return bits;
}
inline unsigned __reduce_add_sync(unsigned lanes, unsigned value) {
  const uint64_t* values = emulation::exchange(lanes, "reduce_add", value);
  unsigned sum = 0;
  for (int i = 0; i < emulation::kLanes; ++i) sum += static_cast<unsigned>(values[i]);
  return sum;
}
template <class T, class U>
T atomicAdd(T* at, U value) {
  emulation::maybe_pause();
  const T before = *at;
  *at = before + static_cast<T>(value);
  return before;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * std::ldexp(static_cast<float>(exponent ? mantissa + 1024 : mantissa), std::max(exponent, 1) - 25);
}
inline uint16_t float_to_half(float value) {
  const auto sign = static_cast<uint16_t>(__float_as_uint(value) >> 16 & 0x8000);
  unsigned bits = __float_as_uint(value) & 0x7fffffff;
  if (bits > 0x7f800000) return 0x7fff;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 rounds to infinity
  if (bits < 0x38800000) return sign | static_cast<uint16_t>(std::nearbyint(std::fabs(value) * 16777216.0f));
  bits += 0xfff + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((bits - 0x38000000) >> 13);
}
inline int cudaGetLastError() { return 0; }
inline const char* cudaGetErrorString(int) { return "no error"; }
using cudaError_t = int;

extern "C" __attribute__((visibility("default"), used)) inline void set_emulation_seed(uint64_t seed) {
  emulation::random_order.seed(seed);
}
