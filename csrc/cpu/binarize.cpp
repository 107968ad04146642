// Selection by a sample. Scores become integer keys of the same order. A sample, or the last call, gives a narrow window
// of keys, which holds the k-th largest but for a chance of one in thousands. One read of all scores splits them at the
// window, into bits: above it, inside it; and the keys inside, one or two in a hundred, are gathered. The counts prove
// that the window was right, or say on which side to look. Histograms narrow it down to one key, of the gathered keys
// or, where these are no small part of a block, of its scores. The mask follows from the bits. Buffers have the sizes
// that were counted. Only integers are counted, and chance decides no more than how long it takes: the result is exact,
// and the same for every number of threads.
#include "binarize.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <utility>

#include "isa.h"
#ifdef SPARSEBILEVEL_X86
#include <immintrin.h>
#endif

namespace sparsebilevel {
namespace {

constexpr int64_t kBlock = 1 << 14;     // scores that a thread takes at a time; their bits start at a word
constexpr int64_t kRowsTogether = 64;   // short rows that are ranked together
constexpr int64_t kMinShare = 1 << 15;  // below this many scores a second thread costs more than it saves

static_assert(kBlock % kCountStep == 0 && kCountStep % 64 == 0);

// Scores are taken as integers, Bits: int32_t for float32, int16_t for both halves. Below zero all but the sign is
// flipped, which gives the order of the floats, and -0 (then -1, which no other score has) becomes +0. They are never
// compared as floats, of which the denormal ones equal zero in threads that flush them.
template <typename Bits>
constexpr int32_t kGreatest = std::numeric_limits<Bits>::max();

template <typename Bits>
inline int32_t to_key(Bits bits) {
  const int32_t key = bits ^ (static_cast<int32_t>(bits) >> 31 & kGreatest<Bits>);
  return key + (key == -1);
}

template <typename Bits>
inline bool is_nan(Bits bits, Bits infinity) {
  return (bits & kGreatest<Bits>) > infinity;
}

// Of 64 scores.
struct Words {
  uint64_t above, not_below;
  bool nan;
};

struct Split {
  uint64_t *above, *inside;
  int64_t num_above, num_inside;
  bool nan;
};

template <typename Bits>
struct Kernels {
  void (*split)(const Bits*, int64_t, int32_t, int32_t, Bits, Split&);
  void (*gather)(const Bits*, int64_t, const uint64_t*, int32_t*);
  int64_t (*settle)(int64_t, const int32_t*, int32_t, uint64_t*, uint64_t*);
  void (*write)(int64_t, int64_t, uint64_t*, const uint64_t*, bool*);
  using Rank = int64_t(const Bits*, int64_t, int64_t, int64_t, int64_t, Bits, int32_t, bool*);
  Rank *rank, *rank2, *rank4, *rank8;  // of any length, or of those that are contiguous
  void (*pack)(const bool*, int64_t, uint64_t*);
  int64_t (*count)(const uint64_t*, int64_t);
};

namespace scalar {

template <typename Bits>
Words compare(const Bits* scores, Bits low, Bits high, Bits infinity) {
  Words words{0, 0, false};
  for (int j = 0; j < 64; ++j) {
    const int32_t key = scores[j] ^ (static_cast<int32_t>(scores[j]) >> 31 & kGreatest<Bits>);
    words.above |= static_cast<uint64_t>(key > high) << j;
    words.not_below |= static_cast<uint64_t>(key >= low) << j;
    words.nan |= is_nan(scores[j], infinity);
  }
  return words;
}

inline void expand(uint64_t word, bool* mask) {
  for (int j = 0; j < 64; j += 8) {  // bit b to the lowest bit of byte b
    uint64_t bytes = (word >> j & 0xff) * 0x0101010101010101u & 0x8040201008040201u;
    bytes = (bytes + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
    std::memcpy(mask + j, &bytes, sizeof bytes);
  }
}

#include "binarize_inc.h"

}  // namespace scalar

#ifdef SPARSEBILEVEL_X86
SPARSEBILEVEL_BEGIN_AVX2
namespace avx2 {

inline Words compare(const int32_t* scores, int32_t low, int32_t high, int32_t infinity) {
  const __m256i absolute = _mm256_set1_epi32(0x7fffffff), most = _mm256_set1_epi32(high);
  const __m256i least = _mm256_set1_epi32(low), finite = _mm256_set1_epi32(infinity);
  __m256i nan = _mm256_setzero_si256();
  uint64_t above = 0, below = 0;
  for (int j = 0; j < 64; j += 8) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scores + j));
    const __m256i key = _mm256_xor_si256(bits, _mm256_and_si256(_mm256_srai_epi32(bits, 31), absolute));
    const __m256i over = _mm256_cmpgt_epi32(key, most), under = _mm256_cmpgt_epi32(least, key);
    above |= static_cast<uint64_t>(_mm256_movemask_ps(_mm256_castsi256_ps(over))) << j;
    below |= static_cast<uint64_t>(_mm256_movemask_ps(_mm256_castsi256_ps(under))) << j;
    nan = _mm256_or_si256(nan, _mm256_cmpgt_epi32(_mm256_and_si256(bits, absolute), finite));
  }
  return {above, ~below, !_mm256_testz_si256(nan, nan)};
}

inline Words compare(const int16_t* scores, int16_t low, int16_t high, int16_t infinity) {
  const __m256i absolute = _mm256_set1_epi16(0x7fff), most = _mm256_set1_epi16(high);
  const __m256i least = _mm256_set1_epi16(low), finite = _mm256_set1_epi16(infinity);
  __m256i nan = _mm256_setzero_si256();
  uint64_t above = 0, below = 0;
  for (int j = 0; j < 64; j += 32) {
    __m256i over[2], under[2];
    for (int half = 0; half < 2; ++half) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scores + j + 16 * half));
      const __m256i key = _mm256_xor_si256(bits, _mm256_and_si256(_mm256_srai_epi16(bits, 15), absolute));
      over[half] = _mm256_cmpgt_epi16(key, most);
      under[half] = _mm256_cmpgt_epi16(least, key);
      nan = _mm256_or_si256(nan, _mm256_cmpgt_epi16(_mm256_and_si256(bits, absolute), finite));
    }
    // Packing works within 128-bit lanes; the permutation puts their quarters in order.
    const __m256i over8 = _mm256_permute4x64_epi64(_mm256_packs_epi16(over[0], over[1]), 0xd8);
    const __m256i under8 = _mm256_permute4x64_epi64(_mm256_packs_epi16(under[0], under[1]), 0xd8);
    above |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(over8))) << j;
    below |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(under8))) << j;
  }
  return {above, ~below, !_mm256_testz_si256(nan, nan)};
}

