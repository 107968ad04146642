// binarize against std::sort, in buffers of exactly the sizes it is told, so that a sanitizer sees a step outside.
#include "binarize.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "isa.h"

namespace {

using sparsebilevel::Isa;
using sparsebilevel::ScoreTensor;
using sparsebilevel::ScoreType;

std::mt19937_64 random_bits(0);

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }

void require(bool condition, const char* what, int64_t n, int64_t k) {
  if (condition) return;
  std::fprintf(stderr, "%s: n=%lld k=%lld isa=%d\n", what, static_cast<long long>(n), static_cast<long long>(k),
               static_cast<int>(sparsebilevel::isa()));
  std::exit(1);
}

// Scores of any type, by their bits: the order is that of sign and magnitude, and both zeros are equal.
struct Scores {
  ScoreType type;
  int64_t size;
  std::unique_ptr<char[]> memory;

  Scores(ScoreType t, int64_t n) : type(t), size(n), memory(new char[n * bytes()]) {}
  int bytes() const { return type == ScoreType::float32 ? 4 : 2; }
  uint32_t sign() const { return 1u << (8 * bytes() - 1); }
  uint32_t infinity() const {
    return type == ScoreType::float32 ? 0x7f800000u : type == ScoreType::float16 ? 0x7c00u : 0x7f80u;
  }
  void set(int64_t i, uint32_t bits) { std::memcpy(memory.get() + i * bytes(), &bits, bytes()); }
  int64_t rank(int64_t i) const {
    uint32_t bits = 0;
    std::memcpy(&bits, memory.get() + i * bytes(), bytes());
    const int64_t magnitude = bits & (sign() - 1);
    return bits & sign() ? -magnitude : magnitude;
  }
  // Any bits but NaN, or few values (so that ties are the rule), or scores close together, or two values, or sorted ones.
  void fill(int kind) {
    const uint32_t few[] = {0, sign(), 1, sign() | 1, infinity(), sign() | infinity(), infinity() / 2};
    for (int64_t i = 0; i < size; ++i) {
      if (kind == 0) {
        uint32_t bits;
        do {
          bits = static_cast<uint32_t>(random_bits()) & (2 * sign() - 1);
        } while ((bits & (sign() - 1)) > infinity());
        set(i, bits);
      } else if (kind == 1) {
        set(i, few[draw(0, 6)]);
      } else if (kind == 2) {
        set(i, infinity() / 2 + static_cast<uint32_t>(draw(0, 50)));
      } else if (kind == 3) {
        set(i, infinity() / 2 + static_cast<uint32_t>(draw(0, 1)));
      } else {
        set(i, static_cast<uint32_t>(i) & (infinity() - 1));
      }
    }
  }
};

constexpr int kKinds = 5;

ScoreType draw_type() {
  return std::vector<ScoreType>{ScoreType::float32, ScoreType::float16, ScoreType::bfloat16}[draw(0, 2)];
}

// Of the ranks in the given order of positions, which are among the k largest.
std::vector<bool> sorted_mask(const std::vector<int64_t>& ranks, int64_t k) {
  const int64_t n = static_cast<int64_t>(ranks.size());
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return ranks[a] != ranks[b] ? ranks[a] > ranks[b] : a < b; });
  std::vector<bool> mask(n);
  for (int64_t i = 0; i < k; ++i) mask[order[i]] = true;
  return mask;
}

int64_t draw_k(int64_t n) {
  const int64_t ends[] = {0, 1, n - 1, n};
  return draw(0, 2) == 0 ? std::clamp<int64_t>(ends[draw(0, 3)], 0, n) : draw(0, n);
}

void check_words(const std::vector<bool>& mask, const uint64_t* words) {
  const int64_t n = static_cast<int64_t>(mask.size()), num_words = (n + 63) / 64;
  for (int64_t i = 0; i < 64 * num_words; ++i)
    require((words[i / 64] >> (i % 64) & 1) == (i < n && mask[i]), "wrong words", n, i);
  const int64_t num_counts = (n + sparsebilevel::kCountStep - 1) / sparsebilevel::kCountStep + 1;
  const std::unique_ptr<int64_t[]> counts(new int64_t[num_counts]);
  sparsebilevel::count_words(words, n, counts.get());
  for (int64_t c = 0; c < num_counts; ++c)
    require(counts[c] == std::count(mask.begin(), mask.begin() + std::min(c * sparsebilevel::kCountStep, n), true),
            "wrong counts", n, c);
}

