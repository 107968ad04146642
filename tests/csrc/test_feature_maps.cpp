// Conversion, batch normalization and pooling of lines against loops in double, in buffers of exactly the right size.
// Lanes of missing images hold NaN wherever they may hold anything: no result may see them.
#include "feature_maps.h"
#include "elements.h"

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
// One that bfloat16 holds, too.
float draw_value() { return to_float(to_bfloat16(std::normal_distribution<float>()(random_bits))); }
double tolerance;

[[noreturn]] void fail(const char* what, double got, double want) {
  std::fprintf(stderr, "%s: got %g, expected %g\n", what, got, want);
  std::exit(1);
}

void expect(const char* what, double got, double want, double scale = 1) {
  if (!(std::abs(got - want) <= tolerance * std::max({scale, std::abs(want), 1.0}))) fail(what, got, want);
}

struct Shape {
  int64_t n, c, h, w;
  int64_t count() const { return n * c * h * w; }
  int64_t lines() const { return (n + kLanes - 1) / kLanes * c * h * w * kLanes; }
  int64_t line_at(int64_t in, int64_t ic, int64_t pixel) const {
    return (((in / kLanes) * c + ic) * h * w + pixel) * kLanes + in % kLanes;
  }
};

// Random values of the images that exist, NaN in the other lanes (or zero, as gradients have it).
Elements random_lines(Element element, const Shape& s, float elsewhere) {
  Elements lines(element, s.lines());
  for (int64_t i = 0; i < lines.size; ++i) lines.set(i, elsewhere);
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t c = 0; c < s.c; ++c)
      for (int64_t p = 0; p < s.h * s.w; ++p) lines.set(s.line_at(n, c, p), draw_value());
  return lines;
}

void conversion(Element outside, Element inside, const Shape& s, bool channels_last, int threads) {
  Elements ordinary(outside, s.count()), lines(inside, s.lines()), back(outside, s.count());
  for (int64_t i = 0; i < s.count(); ++i) ordinary.set(i, draw_value());
  Maps maps{ordinary.data(), s.n, s.c * s.h * s.w, s.h * s.w, s.w, 1, false};
  if (channels_last) maps = {ordinary.data(), s.n, s.c * s.h * s.w, 1, s.w * s.c, s.c, false};
  maps.element = outside;
  to_lines(maps, s.c, s.h, s.w, lines.data(), inside, threads);
  for (int64_t n = 0; n < (s.n + kLanes - 1) / kLanes * kLanes; ++n)
    for (int64_t c = 0; c < s.c; ++c)
      for (int64_t p = 0; p < s.h * s.w; ++p) {
        const int64_t pixel = n * maps.stride_n + c * maps.stride_c + p / s.w * maps.stride_h + p % s.w * maps.stride_w;
        expect("to_lines", lines.get(s.line_at(n, c, p)), n < s.n ? ordinary.get(pixel) : 0);
      }
  maps.data = back.data();
  from_lines(lines.data(), inside, maps, s.c, s.h, s.w, threads);
  for (int64_t i = 0; i < s.count(); ++i) expect("from_lines", back.get(i), ordinary.get(i));
}