inline void expand(uint64_t word, bool* mask) {
  const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  for (int j = 0; j < 64; j += 32) {
    const __m256i bits = _mm256_set1_epi32(static_cast<int32_t>(word >> j));
    const __m256i chosen = _mm256_and_si256(_mm256_shuffle_epi8(bits, byte), bit);
    const __m256i ones = _mm256_and_si256(_mm256_cmpeq_epi8(chosen, bit), _mm256_set1_epi8(1));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(mask + j), ones);
  }
}

#include "binarize_inc.h"

}  // namespace avx2
SPARSEBILEVEL_END_ISA

SPARSEBILEVEL_BEGIN_AVX512
namespace avx512 {

inline Words compare(const int32_t* scores, int32_t low, int32_t high, int32_t infinity) {
  const __m512i absolute = _mm512_set1_epi32(0x7fffffff), most = _mm512_set1_epi32(high);
  const __m512i least = _mm512_set1_epi32(low), finite = _mm512_set1_epi32(infinity);
  uint64_t above = 0, not_below = 0;
  __mmask16 nan = 0;
  for (int j = 0; j < 64; j += 16) {
    const __m512i bits = _mm512_loadu_si512(scores + j);
    const __m512i key = _mm512_xor_si512(bits, _mm512_and_si512(_mm512_srai_epi32(bits, 31), absolute));
    above |= static_cast<uint64_t>(_mm512_cmpgt_epi32_mask(key, most)) << j;
    not_below |= static_cast<uint64_t>(_mm512_cmpge_epi32_mask(key, least)) << j;
    nan |= _mm512_cmpgt_epi32_mask(_mm512_and_si512(bits, absolute), finite);
  }
  return {above, not_below, nan != 0};
}

inline Words compare(const int16_t* scores, int16_t low, int16_t high, int16_t infinity) {
  const __m512i absolute = _mm512_set1_epi16(0x7fff), most = _mm512_set1_epi16(high);
  const __m512i least = _mm512_set1_epi16(low), finite = _mm512_set1_epi16(infinity);
  uint64_t above = 0, not_below = 0;
  __mmask32 nan = 0;
  for (int j = 0; j < 64; j += 32) {
    const __m512i bits = _mm512_loadu_si512(scores + j);
    const __m512i key = _mm512_xor_si512(bits, _mm512_and_si512(_mm512_srai_epi16(bits, 15), absolute));
    above |= static_cast<uint64_t>(_mm512_cmpgt_epi16_mask(key, most)) << j;
    not_below |= static_cast<uint64_t>(_mm512_cmpge_epi16_mask(key, least)) << j;
    nan |= _mm512_cmpgt_epi16_mask(_mm512_and_si512(bits, absolute), finite);
  }
  return {above, not_below, nan != 0};
}

inline void expand(uint64_t word, bool* mask) { _mm512_storeu_si512(mask, _mm512_maskz_set1_epi8(word, 1)); }

#include "binarize_inc.h"

}  // namespace avx512
SPARSEBILEVEL_END_ISA
#endif

