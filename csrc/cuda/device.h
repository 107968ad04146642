// What the CUDA kernels share. The files are compiled by nvcc, and for the tests by any C++ compiler, which reads
// tests/csrc/cuda_emulation.h first: everything a kernel uses must be there. So that blocks can run one after another
// they never wait for one another; what all must have finished is another launch.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define SPARSEBILEVEL_SHARED(name, ...) __shared__ sparsebilevel::Same<__VA_ARGS__> name
#define SPARSEBILEVEL_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
namespace sparsebilevel {
__device__ inline float half_to_float(uint16_t bits) {  // cuda_fp16.h takes longer to compile than all of this
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ inline uint16_t float_to_half(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
}  // namespace sparsebilevel
#endif
// Launchers return a cudaError_t as an integer; 0 is success.
#define SPARSEBILEVEL_API extern "C" __attribute__((visibility("default"))) int

namespace sparsebilevel {

template <class T>
using Same = T;  // gives an array a type in front of its name

// A chunk of positions is a warp's: each lane has one word of 32 bits of it.
constexpr int kChunk = 1024, kLanes = 32, kWarps = 8, kThreads = kWarps * kLanes;
constexpr unsigned kAll = 0xffffffffu;

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Consecutive chunks of a warp: one, unless there are more than a GPU works on at a time. The tests set another number.
#ifndef SPARSEBILEVEL_CHUNKS_AT_A_TIME
#define SPARSEBILEVEL_CHUNKS_AT_A_TIME 4224
#endif
inline int chunks_of_warp(int64_t chunks) {
  const int64_t each = divide_up(chunks, SPARSEBILEVEL_CHUNKS_AT_A_TIME);
  return each < 1 ? 1 : each > 8 ? 8 : static_cast<int>(each);
}

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x % kLanes); }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x / kLanes); }
__device__ inline int64_t first_chunk(int warp_chunks) {
  return (static_cast<int64_t>(blockIdx.x) * kWarps + warp_id()) * warp_chunks;
}

// Sum over the lanes before this one.
__device__ inline uint32_t warp_prefix(uint32_t value) {
  uint32_t sum = value;
  for (int step = 1; step < kLanes; step *= 2) {
    const uint32_t other = __shfl_up_sync(kAll, sum, step);
    if (lane_id() >= step) sum += other;
  }
  return sum - value;
}

// The lowest `count` of the bits that are set.
__device__ inline uint32_t lowest_bits(uint32_t bits, int count) {
  if (count >= __popc(bits)) return bits;
  uint32_t rest = bits;
  for (int i = 0; i < count; ++i) rest &= rest - 1;
  return bits ^ rest;
}

// Two numbers of positions: those that are certain, and those that are ties. Of a chunk they fit into 32 bits, of all
// positions, fewer than 2^32, into 64.
struct Pair {
  uint32_t certain, ties;
};

__device__ inline uint32_t pack_chunk(Pair p) { return p.certain | p.ties << 16; }
__device__ inline Pair unpack_chunk(uint32_t packed) { return {packed & 0xffff, packed >> 16}; }
__device__ inline unsigned long long pack_total(Pair p) {
  return p.certain | static_cast<unsigned long long>(p.ties) << 32;
}
__device__ inline Pair unpack_total(unsigned long long packed) {
  return {static_cast<uint32_t>(packed), static_cast<uint32_t>(packed >> 32)};
}

__device__ inline Pair warp_sum(Pair p) {
  return {__reduce_add_sync(kAll, p.certain), __reduce_add_sync(kAll, p.ties)};
}

// Sum over the threads of a block.
__device__ inline Pair block_sum(Pair p) {
  SPARSEBILEVEL_SHARED(sum, unsigned long long);
  __syncthreads();  // a call before may still read it
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  p = warp_sum(p);
  if (lane_id() == 0) atomicAdd(&sum, pack_total(p));
  __syncthreads();
  return unpack_total(sum);
}

// Sum over the chunks from `first` on, before `end`, for a whole warp.
__device__ inline Pair sum_chunks(const uint32_t* chunks, int64_t first, int64_t end) {
  Pair sum{0, 0};
  for (int64_t i = first + lane_id(); i < end; i += kLanes) {
    const Pair p = unpack_chunk(chunks[i]);
    sum.certain += p.certain;
    sum.ties += p.ties;
  }
  return warp_sum(sum);
}

// Sum over all positions before a chunk, for a whole block: chunks [chunks], totals [blocks]. Totals are read by every
// block: what a warp each read would be eight times as much, and more than the scores of a hundred million.
__device__ inline Pair before(const uint32_t* chunks, const unsigned long long* totals, int64_t chunk,
                              int warp_chunks) {
  const int64_t block_chunks = kWarps * warp_chunks, block = chunk / block_chunks;
  Pair sum{0, 0};
  for (int64_t i = threadIdx.x; i < block; i += kThreads) {
    const Pair p = unpack_total(totals[i]);
    sum.certain += p.certain;
    sum.ties += p.ties;
  }
  for (int64_t i = block * block_chunks + threadIdx.x; i < chunk; i += kThreads) {
    const Pair p = unpack_chunk(chunks[i]);
    sum.certain += p.certain;
    sum.ties += p.ties;
  }
  return block_sum(sum);
}

// Bits of a chunk, a word a lane, as bools. `mask` has `size` positions and begins at a multiple of 16 bytes.
__device__ inline void write_mask(uint32_t word, uint8_t* mask, int size) {
  for (int half = 0; half < 2; ++half) {
    const uint32_t bits = __shfl_sync(kAll, word, 16 * half + lane_id() / 2) >> 16 * (lane_id() % 2);
    const int begin = 512 * half + 16 * lane_id();
    if (begin + 16 <= size) {
      uint4 bytes;
      bytes.x = (bits & 15) * 0x00204081 & 0x01010101;
      bytes.y = (bits >> 4 & 15) * 0x00204081 & 0x01010101;
      bytes.z = (bits >> 8 & 15) * 0x00204081 & 0x01010101;
      bytes.w = (bits >> 12 & 15) * 0x00204081 & 0x01010101;
      *reinterpret_cast<uint4*>(mask + begin) = bytes;
    } else {
      for (int i = begin; i < size; ++i) mask[i] = bits >> (i - begin) & 1;
    }
  }
}

// Words of 32 bits that belong to a chunk of `size` positions: pairs of them are words of 64.
__device__ inline int words_of(int size) { return (size + 63) / 64 * 2; }

}  // namespace sparsebilevel
