// Steps on active pieces against the formulas, in buffers of exactly the sizes they are told, so that a sanitizer sees a
// step outside.
#include "optimizer_step.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "isa.h"

namespace {

using namespace sparsebilevel;

std::mt19937_64 random_bits(0);

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }
float draw_value() { return std::normal_distribution<float>()(random_bits); }

void fail(const char* what, int64_t n) {
  std::fprintf(stderr, "%s: n=%lld isa=%d\n", what, static_cast<long long>(n), static_cast<int>(isa()));
  std::exit(1);
}

// A weight whose tensors are zero where its mask is False, but for the gradient.
struct Example {
  int64_t n;
  std::unique_ptr<bool[]> mask;
  std::unique_ptr<float[]> weight, grad, first, second;

  Example(int64_t n, double density) : n(n), mask(new bool[n]) {
    for (auto* tensor : {&weight, &grad, &first, &second}) tensor->reset(new float[n]);
    for (int64_t i = 0; i < n; ++i) {
      mask[i] = std::bernoulli_distribution(density)(random_bits);
      weight[i] = mask[i] ? draw_value() : 0.0f;
      grad[i] = draw_value();
      first[i] = mask[i] ? draw_value() : -0.0f;
      second[i] = mask[i] ? std::fabs(draw_value()) : 0.0f;
    }
  }

  std::shared_ptr<ActivePieces> pieces(int64_t most, int threads) const {
    return find_active_pieces(mask.get(), n, {weight.get(), first.get(), second.get()}, most, threads);
  }
};

void check_pieces(const Example& e, const ActivePieces& pieces) {
  std::vector<bool> seen(e.n);
  int64_t last = -1;
  for (const ActivePiece& piece : pieces.list) {
    if (piece.index <= last || !piece.lanes) fail("pieces out of order", e.n);
    last = piece.index;
    for (int i = 0; i < kPiece; ++i)
      if (piece.lanes >> i & 1) seen.at(piece.index * kPiece + i) = true;
  }
  for (int64_t i = 0; i < e.n; ++i)
    if (seen[i] != e.mask[i]) fail("wrong pieces", e.n);
}

bool close(float a, double b) { return std::fabs(a - b) <= 1e-5 * (1 + std::fabs(b)); }

void check(int64_t n, double density) {
  for (const Isa wanted : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    set_isa(wanted);  // as far as the processor goes
    for (const int threads : {1, 2, 5}) {
      Example e(n, density);
      const auto pieces = e.pieces(n, threads);
      if (!pieces) fail("zeros not seen", n);
      check_pieces(e, *pieces);
      if (!pieces->list.empty() && e.pieces(static_cast<int64_t>(pieces->list.size()) - 1, threads))
        fail("more pieces than allowed", n);
      const double w0 = n ? e.weight[n - 1] : 0, m0 = n ? e.first[n - 1] : 0, v0 = n ? e.second[n - 1] : 0;
      const double g = n && e.mask[n - 1] ? e.grad[n - 1] : 0;
      const bool plain = draw(0, 1);
      sgd_step({{pieces, e.weight.get(), e.grad.get(), plain ? nullptr : e.first.get(), nullptr, n, 1}},
               {0.1, plain ? 0.0 : 0.9, 0.2, 0.01, false, false}, threads);
      const double decayed = g + 0.01 * w0, buffer = 0.9 * m0 + 0.8 * decayed;
      const double w1 = w0 - 0.1 * (plain ? decayed : buffer), m1 = plain ? m0 : buffer;
      if (n && (!close(e.weight[n - 1], w1) || !close(e.first[n - 1], m1))) fail("wrong SGD", n);
      adamw_step({{pieces, e.weight.get(), e.grad.get(), e.first.get(), e.second.get(), n, 3}},
                 {0.1, 0.9, 0.99, 1e-3, 0.01, true}, threads);
      const double mean = 0.9 * m1 - 0.1 * g, squares = 0.99 * v0 + 0.01 * g * g;
      const double scale = std::sqrt(squares / (1 - std::pow(0.99, 3))) + 1e-3;
      const double w2 = w1 * (1 - 0.1 * 0.01) - 0.1 / (1 - std::pow(0.9, 3)) * mean / scale;
      if (n && (!close(e.weight[n - 1], w2) || !close(e.first[n - 1], mean) || !close(e.second[n - 1], squares)))
        fail("wrong AdamW", n);
      for (int64_t i = 0; i < n; ++i)
        if (!e.mask[i] && (e.weight[i] != 0 || e.first[i] != 0 || e.second[i] != 0)) fail("not zero outside", n);
      if (n) {
        const int64_t spot = draw(0, n - 1);
        e.mask[spot] = false;
        e.second[spot] = draw(0, 1) ? 1.0f : NAN;
        if (e.pieces(n, threads)) fail("a value outside of the mask not seen", n);
      }
    }
  }
}

}  // namespace

int main() {
  for (int64_t n = 0; n <= 100; ++n)
    for (const double density : {0.0, 0.1, 1.0}) check(n, density);
  for (int repeat = 0; repeat < 10; ++repeat) check(draw(10'000, 100'000), 0.05);
  std::puts("ok");
}