template <typename Bits>
Kernels<Bits> kernels() {
#ifdef SPARSEBILEVEL_X86
  if (isa() == Isa::avx512) return avx512::table<Bits>();
  if (isa() == Isa::avx2) return avx2::table<Bits>();
#endif
  return scalar::table<Bits>();
}

int threads_for(int64_t scores, int threads) {
  return static_cast<int>(std::clamp<int64_t>(scores / kMinShare, 1, std::max(threads, 1)));
}

// Keys [low, high], which hold the k-th largest if `above` < k <= `above` + `inside`: the scores with larger keys, and
// those with keys in between.
struct Window {
  int32_t low, high;
  int64_t above = 0, inside = 0;

  bool holds(int64_t k) const { return above < k && k <= above + inside; }
};

// Bins of equal width: many, or few where there is little to count.
struct Bins {
  uint32_t low, range;
  int64_t count;
  int shift = 0;

  explicit Bins(const Window& w)
      : low(static_cast<uint32_t>(w.low)),
        range(static_cast<uint32_t>(w.high) - static_cast<uint32_t>(w.low)),
        count(w.inside > 4096 ? 2048 : 128) {
    while (range >> shift >= count) ++shift;
  }
  int64_t operator()(int32_t key) const {  // `count` if the key is outside of the window
    const uint32_t distance = static_cast<uint32_t>(key) - low;
    return distance <= range ? distance >> shift : count;
  }
  // The bins with the first-th to the last-th largest.
  Window holding(int64_t first, int64_t last, const Window& w, const std::vector<int64_t>& counts) const {
    int64_t above = w.above;
    uint32_t bin = range >> shift;
    for (; bin > 0 && above + counts[bin] < first; --bin) above += counts[bin];
    const uint32_t high = std::min(range, (bin << shift) + (1u << shift) - 1);
    int64_t inside = counts[bin];
    while (bin > 0 && above + inside < last) inside += counts[--bin];
    return {static_cast<int32_t>(low + (bin << shift)), static_cast<int32_t>(low + high), above, inside};
  }
};

template <typename Bits>
class Selection {
 public:
  Selection(const std::vector<ScoreTensor>& tensors, Bits infinity, int64_t k, int threads)
      : infinity_(infinity), k_(k), kernels_(kernels<Bits>()) {
    int64_t num_words = 0;
    for (const ScoreTensor& t : tensors) {
      size_ += t.size;
      num_words += (t.size + 63) / 64 * (t.words ? 1 : 2);
    }
    threads_ = threads_for(size_, threads);
    words_.reset(new uint64_t[num_words]);
    uint64_t* words = words_.get();
    int64_t offset = 0;
    blocks_.reserve(size_ / kBlock + static_cast<int64_t>(tensors.size()));
    for (const ScoreTensor& t : tensors)
      for (int64_t begin = 0; begin < t.size; begin += kBlock) {
        Block block{static_cast<const Bits*>(t.scores) + begin, std::min(kBlock, t.size - begin), t.mask + begin};
        const int64_t count = (block.size + 63) / 64;
        block.split.inside = words;
        words += count;
        block.split.above = t.words ? t.words + begin / 64 : words;
        if (!t.words) words += count;
        block.offset = offset;
        offset += block.size;
        blocks_.push_back(std::move(block));
      }
  }

