// binarize against std::sort, in buffers of exactly the sizes it is told, so that a sanitizer sees a step outside.
#include "binarize.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "isa.h"

namespace {

using sparsebilevel::Isa;

std::mt19937_64 random_bits(0);

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }

// Any bits but NaN, or few values (so that ties are the rule), or scores close together, whose leading bits are equal.
float draw_score(int kind) {
  static const float few[] = {-INFINITY, -1.0f, -0.0f, 0.0f, 1e-45f, 1.0f, INFINITY};
  if (kind == 1) return few[draw(0, 6)];
  if (kind == 2) return 1.0f + 1e-6f * static_cast<float>(draw(0, 50));
  for (;;) {
    const uint32_t bits = static_cast<uint32_t>(random_bits());
    float score;
    std::memcpy(&score, &bits, sizeof score);
    if (!std::isnan(score)) return score;
  }
}

std::vector<bool> sorted_mask(const float* scores, int64_t n, int64_t k) {
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  });
  std::vector<bool> mask(n);
  for (int64_t i = 0; i < k; ++i) mask[order[i]] = true;
  return mask;
}

void check(int64_t n) {
  const std::unique_ptr<float[]> scores(new float[n]);
  const std::unique_ptr<bool[]> mask(new bool[n]);
  const int kind = static_cast<int>(draw(0, 2));
  for (int64_t i = 0; i < n; ++i) scores[i] = draw_score(kind);
  const int64_t k = draw(0, 4) == 0 ? n * draw(0, 1) : draw(0, n);
  const std::vector<bool> expected = sorted_mask(scores.get(), n, k);
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    sparsebilevel::set_isa(isa);  // as far as the processor goes
    for (const int threads : {1, 2, 5}) {
      std::fill_n(mask.get(), n, draw(0, 1) == 1);
      const int64_t nans = sparsebilevel::binarize(scores.get(), n, k, mask.get(), threads);
      if (nans != 0 || !std::equal(expected.begin(), expected.end(), mask.get())) {
        std::fprintf(stderr, "wrong mask: n=%lld k=%lld kind=%d isa=%d threads=%d\n", static_cast<long long>(n),
                     static_cast<long long>(k), kind, static_cast<int>(sparsebilevel::isa()), threads);
        std::exit(1);
      }
    }
  }
  if (n == 0) return;
  const int64_t count = std::min<int64_t>(n, 3);
  for (int64_t i = 0; i < count; ++i) scores[n - 1 - i] = std::numeric_limits<float>::quiet_NaN();
  if (sparsebilevel::binarize(scores.get(), n, k, mask.get(), 2) != count) {
    std::fprintf(stderr, "NaNs miscounted: n=%lld\n", static_cast<long long>(n));
    std::exit(1);
  }
}

}  // namespace

int main() {
  for (int64_t n = 0; n <= 100; ++n)
    for (int repeat = 0; repeat < 10; ++repeat) check(n);
  for (int repeat = 0; repeat < 50; ++repeat) check(draw(101, 5000));
  for (int repeat = 0; repeat < 12; ++repeat) check(draw(1 << 16, 1 << 18));  // shared among threads
  std::puts("ok");
}
