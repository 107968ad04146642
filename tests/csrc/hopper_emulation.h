// As much of Hopper's copy engine and tensor cores as csrc/cuda/hopper.h needs, beside cuda_emulation.h.
//
// What runs in the background does so at random times, and as late as it may: copies when the scheduler draws them, and
// products only when they are waited for. So what is read before it has been waited for, or overwritten before it was
// read, gives wrong results. Operands are found in memory as the hardware finds them, by descriptor and swizzle.
//
// Not emulated: the fences between stores and the copy engine, and the order in which products round.
#pragma once

#include <deque>

#include "cuda_emulation.h"

struct int2 {
  int x, y;
};
struct uint2 {
  unsigned x, y;
};
struct float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
template <class T>
T __ldcs(const T* at) {
  return *at;
}
template <class T>
void __stcs(T* at, T value) {
  *at = value;
}
template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int other) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = emulation::exchange(lanes, "shfl_xor", bits)[static_cast<int>(threadIdx.x) % emulation::kLanes ^ other];
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline int min(int a, int b) { return std::min(a, b); }
inline constexpr cudaError_t cudaErrorInvalidValue = 1;

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float value_of_bits(__half value) { return half_to_float(value.bits); }
inline float value_of_bits(__nv_bfloat16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }
inline uint16_t bits_of(__half, float value) { return float_to_half(value); }
inline uint16_t bits_of(__nv_bfloat16, float value) {
  const unsigned bits = __float_as_uint(value);
  return static_cast<uint16_t>(std::isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A matrix of 16-bit elements, copied in boxes of 64 columns.
struct CUtensorMap {
  uint16_t* data;
  int64_t rows, cols;
  int box_rows;
};

namespace emulation {

constexpr int kWarpgroup = 128;
inline std::map<int, int> arrived;                        // at the barriers of warpgroups
inline std::map<unsigned, int> unread;                    // copies from shared memory that a thread has begun
inline std::map<unsigned, std::deque<std::vector<std::function<void()>>>> products;  // of a thread, by group

template <class Condition>
void wait_until(Condition condition) {
  while (!condition()) {
    block.idle.push_back(threadIdx.x);
    pause();
  }
}

// Where a byte of a matrix in shared memory is: 16 bytes trade places within the 128 of a row.
inline uint8_t* swizzled(uint64_t address) { return reinterpret_cast<uint8_t*>(address ^ (address >> 7 & 7) << 4); }

}  // namespace emulation

namespace sparsebilevel {

struct Barrier {
  int arrivals, missing;
  int64_t bytes;
  uint32_t phase;

  void init(int count) { arrivals = missing = count, bytes = 0, phase = 0; }
  void wait(uint32_t parity) {
    emulation::maybe_pause();
    emulation::wait_until([&] { return (phase & 1) != parity; });
  }
  void arrive_and_expect(uint32_t more) {
    bytes += more;
    arrive();
  }
  void arrive() {
    if (--missing < 0) emulation::fail("more arrivals at a barrier than it waits for");
    settle();
  }
  void settle() {
    if (missing == 0 && bytes == 0) {
      missing = arrivals, ++phase;
      emulation::wake();
    }
  }
};

inline void fence_barriers() {}
inline void prefetch(const void*) {}
inline void fence_stores() {}
inline void sync_group(int group) {
  int& count = emulation::arrived[group];
  const int round = count / emulation::kWarpgroup;
  if (++count % emulation::kWarpgroup == 0) emulation::wake();
  emulation::wait_until([&] { return count / emulation::kWarpgroup > round; });
}

template <class Copy>
void each_of_box(const CUtensorMap& matrix, int row, int col, const void* shared, Copy copy) {
  for (int r = 0; r < matrix.box_rows; ++r) {
    for (int c = 0; c < 64; ++c) {
      auto* at = emulation::swizzled(reinterpret_cast<uint64_t>(shared) + r * 128 + c * 2);
      const int64_t i = row + r, j = col + c;
      const bool is_inside = i >= 0 && i < matrix.rows && j >= 0 && j < matrix.cols;
      copy(reinterpret_cast<uint16_t*>(at), is_inside ? matrix.data + i * matrix.cols + j : nullptr);
    }
  }
}
inline void load_box(void* to, const CUtensorMap& matrix, int row, int col, Barrier& barrier) {
  if (reinterpret_cast<uint64_t>(to) % 1024) emulation::fail("a box in shared memory is not aligned");
  emulation::block.background.push_back([=, &barrier] {
    each_of_box(matrix, row, col, to, [](uint16_t* at, const uint16_t* from) { *at = from ? *from : 0; });
    barrier.bytes -= matrix.box_rows * 128;
    barrier.settle();
  });
}
inline void store_box(const CUtensorMap& matrix, int row, int col, const void* from) {
  const unsigned thread = threadIdx.x;
  ++emulation::unread[thread];
  emulation::block.background.push_back([=] {
    each_of_box(matrix, row, col, from, [](const uint16_t* at, uint16_t* to) {
      if (to) *to = *at;
    });
    --emulation::unread[thread];
    emulation::wake();
  });
}
inline void wait_until_stores_have_read() {
  const unsigned thread = threadIdx.x;
  emulation::wait_until([=] { return emulation::unread[thread] == 0; });
}

// The address in units of 16 bytes, as a descriptor of the hardware has it; what hopper.h says there beside it is fixed.
inline uint64_t operand(const void* start) { return reinterpret_cast<uint64_t>(start) >> 4; }

// Element (line, summand) of an operand.
template <class Element, bool kTransposed>
float element_of(uint64_t descriptor, int line, int summand) {
  constexpr int kEightRows = 1024, kNextColumns = 64 * 64 * 2;
  const int offset = kTransposed ? line / 64 * kNextColumns + line % 64 * 2 + summand / 8 * kEightRows + summand % 8 * 128
                                 : line / 8 * kEightRows + line % 8 * 128 + summand * 2;
  Element value;
  std::memcpy(&value, emulation::swizzled((descriptor << 4) + offset), sizeof value);
  return value_of_bits(value);
}

template <class Element, int kColumns, bool kLeft, bool kRight, int kSums>
void multiply(float (&sums)[kSums], uint64_t left, uint64_t right, int add) {
  static_assert(2 * kSums == kColumns);
  auto& groups = emulation::products[threadIdx.x];
  if (groups.empty()) emulation::fail("products outside of begin_multiplying and end_multiplying");
  const int thread = static_cast<int>(threadIdx.x) % emulation::kWarpgroup, lane = thread % 32;
  groups.back().push_back([=, &sums] {
    for (int i = 0; i < kSums; ++i) {
      const int row = thread / 32 * 16 + lane / 4 + i / 2 % 2 * 8, col = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = add ? sums[i] : 0;
      for (int k = 0; k < 16; ++k) {
        sum += element_of<Element, kLeft>(left, row, k) * element_of<Element, kRight>(right, col, k);
      }
      sums[i] = sum;
    }
  });
}
// The instructions are those of whole warps, whose lanes wait for one another there.
inline void begin_multiplying() {
  emulation::exchange(0xffffffffu, "wgmma.fence", 0);
  emulation::products[threadIdx.x].emplace_back();
}
inline void end_multiplying() { emulation::exchange(0xffffffffu, "wgmma.commit_group", 0); }
inline void wait_for_products() {
  emulation::exchange(0xffffffffu, "wgmma.wait_group", 0);
  auto& groups = emulation::products[threadIdx.x];
  while (!groups.empty()) {
    for (const auto& product : groups.front()) product();
    groups.pop_front();
  }
  emulation::exchange(0xffffffffu, "wgmma.wait_group", 0);  // those of all lanes are there
}
template <int kSums>
void take(float (&)[kSums]) {
  if (!emulation::products[threadIdx.x].empty()) emulation::fail("sums are read before their products are there");
}

inline void store_transposed(void* to, int offset, const uint32_t (&packed)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint64_t address = reinterpret_cast<uint64_t>(to) + offset;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint64_t rows[32];
    std::memcpy(rows, emulation::exchange(0xffffffffu, "stmatrix", address), sizeof rows);
    for (int half = 0; half < 2; ++half) {
      const uint16_t bits = static_cast<uint16_t>(packed[matrix] >> 16 * half);
      const uint64_t row = rows[8 * matrix + lane % 4 * 2 + half];
      std::memcpy(reinterpret_cast<void*>(row + lane / 4 * 2), &bits, sizeof bits);
    }
  }
}
inline void forget(int64_t&) {}

template <class Shared>
Shared& shared_memory() {
  return *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(emulation::block.dynamic_shared.data()) + 1023) & ~uintptr_t{1023});
}

template <class Element>
uint32_t pack(float low, float high) {
  return bits_of(Element{}, low) | static_cast<uint32_t>(bits_of(Element{}, high)) << 16;
}

inline bool describe(CUtensorMap& map, const void* data, int, int64_t rows, int64_t cols, int box_rows) {
  map = {static_cast<uint16_t*>(const_cast<void*>(data)), rows, cols, box_rows};
  return reinterpret_cast<uint64_t>(data) % 16 == 0 && cols % 8 == 0 && box_rows <= 256;
}
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, void*,
                   const Arguments&... arguments) {
  emulation::arrived.clear(), emulation::unread.clear(), emulation::products.clear();
  emulation::launch(blocks, static_cast<unsigned>(threads), [=] { kernel(arguments...); }, shared);
  return 0;
}

}  // namespace sparsebilevel
