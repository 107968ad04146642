// Batch normalization of rows against loops in double, in buffers of exactly the right size; in bfloat16 for the bounds.
#include "batch_norm.h"

#include <algorithm>
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

template <class T>
std::unique_ptr<T[]> drawn(int64_t count) {
  std::unique_ptr<T[]> memory(new T[count]);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < count; ++i)
    memory[i] = static_cast<T>(sizeof(T) == 4 ? normal(random_bits) : static_cast<float>(draw(0x3f00, 0x4000)));
  return memory;
}

void expect(const char* what, double got, double want, double scale) {
  if (std::abs(got - want) <= 1e-4 * std::max({scale, std::abs(want), 1.0})) return;
  std::fprintf(stderr, "%s: got %g, expected %g\n", what, got, want);
  std::exit(1);
}

template <class T>
void check(int64_t rows, int64_t channels, int threads) {
  const bool relu = draw(0, 1), with_residual = draw(0, 1), of_batch = draw(0, 1) && rows > 1, with_more = draw(0, 1);
  const int64_t count = rows * channels;
  const auto x = drawn<T>(count), residual = drawn<T>(count), grad = drawn<T>(count), more = drawn<T>(count);
  const auto weight = drawn<float>(channels), bias = drawn<float>(channels);
  const auto mean = drawn<float>(channels), variance = drawn<float>(channels), terms = drawn<float>(4 * channels);
  const auto grad_weight = drawn<float>(channels), grad_bias = drawn<float>(channels);
  for (int64_t c = 0; c < channels; ++c) variance[c] = std::abs(variance[c]);
  const auto out = drawn<T>(count), grad_x = drawn<T>(count), grad_residual = drawn<T>(count);
  const NormRows shape{rows, channels, sizeof(T) == 2};
  batch_norm_nhwc_forward(shape, {weight.get(), bias.get(), mean.get(), variance.get(), 0.1, 1e-5, of_batch}, x.get(),
                          with_residual ? residual.get() : nullptr, relu, out.get(), terms.get(), threads);
  batch_norm_nhwc_backward(shape, terms.get(), of_batch, relu, grad.get(), with_more ? more.get() : nullptr, x.get(),
                           relu && with_residual ? out.get() : nullptr, grad_x.get(),
                           with_residual && (relu || with_more) ? grad_residual.get() : nullptr, grad_weight.get(),
                           grad_bias.get(), threads);
  if (sizeof(T) == 2) return;
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0, squares = 0, product = 0, grads = 0;
    const double center = terms[c], inverse = terms[channels + c];
    for (int64_t i = c; i < count; i += channels) sum += x[i];
    for (int64_t i = c; i < count; i += channels) squares += (x[i] - center) * (x[i] - center);
    if (of_batch) expect("mean", center, sum / rows, 1);
    if (of_batch) expect("deviation", inverse * std::sqrt(squares / rows + 1e-5), 1, 1);
    std::vector<double> passed;
    for (int64_t i = c; i < count; i += channels) {
      const double y = (x[i] - center) * inverse * weight[c] + bias[c] + (with_residual ? residual[i] : 0);
      expect("result", out[i], relu ? std::max(y, 0.0) : y, inverse);
      const double g = grad[i] + (with_more ? more[i] : 0);
      passed.push_back(relu && out[i] <= 0 && (with_residual || y < 0) ? 0 : g);
      grads += passed.back();
      product += passed.back() * (x[i] - center) * inverse;
    }
    const double scale = std::sqrt(static_cast<double>(rows)) * std::max(inverse, 1.0);
    expect("gradient of the bias", grad_bias[c], grads, scale);
    expect("gradient of the weight", grad_weight[c], product, scale);
    for (int64_t i = c, k = 0; i < count; i += channels, ++k) {
      double g = passed[k];
      if (with_residual && (relu || with_more)) expect("gradient of the residual", grad_residual[i], g, 1);
      if (of_batch) g -= grads / rows + (x[i] - center) * inverse * product / rows;
      expect("gradient", grad_x[i], g * inverse * weight[c], inverse * inverse);
    }
  }
}

}  // namespace

int main() {
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    set_isa(isa);  // as far as the processor goes
    for (int i = 0; i < 60; ++i) {
      const int64_t rows = i % 4 ? draw(1, 70) : draw(1, 900), channels = i % 4 ? draw(1, 140) : draw(1, 40);
      check<float>(rows, channels, static_cast<int>(draw(1, 3)));
      check<uint16_t>(rows, channels, static_cast<int>(draw(1, 3)));
    }
  }
  std::puts("ok");
}
