// Conversion, batch normalization and pooling of lines against loops in double, in buffers of exactly the right size.
// Lanes of missing images hold NaN wherever they may hold anything: no result may see them.
#include "feature_maps.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

namespace {

using namespace sparsebilevel;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
std::mt19937_64 random_bits(0);

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }
float draw_value() { return std::normal_distribution<float>()(random_bits); }

[[noreturn]] void fail(const char* what, double got, double want) {
  std::fprintf(stderr, "%s: got %g, expected %g\n", what, got, want);
  std::exit(1);
}

void expect(const char* what, double got, double want, double scale = 1) {
  if (!(std::abs(got - want) <= 1e-4 * std::max({scale, std::abs(want), 1.0}))) fail(what, got, want);
}

struct Shape {
  int64_t n, c, h, w;
  int64_t count() const { return n * c * h * w; }
  int64_t lines() const { return (n + kLanes - 1) / kLanes * c * h * w * kLanes; }
  int64_t line_at(int64_t in, int64_t ic, int64_t pixel) const {
    return (((in / kLanes) * c + ic) * h * w + pixel) * kLanes + in % kLanes;
  }
};

std::unique_ptr<float[]> filled(int64_t count, float value) {
  std::unique_ptr<float[]> memory(new float[count]);
  std::fill_n(memory.get(), count, value);
  return memory;
}

// Random values of the images that exist, NaN in the other lanes (or zero, as gradients have it).
std::unique_ptr<float[]> random_lines(const Shape& s, float elsewhere) {
  auto lines = filled(s.lines(), elsewhere);
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t c = 0; c < s.c; ++c)
      for (int64_t p = 0; p < s.h * s.w; ++p) lines[s.line_at(n, c, p)] = draw_value();
  return lines;
}

void conversion(const Shape& s, bool channels_last, int threads) {
  auto ordinary = filled(s.count(), 0);
  for (int64_t i = 0; i < s.count(); ++i) ordinary[i] = draw_value();
  Maps maps{ordinary.get(), s.n, s.c * s.h * s.w, s.h * s.w, s.w, 1, false};
  if (channels_last) maps = {ordinary.get(), s.n, s.c * s.h * s.w, 1, s.w * s.c, s.c, false};
  auto lines = filled(s.lines(), kNaN), back = filled(s.count(), kNaN);
  to_lines(maps, s.c, s.h, s.w, lines.get(), threads);
  for (int64_t n = 0; n < (s.n + kLanes - 1) / kLanes * kLanes; ++n)
    for (int64_t c = 0; c < s.c; ++c)
      for (int64_t p = 0; p < s.h * s.w; ++p) {
        const float* pixel = ordinary.get() + n * maps.stride_n + c * maps.stride_c + p / s.w * maps.stride_h + p % s.w * maps.stride_w;
        expect("to_lines", lines[s.line_at(n, c, p)], n < s.n ? *pixel : 0);
      }
  maps.data = back.get();
  from_lines(lines.get(), maps, s.c, s.h, s.w, threads);
  for (int64_t i = 0; i < s.count(); ++i) expect("from_lines", back[i], ordinary[i]);
}

void batch_norm(const Shape& s, bool relu, bool with_residual, bool training, int threads) {
  const LineMaps maps{s.n, s.c, s.h * s.w};
  const int64_t pixels = s.h * s.w, count = s.n * pixels;
  auto x = random_lines(s, kNaN), residual = random_lines(s, kNaN), grad = random_lines(s, 0);
  std::vector<float> weight(s.c), bias(s.c), mean(s.c), inverse(s.c), scale(s.c), shift(s.c), running(s.c, 1.0f), variance(s.c, 2.0f);
  for (int64_t c = 0; c < s.c; ++c) weight[c] = draw_value(), bias[c] = draw_value();
  batch_norm_terms(maps, x.get(), weight.data(), bias.data(), 1e-5, running.data(), variance.data(), 0.25,
                   {mean.data(), inverse.data(), scale.data(), shift.data()}, threads);
  auto y = filled(s.lines(), kNaN), grad_x = filled(s.lines(), kNaN), grad_residual = filled(s.lines(), kNaN);
  batch_norm_forward(maps, x.get(), with_residual ? residual.get() : nullptr, scale.data(), shift.data(), relu, y.get(), threads);
  std::vector<float> grad_weight(s.c), grad_bias(s.c);
  batch_norm_backward(maps, grad.get(), x.get(), with_residual ? y.get() : nullptr, scale.data(), shift.data(), mean.data(),
                      inverse.data(), relu, training, grad_x.get(), with_residual ? grad_residual.get() : nullptr,
                      grad_weight.data(), grad_bias.data(), threads);
  for (int64_t c = 0; c < s.c; ++c) {
    const auto each = [&](auto visit) {
      for (int64_t n = 0; n < s.n; ++n)
        for (int64_t p = 0; p < pixels; ++p) visit(s.line_at(n, c, p), n < s.n);
    };
    double m = 0, v = 0;
    each([&](int64_t i, bool) { m += x[i] / static_cast<double>(count); });
    each([&](int64_t i, bool) { v += (x[i] - m) * (x[i] - m) / static_cast<double>(count); });
    const double deviation = std::sqrt(v + 1e-5);
    expect("mean", mean[c], m);
    expect("running mean", running[c], 1 + 0.25 * (m - 1));
    expect("running variance", variance[c], 2 + 0.25 * (v * count / (count - 1.0) - 2));
    double sum = 0, product = 0;
    std::vector<double> g(s.lines());
    each([&](int64_t i, bool) {
      double value = (x[i] - m) / deviation * weight[c] + bias[c] + (with_residual ? residual[i] : 0);
      if (relu) value = std::max(value, 0.0);
      expect("normalize", y[i], value, std::abs(weight[c]) / deviation);
      g[i] = relu && y[i] <= 0 ? 0 : grad[i];
      sum += g[i];
      product += g[i] * (x[i] - m) / deviation;
    });
    expect("gradient of the bias", grad_bias[c], sum, count);
    expect("gradient of the weight", grad_weight[c], product, count);
    each([&](int64_t i, bool) {
      double want = g[i];
      if (training) want -= sum / count + (x[i] - m) / deviation * product / count;
      expect("gradient of the lines", grad_x[i], want * weight[c] / deviation, std::abs(weight[c]) / deviation);
      if (with_residual) expect("gradient of the residual", grad_residual[i], g[i]);
    });
  }
  for (int64_t n = s.n; n < (s.n + kLanes - 1) / kLanes * kLanes; ++n)
    for (int64_t c = 0; c < s.c; ++c)
      for (int64_t p = 0; p < pixels; ++p) {
        expect("gradient of a missing image", grad_x[s.line_at(n, c, p)], 0);
        if (with_residual) expect("gradient of a missing residual", grad_residual[s.line_at(n, c, p)], 0);
      }
}