void batch_norm(Element element, const Shape& s, bool relu, bool with_residual, bool training, int threads) {
  const LineMaps maps{s.n, s.c, s.h * s.w, element};
  const int64_t pixels = s.h * s.w, count = s.n * pixels;
  const Elements x = random_lines(element, s, kNaN), residual = random_lines(element, s, kNaN), grad = random_lines(element, s, 0);
  std::vector<float> weight(s.c), bias(s.c), mean(s.c), inverse(s.c), scale(s.c), shift(s.c), running(s.c, 1.0f), variance(s.c, 2.0f);
  for (int64_t c = 0; c < s.c; ++c) weight[c] = draw_value(), bias[c] = draw_value();
  batch_norm_terms(maps, x.data(), weight.data(), bias.data(), 1e-5, running.data(), variance.data(), 0.25,
                   {mean.data(), inverse.data(), scale.data(), shift.data()}, threads);
  Elements y(element, s.lines()), grad_x(element, s.lines()), grad_residual(element, s.lines());
  batch_norm_forward(maps, x.data(), with_residual ? residual.data() : nullptr, scale.data(), shift.data(), relu, y.data(), threads);
  std::vector<float> grad_weight(s.c), grad_bias(s.c);
  batch_norm_backward(maps, grad.data(), x.data(), with_residual ? y.data() : nullptr, scale.data(), shift.data(), mean.data(),
                      inverse.data(), relu, training, grad_x.data(), with_residual ? grad_residual.data() : nullptr,
                      grad_weight.data(), grad_bias.data(), threads);
  for (int64_t c = 0; c < s.c; ++c) {
    const auto each = [&](auto visit) {
      for (int64_t n = 0; n < s.n; ++n)
        for (int64_t p = 0; p < pixels; ++p) visit(s.line_at(n, c, p), n < s.n);
    };
    double m = 0, v = 0;
    each([&](int64_t i, bool) { m += x.get(i) / static_cast<double>(count); });
    each([&](int64_t i, bool) { v += (x.get(i) - m) * (x.get(i) - m) / static_cast<double>(count); });
    const double deviation = std::sqrt(v + 1e-5);
    expect("mean", mean[c], m);
    expect("running mean", running[c], 1 + 0.25 * (m - 1));
    expect("running variance", variance[c], 2 + 0.25 * (v * count / (count - 1.0) - 2));
    double sum = 0, product = 0;
    std::vector<double> g(s.lines());
    each([&](int64_t i, bool) {
      double value = (x.get(i) - m) / deviation * weight[c] + bias[c] + (with_residual ? residual.get(i) : 0);
      if (relu) value = std::max(value, 0.0);
      expect("normalize", y.get(i), value, std::abs(weight[c]) / deviation);
      g[i] = relu && y.get(i) <= 0 ? 0 : grad.get(i);
      sum += g[i];
      product += g[i] * (x.get(i) - m) / deviation;
    });
    expect("gradient of the bias", grad_bias[c], sum, count);
    expect("gradient of the weight", grad_weight[c], product, count);
    each([&](int64_t i, bool) {
      double want = g[i];
      if (training) want -= sum / count + (x.get(i) - m) / deviation * product / count;
      expect("gradient of the lines", grad_x.get(i), want * weight[c] / deviation, std::abs(weight[c]) / deviation);
      if (with_residual) expect("gradient of the residual", grad_residual.get(i), g[i]);
    });
  }
  for (int64_t n = s.n; n < (s.n + kLanes - 1) / kLanes * kLanes; ++n)
    for (int64_t c = 0; c < s.c; ++c)
      for (int64_t p = 0; p < pixels; ++p) {
        expect("gradient of a missing image", grad_x.get(s.line_at(n, c, p)), 0);
        if (with_residual) expect("gradient of a missing residual", grad_residual.get(s.line_at(n, c, p)), 0);
      }
}

void pooling(Element element, const Shape& s, int threads) {
  PoolShape shape{s.h, s.w, 0, 0, draw(1, 3), draw(1, 3), draw(1, 3), draw(1, 3), 0, 0, draw(1, 2), draw(1, 2)};
  shape.padding_h = draw(0, shape.kernel_h / 2);
  shape.padding_w = draw(0, shape.kernel_w / 2);
  const int64_t free_h = s.h + 2 * shape.padding_h - shape.dilation_h * (shape.kernel_h - 1) - 1;
  const int64_t free_w = s.w + 2 * shape.padding_w - shape.dilation_w * (shape.kernel_w - 1) - 1;
  if (free_h < 0 || free_w < 0) return;
  shape.out_height = free_h / shape.stride_h + 1;
  shape.out_width = free_w / shape.stride_w + 1;
  const Shape out_shape{s.n, s.c, shape.out_height, shape.out_width};
  const Elements x = random_lines(element, s, kNaN), grad = random_lines(element, out_shape, 0);
  Elements y(element, out_shape.lines()), grad_x(element, s.lines());
  const int64_t planes = (s.n + kLanes - 1) / kLanes * s.c;
  max_pool_forward(shape, planes, element, x.data(), y.data(), threads);
  max_pool_backward(shape, planes, element, x.data(), y.data(), grad.data(), grad_x.data(), threads);
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
              const double value = x.get(s.line_at(n, c, iy * s.w + ix));
              if (value > most) most = value, where = iy * s.w + ix;
            }
          const int64_t o = out_shape.line_at(n, c, oy * shape.out_width + ox);
          if (where < 0) {
            if (!(y.get(o) < 0 && std::isinf(y.get(o)))) fail("pooling of padding alone", y.get(o), most);
            continue;
          }
          expect("pooling", y.get(o), most);
          want[where] += grad.get(o);
        }
      for (int64_t p = 0; p < s.h * s.w; ++p) expect("gradient of pooling", grad_x.get(s.line_at(n, c, p)), want[p]);
    }
}

}  // namespace

int main() {
  for (Isa wanted : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    set_isa(wanted);
    for (int round = 0; round < 60; ++round) {
      const Shape s{draw(1, 40), draw(1, 19), draw(1, 9), draw(1, 20)};
      const int threads = static_cast<int>(draw(1, 3));
      const Element element = draw(0, 1) ? Element::float32 : Element::bfloat16;
      tolerance = 1e-4;
      conversion(draw(0, 1) ? Element::float32 : Element::bfloat16, element, s, round % 2, threads);
      if (element == Element::bfloat16) tolerance = 0.02;
      if (s.n * s.h * s.w > 1) batch_norm(element, s, draw(0, 1), draw(0, 1), draw(0, 1), threads);
      pooling(element, s, threads);
    }
  }
  std::puts("ok");
}