  // Whether there was no NaN. `hint`: the window to begin with, and afterwards the one for the next time; or null.
  bool run(int32_t* hint = nullptr) {
    Window w{kGreatest<Bits>, kGreatest<Bits>};
    bool found = k_ == 0;
    if (found || (hint && usable(hint, w))) {
      if (!split(w)) return false;
      // A window with more scores than a sample would leave costs more than the sample.
      found = found || (w.holds(k_) && (w.low == w.high || w.inside <= 8 * size_ / root()));
    }
    if (!found) {
      w = sampled_window();
      if (!split(w)) return false;
    }
    const Window first = w;
    if (k_ > 0 && !w.holds(k_)) {
      if (k_ <= w.above) w = {w.high + 1, kGreatest<Bits>, 0, w.above};
      else w = {kLeast, w.low - 1, w.above + w.inside, size_ - w.above - w.inside};
      for (Block& block : blocks_) block.gathered = false;
    }
    Window next = w;
    if (w.low < w.high) w = narrow(w, next);
    for (Window unused; w.low < w.high;) w = narrow(w, unused);
    if (w.low != first.low || w.high != first.high) for_blocks([&](Block& b) { settle(b, w.low); });
    if (hint && k_ > 0) {
      hint[0] = next.low;
      hint[1] = next.high;
    }

    int64_t ties = k_ - w.above;
    for (Block& block : blocks_) {
      block.ties = std::min(ties, block.split.num_inside);
      ties -= block.ties;
    }
    for_blocks([&](Block& b) { kernels_.write(b.size, b.ties, b.split.above, b.split.inside, b.mask); });
    return true;
  }

 private:
  static constexpr int32_t kLeast = -kGreatest<Bits> - 1;

  static int32_t clamped(int64_t key) {
    return static_cast<int32_t>(std::clamp<int64_t>(key, kLeast, kGreatest<Bits>));
  }

  // Takes over what an earlier call learned. Anything may stand there: counts decide what it is worth.
  static bool usable(const int32_t* hint, Window& w) {
    w = {clamped(hint[0]), clamped(hint[1])};
    return w.low <= w.high && (hint[0] != 0 || hint[1] != 0);
  }

  int64_t root() const { return std::max<int64_t>(std::llround(std::cbrt(static_cast<double>(size_))), 1); }

  struct Block {
    const Bits* scores;
    int64_t size;
    bool* mask;
    int64_t offset = 0;  // of the first score, among all
    Split split{};
    bool gathered = false;
    std::vector<int32_t> keys;  // if gathered: those of the scores inside
    int64_t ties = 0;
  };

  template <class F>
  void for_blocks(F f) {
    const int64_t count = static_cast<int64_t>(blocks_.size());
#pragma omp parallel for num_threads(threads_) schedule(dynamic, 4) if (threads_ > 1)
    for (int64_t b = 0; b < count; ++b) f(blocks_[b]);
  }

  // Where a sample puts the k-th largest, give or take four standard deviations. One score is drawn from each of equal
  // stretches, at a place that is as good as random: nothing in the scores repeats with it.
  Window sampled_window() {
    const int64_t stride = size_ < 1024 ? 1 : size_ < 1 << 20 ? root() : 2 * root();  // a miss in the cache costs more
    const int64_t count = (size_ + stride - 1) / stride;
    std::vector<int32_t> sample(count);
    for_blocks([&](const Block& b) {
      for (int64_t i = (b.offset + stride - 1) / stride; i * stride < b.offset + b.size; ++i) {
        const int64_t first = i * stride - b.offset, length = std::min(stride, b.size - first);
        const uint64_t random = static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15u >> 33;  // 31 bits
        sample[i] = to_key(b.scores[first + static_cast<int64_t>(random * static_cast<uint64_t>(length) >> 31)]);
      }
    });
    const double share = static_cast<double>(k_) / static_cast<double>(size_);
    const double expected = static_cast<double>(k_) * static_cast<double>(count) / static_cast<double>(size_);
    const double error = stride == 1 ? 0 : 4 * std::sqrt(expected * (1 - share)) + 2;
    // Places in descending order, counted from 0.
    const int64_t first = static_cast<int64_t>(std::ceil(expected - error)) - 1;
    const int64_t last = static_cast<int64_t>(std::ceil(expected + error)) - 1;
    Window w{kLeast, kGreatest<Bits>};
    auto begin = sample.begin();
    if (first >= 0) {
      std::nth_element(begin, sample.begin() + first, sample.end(), std::greater<>());
      begin += first;
      w.high = *begin;
    }
    if (last < count) {
      std::nth_element(begin, sample.begin() + last, sample.end(), std::greater<>());
      w.low = sample[last];
    }
    return w;
  }

