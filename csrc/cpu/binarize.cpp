// Radix select. Scores become unsigned keys of the same order. A histogram of the leading 11 bits finds the bin of the
// k-th largest key; the keys of that bin are gathered, and histograms of their next 11 and last 10 bits find the key
// itself. One more pass writes the mask. Only integers are counted, so the result is exact and the same for every number
// of threads.
#include "binarize.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <vector>

#include "isa.h"
#ifdef SPARSEBILEVEL_X86
#include <immintrin.h>
#endif

namespace sparsebilevel {
namespace {

constexpr int kHighBits = 11, kMiddleBits = 11, kLowBits = 10;
constexpr int kHighShift = kMiddleBits + kLowBits;
constexpr uint32_t kLowMask = (1u << kLowBits) - 1, kMiddleMask = (1u << kMiddleBits) - 1;
constexpr int64_t kMinPart = 1 << 15;  // below this many scores a second thread costs more than it saves

using Histogram = std::array<int64_t, 1 << 11>;

// The contiguous share of one thread.
struct Part {
  const float* scores;
  int64_t n;
  bool* mask;
  Histogram histogram;
  std::unique_ptr<uint32_t[]> candidates;  // the keys in the bin of the k-th largest, in no promised order
  int64_t candidate_count;
};

// Order-preserving bits: flip everything below zero, only the sign above. Branch-free, since signs cannot be predicted.
// Zeros are merged on the bits, not with `x + 0`, which would flush denormals in threads that run in that mode.
inline uint32_t to_key(float score) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  bits &= -static_cast<uint32_t>(bits != 0x80000000u);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

// Returns the number of NaNs.
int64_t count_high(Part& part) {
  const float* scores = part.scores;
  int64_t nans = 0;
  part.histogram.fill(0);
  for (int64_t i = 0; i < part.n; ++i) {
    nans += scores[i] != scores[i];
    ++part.histogram[to_key(scores[i]) >> kHighShift];
  }
  return nans;
}

// Writes the keys whose leading bits are `high`. No branch: a match is as hard to predict as the scores. Instead every
// key (or vector of keys) is stored and the pointer moves only past matches, so `out` needs kSpare places more.
constexpr int64_t kSpare = 16;

void gather_scalar(const float* scores, int64_t n, uint32_t high, uint32_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = to_key(scores[i]);
    *out = key;
    out += (key >> kHighShift) == high;
  }
}

#ifdef SPARSEBILEVEL_X86
SPARSEBILEVEL_AVX512 void gather_avx512(const float* scores, int64_t n, uint32_t high, uint32_t* out) {
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  const __m512i wanted = _mm512_set1_epi32(static_cast<int>(high));
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    __m512i bits = _mm512_loadu_si512(scores + i);
    bits = _mm512_mask_mov_epi32(bits, _mm512_cmpeq_epi32_mask(bits, sign), _mm512_setzero_si512());
    const __m512i key = _mm512_xor_si512(bits, _mm512_or_si512(_mm512_srai_epi32(bits, 31), sign));
    const __mmask16 match = _mm512_cmpeq_epi32_mask(_mm512_srli_epi32(key, kHighShift), wanted);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(match, key));
    out += __builtin_popcount(match);
  }
  gather_scalar(scores + i, n - i, high, out);
}
#endif

void gather(Part& part, uint32_t high) {
  part.candidate_count = part.histogram[high];
  part.candidates.reset(new uint32_t[part.candidate_count + kSpare]);
#ifdef SPARSEBILEVEL_X86
  if (isa() == Isa::avx512) return gather_avx512(part.scores, part.n, high, part.candidates.get());
#endif
  gather_scalar(part.scores, part.n, high, part.candidates.get());
}

void count_middle(Part& part) {
  part.histogram.fill(0);
  for (int64_t i = 0; i < part.candidate_count; ++i) ++part.histogram[part.candidates[i] >> kLowBits & kMiddleMask];
}

void count_low(Part& part, uint32_t prefix) {
  part.histogram.fill(0);
  for (int64_t i = 0; i < part.candidate_count; ++i) {
    const uint32_t key = part.candidates[i];
    if (key >> kLowBits == prefix) ++part.histogram[key & kLowMask];
  }
}

// The bin that holds the rank-th largest of what the parts counted; `rank` becomes the rank inside that bin.
uint32_t select_bin(const std::vector<Part>& parts, int64_t& rank) {
  for (uint32_t bin = std::tuple_size_v<Histogram>; bin-- > 0;) {
    int64_t count = 0;
    for (const Part& part : parts) count += part.histogram[bin];
    if (rank <= count) return bin;
    rank -= count;
  }
  return 0;  // not reached: 1 <= rank <= n
}

// Keeps the keys above the threshold, and of those equal to it the first `ties`.
void write_mask(const Part& part, uint32_t threshold, int64_t ties) {
  const float* scores = part.scores;
  bool* mask = part.mask;
  const bool keep_ties = ties == part.histogram[threshold & kLowMask];
  const uint32_t least = threshold + !keep_ties;  // cannot overflow: the greatest key belongs to a NaN
  for (int64_t i = 0; i < part.n; ++i) mask[i] = to_key(scores[i]) >= least;
  if (keep_ties) return;
  for (int64_t i = 0; ties > 0; ++i) {
    if (to_key(scores[i]) == threshold) {
      mask[i] = true;
      --ties;
    }
  }
}

}  // namespace

int64_t binarize(const float* scores, int64_t n, int64_t k, bool* mask, int threads) {
  const int64_t count = std::clamp<int64_t>(n / kMinPart, 1, std::max(threads, 1));
  std::vector<Part> parts(count);
  for (int64_t p = 0; p < count; ++p) {
    const int64_t begin = n * p / count, end = n * (p + 1) / count;
    parts[p].scores = scores + begin;
    parts[p].mask = mask + begin;
    parts[p].n = end - begin;
  }
  int64_t nans = 0;
#pragma omp parallel for num_threads(count) schedule(static, 1) reduction(+ : nans)
  for (int64_t p = 0; p < count; ++p) nans += count_high(parts[p]);
  if (nans > 0) return nans;
  if (k == 0) {
    std::fill_n(mask, n, false);
    return 0;
  }

  int64_t rank = k;
  const uint32_t high = select_bin(parts, rank);
#pragma omp parallel for num_threads(count) schedule(static, 1)
  for (int64_t p = 0; p < count; ++p) {
    gather(parts[p], high);
    count_middle(parts[p]);
  }
  const uint32_t prefix = high << kMiddleBits | select_bin(parts, rank);
#pragma omp parallel for num_threads(count) schedule(static, 1)
  for (int64_t p = 0; p < count; ++p) count_low(parts[p], prefix);
  const uint32_t low = select_bin(parts, rank);

  // `rank` scores equal to the threshold are kept, the first ones; the last histograms know how many each part holds.
  const uint32_t threshold = prefix << kLowBits | low;
  std::vector<int64_t> ties(count);
  for (int64_t p = 0; p < count; ++p) {
    ties[p] = std::min(rank, parts[p].histogram[low]);
    rank -= ties[p];
  }
#pragma omp parallel for num_threads(count) schedule(static, 1)
  for (int64_t p = 0; p < count; ++p) write_mask(parts[p], threshold, ties[p]);
  return 0;
}

}  // namespace sparsebilevel
