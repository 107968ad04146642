// The work is cut into blocks of pieces, of all weights together, and threads take blocks. Every piece is stepped by
// itself, so nothing depends on who takes it.
#include "optimizer_step.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "isa.h"
#ifdef SPARSEBILEVEL_X86
#include <immintrin.h>
#endif

namespace sparsebilevel {
namespace {

namespace scalar {

// Four lanes of a vector extension: as much as every 64-bit processor has.
struct Vector {
  using Type = float __attribute__((vector_size(16)));
  using Bits = int32_t __attribute__((vector_size(16)));
  static constexpr int kWidth = 4;
  static Type load(const float* p) {
    Type v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, Type v) { __builtin_memcpy(p, &v, sizeof v); }
  static Type broadcast(float x) { return Type{x, x, x, x}; }
  static Type add(Type a, Type b) { return a + b; }
  static Type sub(Type a, Type b) { return a - b; }
  static Type mul(Type a, Type b) { return a * b; }
  static Type div(Type a, Type b) { return a / b; }
  static Type sqrt(Type a) {
    return Type{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
  }
  static Type fma(Type a, Type b, Type c) { return a * b + c; }
  static Type rounded(Type a) { return a; }
  static Type load_lanes(const float* p, uint32_t bits) {
    const Bits wanted = Bits{1, 2, 4, 8} & static_cast<int32_t>(bits);
    return wanted != Bits{} ? load(p) : Type{};
  }
};

#include "optimizer_step_inc.h"

}  // namespace scalar

#ifdef SPARSEBILEVEL_X86
SPARSEBILEVEL_BEGIN_AVX2
namespace avx2 {

struct Vector {
  using Type = __m256;
  static constexpr int kWidth = 8;
  static Type load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Type v) { _mm256_storeu_ps(p, v); }
  static Type broadcast(float x) { return _mm256_set1_ps(x); }
  static Type add(Type a, Type b) { return _mm256_add_ps(a, b); }
  static Type sub(Type a, Type b) { return _mm256_sub_ps(a, b); }
  static Type mul(Type a, Type b) { return _mm256_mul_ps(a, b); }
  static Type div(Type a, Type b) { return _mm256_div_ps(a, b); }
  static Type sqrt(Type a) { return _mm256_sqrt_ps(a); }
  static Type fma(Type a, Type b, Type c) { return _mm256_fmadd_ps(a, b, c); }
  static Type rounded(Type a) {
    asm("" : "+x"(a));
    return a;
  }
  static Type load_lanes(const float* p, uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i wanted = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
    return _mm256_and_ps(load(p), _mm256_castsi256_ps(_mm256_cmpeq_epi32(wanted, lane)));
  }
};

#include "optimizer_step_inc.h"

}  // namespace avx2
SPARSEBILEVEL_END_ISA

SPARSEBILEVEL_BEGIN_AVX512
namespace avx512 {

struct Vector {
  using Type = __m512;
  static constexpr int kWidth = 16;
  static Type load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Type v) { _mm512_storeu_ps(p, v); }
  static Type broadcast(float x) { return _mm512_set1_ps(x); }
  static Type add(Type a, Type b) { return _mm512_add_ps(a, b); }
  static Type sub(Type a, Type b) { return _mm512_sub_ps(a, b); }
  static Type mul(Type a, Type b) { return _mm512_mul_ps(a, b); }
  static Type div(Type a, Type b) { return _mm512_div_ps(a, b); }
  static Type sqrt(Type a) { return _mm512_maskz_sqrt_ps(0xffff, a); }
  static Type fma(Type a, Type b, Type c) { return _mm512_fmadd_ps(a, b, c); }
  static Type rounded(Type a) {
    asm("" : "+v"(a));
    return a;
  }
  static Type load_lanes(const float* p, uint32_t bits) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(bits), p);
  }
};

#include "optimizer_step_inc.h"

}  // namespace avx512
SPARSEBILEVEL_END_ISA
#endif

// A share of the work: elements [begin, end) of a list.
struct Block {
  size_t list;
  int64_t begin, end;
};

std::vector<Block> cut(const std::vector<int64_t>& lengths, int64_t most) {
  std::vector<Block> blocks;
  for (size_t list = 0; list < lengths.size(); ++list)
    for (int64_t begin = 0; begin < lengths[list]; begin += most)
      blocks.push_back({list, begin, std::min(begin + most, lengths[list])});
  return blocks;
}