  // Splits all blocks at the window, counts, and gathers while the scores are in the cache. False if there are NaNs.
  bool split(Window& w) {
    for_blocks([&](Block& b) {
      kernels_.split(b.scores, b.size, w.low, w.high, infinity_, b.split);
      b.gathered = w.low < w.high && b.split.num_inside <= b.size / 4;
      if (!b.gathered) return;
      b.keys.resize(b.split.num_inside);
      kernels_.gather(b.scores, b.size, b.split.inside, b.keys.data());
    });
    w.above = w.inside = 0;
    for (const Block& block : blocks_) {
      w.above += block.split.num_above;
      w.inside += block.split.num_inside;
      nan_ |= block.split.nan;
    }
    return !nan_;
  }

  // A window of a thousandth of the width, and `next`, the one to begin with when similar scores come: half of this one
  // about the k-th largest, or wider if that lay far from the middle, but not below a few thousandths of all scores.
  Window narrow(const Window& w, Window& next) {
    const Bins bins(w);
    std::vector<int64_t> total(bins.count + 1);
    const int64_t num_blocks = static_cast<int64_t>(blocks_.size());
#pragma omp parallel num_threads(threads_) if (threads_ > 1)
    {
      // Neighbours are counted apart: equal keys in a row would wait for one another.
      std::vector<int64_t> counts(2 * (bins.count + 1));
      int64_t *even = counts.data(), *odd = even + bins.count + 1;
#pragma omp for schedule(dynamic, 4) nowait
      for (int64_t i = 0; i < num_blocks; ++i) {
        const Block& b = blocks_[i];
        if (b.gathered) {
          for (const int32_t key : b.keys) ++even[bins(key)];
        } else {
          for (int64_t j = 0; j + 1 < b.size; j += 2) {
            ++even[bins(to_key(b.scores[j]))];
            ++odd[bins(to_key(b.scores[j + 1]))];
          }
          if (b.size % 2) ++even[bins(to_key(b.scores[b.size - 1]))];
        }
      }
#pragma omp critical(sparsebilevel_binarize)
      for (int64_t bin = 0; bin < bins.count; ++bin) total[bin] += even[bin] + odd[bin];
    }
    const int64_t aside = std::abs(2 * (k_ - w.above) - w.inside);
    const int64_t reach = std::max({aside, w.inside / 4, size_ / 1024 + 1});
    next = bins.holding(std::max(k_ - reach, w.above + 1), std::min(k_ + reach, w.above + w.inside), w, total);
    return bins.holding(k_, k_, w, total);
  }

  // The bits of a block at the threshold; those equal to it are then inside.
  void settle(Block& b, int32_t threshold) {
    if (b.gathered)
      b.split.num_inside = kernels_.settle(b.size, b.keys.data(), threshold, b.split.above, b.split.inside);
    else
      kernels_.split(b.scores, b.size, threshold, threshold, infinity_, b.split);
  }

  Bits infinity_;
  int64_t size_ = 0, k_;
  int threads_ = 1;
  bool nan_ = false;
  Kernels<Bits> kernels_;
  std::unique_ptr<uint64_t[]> words_;
  std::vector<Block> blocks_;
};

// Calls f with the bits of infinity, whose type says how wide a score is.
template <class F>
auto with_infinity(ScoreType type, F f) {
  if (type == ScoreType::float32) return f(int32_t{0x7f800000});
  return f(static_cast<int16_t>(type == ScoreType::float16 ? 0x7c00 : 0x7f80));
}

template <typename Bits>
int64_t count_nans(const void* scores, int64_t size, Bits infinity) {
  const Bits* bits = static_cast<const Bits*>(scores);
  return std::count_if(bits, bits + size, [=](Bits b) { return is_nan(b, infinity); });
}

