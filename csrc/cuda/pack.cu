// The values of a tensor at the bits of a mask, one after another, and the way back. Words and counts of the mask (see
// kernels/binarize.py) say where the values of each chunk begin: one pass, in which no chunk waits for another.
#include "device.h"

namespace sparsebilevel {
namespace {

constexpr int kPackWarps = 4;  // of a block, each with a chunk: 32 KB of shared memory for elements of 8 bytes

struct Support {
  const uint32_t* words;
  const int64_t* counts;
  int64_t size;

  __device__ int64_t chunk() const { return static_cast<int64_t>(blockIdx.x) * kPackWarps + warp_id(); }
  __device__ int chunk_size() const {
    const int64_t rest = size - chunk() * kChunk;
    return rest < kChunk ? static_cast<int>(rest) : kChunk;
  }
  __device__ uint32_t word() const {
    return lane_id() < words_of(chunk_size()) ? words[chunk() * kLanes + lane_id()] : 0;
  }
};

// Calls f(i, is_set, rank) for this lane's position i of each 32 of a chunk; `rank` counts the bits before it.
template <class F>
__device__ void for_positions(uint32_t word, F f) {
  const uint32_t prefix = warp_prefix(static_cast<uint32_t>(__popc(word)));
#pragma unroll 8
  for (int j = 0; j < kLanes; ++j) {
    const uint32_t bits = __shfl_sync(kAll, word, j), base = __shfl_sync(kAll, prefix, j);
    const auto before = static_cast<uint32_t>(__popc(bits & ((1u << lane_id()) - 1)));
    f(kLanes * j + lane_id(), (bits >> lane_id() & 1) != 0, static_cast<int>(base + before));
  }
}

// Values go through shared memory, so that they are written side by side.
template <class Element>
__global__ void __launch_bounds__(kPackWarps* kLanes) gather(Support s, const Element* dense, Element* values) {
  SPARSEBILEVEL_SHARED(parts, Element[kPackWarps][kChunk]);
  if (s.chunk() * kChunk >= s.size) return;
  Element* part = parts[warp_id()];
  dense += s.chunk() * kChunk;
  for_positions(s.word(), [&](int i, bool is_set, int rank) {
    if (is_set) part[rank] = dense[i];
  });
  __syncwarp();
  const int64_t begin = s.counts[s.chunk()];
  const int count = static_cast<int>(s.counts[s.chunk() + 1] - begin);
  for (int i = lane_id(); i < count; i += kLanes) values[begin + i] = part[i];
}

enum class Mode { overwrite, keep };

template <class Element, Mode kMode>
__global__ void __launch_bounds__(kPackWarps* kLanes) scatter(Support s, const Element* values, Element* dense) {
  if (s.chunk() * kChunk >= s.size) return;
  const int size = s.chunk_size();
  values += s.counts[s.chunk()];
  dense += s.chunk() * kChunk;
  for_positions(s.word(), [&](int i, bool is_set, int rank) {
    if (kMode == Mode::overwrite) {
      if (i < size) dense[i] = is_set ? values[rank] : Element{};
    } else if (is_set) {
      dense[i] = values[rank];
    }
  });
}

// 16 bits are computed with as float32 and rounded to the nearest, ties to even.
struct AsFloat16 {
  using Bits = uint16_t;
  __device__ static float read(Bits bits) { return half_to_float(bits); }
  __device__ static Bits write(float value) { return float_to_half(value); }
};
struct AsBFloat16 {
  using Bits = uint16_t;
  __device__ static float read(Bits bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
  __device__ static Bits write(float value) {
    const uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN, which rounding could make infinite
    return static_cast<Bits>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};
struct AsFloat32 {
  using Bits = float;
  __device__ static float read(float value) { return value; }
  __device__ static float write(float value) { return value; }
};

template <class Type>
__global__ void __launch_bounds__(kPackWarps* kLanes)
    accumulate(Support s, const typename Type::Bits* values, float alpha, typename Type::Bits* dense) {
  if (s.chunk() * kChunk >= s.size) return;
  values += s.counts[s.chunk()];
  dense += s.chunk() * kChunk;
  for_positions(s.word(), [&](int i, bool is_set, int rank) {
    if (is_set) dense[i] = Type::write(fmaf(alpha, Type::read(values[rank]), Type::read(dense[i])));
  });
}

int64_t blocks_of(int64_t size) { return divide_up(divide_up(size, kChunk), kPackWarps); }

template <class F>
int with_element(int bytes, F f) {
  if (bytes == 1)
    f(uint8_t{});
  else if (bytes == 2)
    f(uint16_t{});
  else if (bytes == 4)
    f(uint32_t{});
  else
    f(uint64_t{});
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

// values [counts' last] = dense [size] at the bits. Elements of 1, 2, 4 or 8 bytes; size is not 0.
SPARSEBILEVEL_API sparsebilevel_gather_values(const void* dense, int element_size, const void* words,
                                              const int64_t* counts, int64_t size, void* values, void* stream) {
  const Support s{static_cast<const uint32_t*>(words), counts, size};
  return with_element(element_size, [&](auto element) {
    using Element = decltype(element);
    SPARSEBILEVEL_LAUNCH(gather<Element>, blocks_of(size), kPackWarps * kLanes, stream, s,
                         static_cast<const Element*>(dense), static_cast<Element*>(values));
  });
}

// The other way; other elements become zero, or with `keep` stay as they are, untouched.
SPARSEBILEVEL_API sparsebilevel_scatter_values(const void* values, int element_size, const void* words,
                                               const int64_t* counts, int64_t size, void* dense, int keep,
                                               void* stream) {
  const Support s{static_cast<const uint32_t*>(words), counts, size};
  return with_element(element_size, [&](auto element) {
    using Element = decltype(element);
    const auto* from = static_cast<const Element*>(values);
    auto* const to = static_cast<Element*>(dense);
    if (keep)
      SPARSEBILEVEL_LAUNCH((scatter<Element, Mode::keep>), blocks_of(size), kPackWarps * kLanes, stream, s, from, to);
    else
      SPARSEBILEVEL_LAUNCH((scatter<Element, Mode::overwrite>), blocks_of(size), kPackWarps * kLanes, stream, s, from,
                           to);
  });
}

// dense += alpha * values at the bits, in float32 and rounded once. `type` 0: float16, 1: bfloat16, 2: float32.
SPARSEBILEVEL_API sparsebilevel_accumulate_values(const void* values, int type, float alpha, const void* words,
                                                  const int64_t* counts, int64_t size, void* dense, void* stream) {
  const Support s{static_cast<const uint32_t*>(words), counts, size};
  const auto launch = [&](auto type) {
    using Type = decltype(type);
    using Bits = typename Type::Bits;
    SPARSEBILEVEL_LAUNCH(accumulate<Type>, blocks_of(size), kPackWarps * kLanes, stream, s,
                         static_cast<const Bits*>(values), alpha, static_cast<Bits*>(dense));
  };
  if (type == 0)
    launch(AsFloat16{});
  else if (type == 1)
    launch(AsBFloat16{});
  else
    launch(AsFloat32{});
  return static_cast<int>(cudaGetLastError());
}

}  // namespace sparsebilevel
