// The work is cut into blocks of pieces, of all weights together, and threads take blocks. Every piece is stepped by
// itself, so nothing depends on who takes it.
#include "optimizer_step.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "isa.h"
#include "vector.h"

namespace sparsebilevel {
namespace {

namespace scalar {

using Vector = ScalarVector;

#include "optimizer_step_inc.h"

}  // namespace scalar

#ifdef SPARSEBILEVEL_X86
SPARSEBILEVEL_BEGIN_AVX2
namespace avx2 {

using Vector = Avx2Vector;

#include "optimizer_step_inc.h"

}  // namespace avx2
SPARSEBILEVEL_END_ISA

SPARSEBILEVEL_BEGIN_AVX512
namespace avx512 {

using Vector = Avx512Vector;

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