template <class Settings>
void step(const std::vector<OptimizedWeight>& weights, const Settings& settings, int threads,
          void (*pieces)(const OptimizedWeight&, const Settings&, int64_t, int64_t)) {
  std::vector<int64_t> lengths;
  for (const OptimizedWeight& w : weights) lengths.push_back(static_cast<int64_t>(w.pieces->list.size()));
  const std::vector<Block> blocks = cut(lengths, 1024);
  const int64_t count = static_cast<int64_t>(blocks.size());
#pragma omp parallel for num_threads(std::max(threads, 1)) schedule(dynamic, 1) if (count > 1)
  for (int64_t b = 0; b < count; ++b) pieces(weights[blocks[b].list], settings, blocks[b].begin, blocks[b].end);
}

// Which of `count` <= kPiece elements are True, as bits.
uint32_t lanes_of(const bool* mask, int64_t count) {
  uint32_t lanes = 0;
  if (count < kPiece) {
    for (int64_t i = 0; i < count; ++i) lanes |= static_cast<uint32_t>(mask[i]) << i;
    return lanes;
  }
  for (int64_t i = 0; i < kPiece; i += 8) {
    uint64_t bytes;  // zeros and ones, on a little-endian machine; the multiplication moves byte j to bit 56 + j
    std::memcpy(&bytes, mask + i, sizeof bytes);
    lanes |= static_cast<uint32_t>(bytes * 0x0102040810204080u >> 56) << i;
  }
  return lanes;
}

bool all_zero(const float* values, int64_t count) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t value;
    std::memcpy(&value, values + i, sizeof value);
    bits |= value;
  }
  return !(bits & 0x7fffffffu);  // minus zero is zero
}

// Whether elements [begin, end) are zero wherever the `pieces` among them have no lane.
bool zero_outside(const std::vector<ActivePiece>& pieces, const float* values, int64_t begin, int64_t end) {
  for (const ActivePiece& piece : pieces) {
    const int64_t first = piece.index * kPiece, last = std::min(first + kPiece, end);
    if (!all_zero(values + begin, first - begin)) return false;
    for (int64_t i = first; i < last; ++i)
      if (!(piece.lanes >> (i - first) & 1) && values[i] != 0) return false;
    begin = last;
  }
  return all_zero(values + begin, end - begin);
}

}  // namespace

std::shared_ptr<ActivePieces> find_active_pieces(const bool* mask, int64_t size,
                                                 const std::vector<const float*>& tensors, int64_t most, int threads) {
  const std::vector<Block> blocks = cut({size}, 1 << 14);
  const int64_t count = static_cast<int64_t>(blocks.size());
  std::vector<std::vector<ActivePiece>> parts(blocks.size());
#pragma omp parallel for num_threads(std::max(threads, 1)) schedule(static) if (count > 1)
  for (int64_t b = 0; b < count; ++b)
    for (int64_t i = blocks[b].begin; i < blocks[b].end; i += kPiece)
      if (const uint32_t lanes = lanes_of(mask + i, std::min(kPiece, blocks[b].end - i)))
        parts[b].push_back({static_cast<uint32_t>(i / kPiece), lanes});
  int64_t found = 0;
  for (const auto& part : parts) found += static_cast<int64_t>(part.size());
  if (found > most) return nullptr;

  std::atomic<bool> fits{true};  // most weights that do not fit show it in the first block
#pragma omp parallel for num_threads(std::max(threads, 1)) schedule(static) if (count > 1)
  for (int64_t b = 0; b < count; ++b)
    for (const float* tensor : tensors)
      if (fits && !zero_outside(parts[b], tensor, blocks[b].begin, blocks[b].end)) fits = false;
  if (!fits) return nullptr;
  auto pieces = std::make_shared<ActivePieces>();
  pieces->list.reserve(found);
  for (const auto& part : parts) pieces->list.insert(pieces->list.end(), part.begin(), part.end());
  return pieces;
}

void sgd_step(const std::vector<OptimizedWeight>& weights, const SgdSettings& settings, int threads) {
#ifdef SPARSEBILEVEL_X86
  if (isa() == Isa::avx512) return step(weights, settings, threads, &avx512::sgd_pieces);
  if (isa() == Isa::avx2) return step(weights, settings, threads, &avx2::sgd_pieces);
#endif
  step(weights, settings, threads, &scalar::sgd_pieces);
}

void adamw_step(const std::vector<OptimizedWeight>& weights, const AdamwSettings& settings, int threads) {
#ifdef SPARSEBILEVEL_X86
  if (isa() == Isa::avx512) return step(weights, settings, threads, &avx512::adamw_pieces);
  if (isa() == Isa::avx2) return step(weights, settings, threads, &avx2::adamw_pieces);
#endif
  step(weights, settings, threads, &scalar::adamw_pieces);
}

}  // namespace sparsebilevel