// Rows that lie side by side are ranked together: all of them if inner is 1, else those of one outer index.
template <typename Bits>
int64_t rank_rows(const Bits* scores, int64_t outer, int64_t length, int64_t inner, Bits infinity, int64_t k,
                  bool* mask, int threads) {
  const Kernels<Bits> all = kernels<Bits>();
  auto* rank = all.rank;
  if (inner == 1) rank = length == 2 ? all.rank2 : length == 4 ? all.rank4 : length == 8 ? all.rank8 : rank;
  const int64_t planes = inner == 1 ? 1 : outer, rows = inner == 1 ? outer : inner, step = inner == 1 ? length : 1;
  const int64_t parts = (rows + kRowsTogether - 1) / kRowsTogether;
  int64_t nans = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : nans) if (threads > 1)
  for (int64_t part = 0; part < planes * parts; ++part) {
    const int64_t first = part % parts * kRowsTogether, offset = part / parts * length * inner + first * step;
    const int64_t count = std::min(kRowsTogether, rows - first);
    nans += rank(scores + offset, count, step, length, inner, infinity, static_cast<int32_t>(k), mask + offset);
  }
  return nans;
}

template <typename Bits>
int64_t select_rows(const Bits* scores, int64_t rows, int64_t length, Bits infinity, int64_t k, bool* mask,
                    int threads) {
  int64_t nans = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(+ : nans) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const ScoreTensor tensor{scores + row * length, length, mask + row * length, nullptr};
    if (!Selection<Bits>({tensor}, infinity, k, 1).run()) nans += count_nans(tensor.scores, length, infinity);
  }
  return nans;
}

}  // namespace

std::vector<int64_t> binarize(const std::vector<ScoreTensor>& tensors, ScoreType type, int64_t k, int threads,
                              int32_t* hint) {
  return with_infinity(type, [&](auto infinity) {
    std::vector<int64_t> nans;
    if (!Selection<decltype(infinity)>(tensors, infinity, k, threads).run(hint))
      for (const ScoreTensor& t : tensors) nans.push_back(count_nans(t.scores, t.size, infinity));
    return nans;
  });
}

int64_t binarize_rows(const void* scores, int64_t outer, int64_t length, int64_t inner, ScoreType type, int64_t k,
                      bool* mask, int threads) {
  threads = threads_for(outer * length * inner, threads);
  return with_infinity(type, [=](auto infinity) {
    const auto* bits = static_cast<const decltype(infinity)*>(scores);
    if (length <= kShortRow) return rank_rows(bits, outer, length, inner, infinity, k, mask, threads);
    return select_rows(bits, outer, length, infinity, k, mask, threads);
  });
}

void pack_words(const bool* mask, int64_t size, uint64_t* words, int threads) {
  const auto pack = kernels<int32_t>().pack;
  threads = threads_for(size, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t begin = 0; begin < size; begin += kBlock)
    pack(mask + begin, std::min(kBlock, size - begin), words + begin / 64);
}

void count_words(const uint64_t* words, int64_t size, int64_t* counts) {
  const auto count = kernels<int32_t>().count;
  const int64_t num_words = (size + 63) / 64, step = kCountStep / 64;
  *counts = 0;
  for (int64_t begin = 0; begin < num_words; begin += step, ++counts)
    counts[1] = counts[0] + count(words + begin, std::min(step, num_words - begin));
}

void occupied_tiles(const uint64_t* words, int64_t rows, int64_t cols, int64_t tile_rows, int64_t tile_cols,
                    bool* tiles, int threads) {
  const int64_t across = (cols + tile_cols - 1) / tile_cols, down = (rows + tile_rows - 1) / tile_rows;
  threads = threads_for(rows * cols, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < down; ++r) {
    bool* out = tiles + r * across;
    std::fill_n(out, across, false);
    for (int64_t row = r * tile_rows; row < std::min((r + 1) * tile_rows, rows); ++row)
      for (int64_t c = 0; c < across; ++c) {
        const int64_t begin = row * cols + c * tile_cols, end = row * cols + std::min((c + 1) * tile_cols, cols);
        for (int64_t at = begin; at < end && !out[c]; at = (at / 64 + 1) * 64) {
          uint64_t word = words[at / 64] >> (at % 64);
          if (end - at < 64) word &= (uint64_t{1} << (end - at)) - 1;
          out[c] = word != 0;
        }
      }
  }
}

}  // namespace sparsebilevel