// Tensors of the given sizes, ranked together.
void check(const std::vector<int64_t>& sizes) {
  const ScoreType type = draw_type();
  const int kind = static_cast<int>(draw(0, kKinds - 1));
  std::vector<Scores> scores;
  std::vector<int64_t> ranks;
  for (const int64_t size : sizes) {
    scores.emplace_back(type, size);
    scores.back().fill(kind);
    for (int64_t i = 0; i < size; ++i) ranks.push_back(scores.back().rank(i));
  }
  const int64_t n = static_cast<int64_t>(ranks.size()), k = draw_k(n);
  const std::vector<bool> expected = sorted_mask(ranks, k);
  std::vector<std::unique_ptr<bool[]>> masks;
  std::vector<std::unique_ptr<uint64_t[]>> words;
  for (const int64_t size : sizes) {
    masks.emplace_back(new bool[size]);
    words.emplace_back(new uint64_t[(size + 63) / 64]);
  }
  int32_t hint[2] = {0, 0};
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    sparsebilevel::set_isa(isa);  // as far as the processor goes
    // Nothing, what an earlier call left, or nonsense: sorted or not, and of any size.
    if (draw(0, 1)) hint[0] = static_cast<int32_t>(random_bits());
    if (draw(0, 1)) hint[1] = static_cast<int32_t>(random_bits());
    for (const int threads : {1, 2, 8}) {
      std::vector<ScoreTensor> tensors;
      for (size_t t = 0; t < sizes.size(); ++t) {
        std::fill_n(masks[t].get(), sizes[t], draw(0, 1) == 1);
        uint64_t* const wanted = draw(0, 1) || threads == 8 ? words[t].get() : nullptr;
        tensors.push_back({scores[t].memory.get(), sizes[t], masks[t].get(), wanted});
      }
      require(sparsebilevel::binarize(tensors, type, k, threads, draw(0, 1) ? hint : nullptr).empty(), "NaN seen", n, k);
      int64_t offset = 0;
      for (size_t t = 0; t < sizes.size(); offset += sizes[t++])
        require(std::equal(masks[t].get(), masks[t].get() + sizes[t], expected.begin() + offset), "wrong mask", n, k);
      if (threads != 8) continue;
      offset = 0;
      for (size_t t = 0; t < sizes.size(); offset += sizes[t++])
        check_words({expected.begin() + offset, expected.begin() + offset + sizes[t]}, words[t].get());
    }
    if (n == 0) continue;
    const int64_t last = sizes.back(), count = std::min<int64_t>(last, 3);
    if (count == 0) continue;
    Scores broken(type, last);
    broken.fill(0);
    for (int64_t i = 0; i < count; ++i) broken.set(last - 1 - i, broken.infinity() + 1 + (i % 2 ? broken.sign() : 0));
    std::vector<ScoreTensor> tensors;
    for (size_t t = 0; t < sizes.size(); ++t)
      tensors.push_back({scores[t].memory.get(), sizes[t], masks[t].get(), nullptr});
    tensors.back().scores = broken.memory.get();
    const std::vector<int64_t> nans = sparsebilevel::binarize(tensors, type, k, 2, draw(0, 1) ? hint : nullptr);
    require(nans.size() == sizes.size() && nans.back() == count, "NaNs miscounted", n, k);
  }
}

void check_rows(int64_t outer, int64_t length, int64_t inner) {
  const ScoreType type = draw_type();
  const int64_t n = outer * length * inner, k = draw_k(length);
  Scores scores(type, n);
  scores.fill(static_cast<int>(draw(0, kKinds - 1)));
  const std::unique_ptr<bool[]> mask(new bool[n]);
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    sparsebilevel::set_isa(isa);
    for (const int threads : {1, 3}) {
      const void* memory = scores.memory.get();
      const int64_t nans = sparsebilevel::binarize_rows(memory, outer, length, inner, type, k, mask.get(), threads);
      require(nans == 0, "NaN seen in rows", length, k);
      for (int64_t o = 0; o < outer; ++o)
        for (int64_t i = 0; i < inner; ++i) {
          std::vector<int64_t> ranks(length);
          for (int64_t j = 0; j < length; ++j) ranks[j] = scores.rank((o * length + j) * inner + i);
          const std::vector<bool> expected = sorted_mask(ranks, k);
          for (int64_t j = 0; j < length; ++j)
            require(mask[(o * length + j) * inner + i] == expected[j], "wrong mask of rows", length, k);
        }
    }
  }
}

void check_tiles(int64_t rows, int64_t cols, int64_t tile_rows, int64_t tile_cols) {
  const int64_t n = rows * cols, across = (cols + tile_cols - 1) / tile_cols, down = (rows + tile_rows - 1) / tile_rows;
  const std::unique_ptr<bool[]> mask(new bool[n]), tiles(new bool[across * down]);
  const std::unique_ptr<uint64_t[]> words(new uint64_t[(n + 63) / 64]);
  for (int64_t i = 0; i < n; ++i) mask[i] = draw(0, 30) == 0;
  sparsebilevel::pack_words(mask.get(), n, words.get(), 2);
  check_words(std::vector<bool>(mask.get(), mask.get() + n), words.get());
  sparsebilevel::occupied_tiles(words.get(), rows, cols, tile_rows, tile_cols, tiles.get(), 2);
  std::vector<bool> expected(across * down);
  for (int64_t i = 0; i < n; ++i)
    if (mask[i]) expected[i / cols / tile_rows * across + i % cols / tile_cols] = true;
  require(std::equal(expected.begin(), expected.end(), tiles.get()), "wrong tiles", rows, cols);
}

}  // namespace

int main() {
  check({});
  for (int64_t n = 0; n <= 100; ++n)
    for (int repeat = 0; repeat < 4; ++repeat) check({n});
  for (int repeat = 0; repeat < 40; ++repeat) check({draw(101, 5000)});
  for (int repeat = 0; repeat < 40; ++repeat) check({draw(0, 100), draw(0, 3000), 0, draw(1, 70)});
  for (int repeat = 0; repeat < 20; ++repeat) check({draw(1 << 16, 1 << 17), draw(1, 1 << 15)});  // shared among threads
  for (int repeat = 0; repeat < 60; ++repeat) check_rows(draw(1, 200), draw(1, sparsebilevel::kShortRow), draw(1, 9));
  for (int repeat = 0; repeat < 20; ++repeat) check_rows(draw(1, 40), draw(1, 3000), 1);
  for (const int64_t length : {2, 4, 8}) check_rows(9000, length, 1);
  check_rows(3, 4, 700);
  for (int repeat = 0; repeat < 60; ++repeat) check_tiles(draw(1, 70), draw(1, 300), draw(1, 80), draw(1, 140));
  std::puts("ok");
}