void pooling(const Shape& s, int threads) {
  PoolShape shape{s.h, s.w, 0, 0, draw(1, 3), draw(1, 3), draw(1, 3), draw(1, 3), 0, 0, draw(1, 2), draw(1, 2)};
  shape.padding_h = draw(0, shape.kernel_h / 2);
  shape.padding_w = draw(0, shape.kernel_w / 2);
  const int64_t free_h = s.h + 2 * shape.padding_h - shape.dilation_h * (shape.kernel_h - 1) - 1;
  const int64_t free_w = s.w + 2 * shape.padding_w - shape.dilation_w * (shape.kernel_w - 1) - 1;
  if (free_h < 0 || free_w < 0) return;
  shape.out_height = free_h / shape.stride_h + 1;
  shape.out_width = free_w / shape.stride_w + 1;
  const Shape out_shape{s.n, s.c, shape.out_height, shape.out_width};
  auto x = random_lines(s, kNaN), y = filled(out_shape.lines(), kNaN);
  auto grad = random_lines(out_shape, 0), grad_x = filled(s.lines(), kNaN);
  const int64_t planes = (s.n + kLanes - 1) / kLanes * s.c;
  max_pool_forward(shape, planes, x.get(), y.get(), threads);
  max_pool_backward(shape, planes, x.get(), y.get(), grad.get(), grad_x.get(), threads);
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t c = 0; c < s.c; ++c) {
      std::vector<double> want(s.h * s.w);
      for (int64_t oy = 0; oy < shape.out_height; ++oy)
        for (int64_t ox = 0; ox < shape.out_width; ++ox) {
          double most = -INFINITY;
          int64_t where = -1;
          for (int64_t r = 0; r < shape.kernel_h; ++r)
            for (int64_t q = 0; q < shape.kernel_w; ++q) {
              const int64_t iy = oy * shape.stride_h - shape.padding_h + r * shape.dilation_h;
              const int64_t ix = ox * shape.stride_w - shape.padding_w + q * shape.dilation_w;
              if (iy < 0 || iy >= s.h || ix < 0 || ix >= s.w) continue;
              const double value = x[s.line_at(n, c, iy * s.w + ix)];
              if (value > most) most = value, where = iy * s.w + ix;
            }
          const int64_t o = out_shape.line_at(n, c, oy * shape.out_width + ox);
          if (where < 0) {
            if (!(y[o] < 0 && std::isinf(y[o]))) fail("pooling of padding alone", y[o], most);
            continue;
          }
          expect("pooling", y[o], most);
          want[where] += grad[o];
        }
      for (int64_t p = 0; p < s.h * s.w; ++p) expect("gradient of pooling", grad_x[s.line_at(n, c, p)], want[p]);
    }
}

}  // namespace

int main() {
  for (Isa wanted : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    set_isa(wanted);
    for (int round = 0; round < 60; ++round) {
      const Shape s{draw(1, 40), draw(1, 19), draw(1, 9), draw(1, 20)};
      const int threads = static_cast<int>(draw(1, 3));
      conversion(s, round % 2, threads);
      if (s.n * s.h * s.w > 1) batch_norm(s, draw(0, 1), draw(0, 1), draw(0, 1), threads);
      pooling(s, threads);
    }
  }
  std::puts("ok");
}
