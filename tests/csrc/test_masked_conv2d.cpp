// ConvPlan against a convolution written out in double, in buffers of exactly the sizes it is told, so that a sanitizer
// sees a step outside. What must be written starts as NaN, and so does what must not be read.
#include "masked_conv2d.h"
#include "elements.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <tuple>
#include <vector>

namespace {

using namespace sparsebilevel;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
std::mt19937_64 random_bits(0);

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }
float draw_value() { return std::normal_distribution<float>()(random_bits); }
template <typename T>
T pick(std::initializer_list<T> values) { return values.begin()[draw(0, static_cast<int64_t>(values.size()) - 1)]; }

// Values [n][c][h][w].
struct Dense {
  int64_t n, c, h, w;
  std::vector<double> values = std::vector<double>(n * c * h * w);
  double& at(int64_t in, int64_t ic, int64_t ih, int64_t iw) { return values[((in * c + ic) * h + ih) * w + iw]; }
  double at(int64_t in, int64_t ic, int64_t ih, int64_t iw) const { return const_cast<Dense*>(this)->at(in, ic, ih, iw); }
};

Dense draw_dense(int64_t n, int64_t c, int64_t h, int64_t w) {
  Dense dense{n, c, h, w};
  for (double& value : dense.values) value = draw_value();
  return dense;
}

enum Layout { kContiguous, kChannelsLast, kGaps, kTransposed, kLines };

Element draw_element() { return draw(0, 2) ? Element::float32 : Element::bfloat16; }

// The memory behind Maps; with kGaps some of it belongs to no pixel.
struct Buffer {
  Maps maps{};
  std::optional<Elements> memory;

  Buffer(const Dense& shape, Layout layout) {
    const auto [n, c, h, w] = std::tuple(shape.n, shape.c, shape.h, shape.w);
    maps = {nullptr, n, 0, 0, 0, 0, layout == kLines};
    if (layout == kContiguous) set_strides(c * h * w, h * w, w, 1);
    if (layout == kChannelsLast) set_strides(h * w * c, 1, w * c, c);
    if (layout == kTransposed) set_strides(1, n * w * h, n, n * h);
    if (layout == kGaps) set_strides(c * (h * (w + 2) + 3) + 5, h * (w + 2) + 3, w + 2, 1);
    const int64_t size = layout == kLines ? (n + kLanes - 1) / kLanes * c * h * w * kLanes
                            : 1 + (n - 1) * maps.stride_n + (c - 1) * maps.stride_c + (h - 1) * maps.stride_h + (w - 1) * maps.stride_w;
    memory.emplace(draw_element(), size);
    maps.data = memory->data();
    maps.element = memory->element;
  }

  void set_strides(int64_t n, int64_t c, int64_t h, int64_t w) {
    maps.stride_n = n;
    maps.stride_c = c;
    maps.stride_h = h;
    maps.stride_w = w;
  }

  int64_t at(const Dense& shape, int64_t n, int64_t c, int64_t h, int64_t w) const {
    if (maps.lines) return ((((n / kLanes) * shape.c + c) * shape.h + h) * shape.w + w) * kLanes + n % kLanes;
    return n * maps.stride_n + c * maps.stride_c + h * maps.stride_h + w * maps.stride_w;
  }

  // Lanes of images that are not there hold zero.
  void fill(const Dense& dense) {
    for (int64_t i = 0; maps.lines && i < memory->size; ++i) memory->set(i, 0);
    for (int64_t n = 0; n < dense.n; ++n)
      for (int64_t c = 0; c < dense.c; ++c)
        for (int64_t h = 0; h < dense.h; ++h)
          for (int64_t w = 0; w < dense.w; ++w) memory->set(at(dense, n, c, h, w), static_cast<float>(dense.at(n, c, h, w)));
  }
};

struct Problem {
  ConvShape shape;
  std::vector<int64_t> positions;  // with padding
  std::vector<float> weight;       // NaN where no position is
  std::vector<int64_t> places;     // of the positions in the weight's memory
};

struct Entry {
  int64_t out, in, row, col;
};

Entry entry(const ConvShape& s, int64_t position) {
  const int64_t taps = s.kernel_h * s.kernel_w, fan_in = s.channels / s.groups * taps;
  const int64_t out = position / fan_in, inner = position % fan_in;
  const int64_t in = out / (s.out_channels / s.groups) * (s.channels / s.groups) + inner / taps;
  return {out, in, inner % taps / s.kernel_w, inner % s.kernel_w};
}

Problem draw_problem() {
  Problem p;
  ConvShape& s = p.shape;
  s.groups = pick<int64_t>({1, 1, 1, 2, 3});
  s.channels = s.groups * pick<int64_t>({1, 2, 3, 5, 16, 19});
  s.out_channels = s.groups * pick<int64_t>({1, 2, 4, 7, 18, 33});
  const bool linear = draw(0, 9) == 0;
  for (const auto [kernel, stride, padding, dilation, size, out] :
       {std::tuple(&s.kernel_h, &s.stride_h, &s.padding_h, &s.dilation_h, &s.height, &s.out_height),
        std::tuple(&s.kernel_w, &s.stride_w, &s.padding_w, &s.dilation_w, &s.width, &s.out_width)}) {
    *kernel = linear ? 1 : draw(1, 4);
    *stride = linear ? 1 : pick<int64_t>({1, 1, 2, 3});
    *padding = linear ? 0 : draw(0, 3);
    *dilation = linear ? 1 : pick<int64_t>({1, 1, 2, 3});
    const int64_t reach = *dilation * (*kernel - 1) + 1;
    *size = linear ? 1 : std::max<int64_t>(reach - 2 * *padding, 1) + draw(0, 19);
    *out = (*size + 2 * *padding - reach) / *stride + 1;
  }
  const int64_t fan_in = s.channels / s.groups, taps = s.kernel_h * s.kernel_w;
  const int64_t in_memory[2][4] = {{fan_in * taps, taps, s.kernel_w, 1}, {fan_in * taps, 1, s.kernel_w * fan_in, fan_in}};
  std::copy_n(in_memory[draw(0, 1)], 4, s.weight_strides);
  const int64_t count = s.out_channels * fan_in * taps;
  const double density = pick({0.0, 0.02, 0.1, 0.5, 1.0});
  for (int64_t position = 0; position < count; ++position)
    if (std::uniform_real_distribution<>()(random_bits) < density) p.positions.push_back(position);
  if (draw(0, 9) == 0) p.positions = {count - 1};
  for (int64_t padding = draw(0, 2); padding > 0; --padding) p.positions.push_back(-1);
  if (draw(0, 1)) std::shuffle(p.positions.begin(), p.positions.end(), random_bits);
  p.weight.assign(count, kNaN);
  for (const int64_t position : p.positions) {
    if (position < 0) {
      p.places.push_back(-1);
      continue;
    }
    const int64_t o = position / (fan_in * taps), i = position / taps % fan_in, tap = position % taps;
    p.places.push_back(o * s.weight_strides[0] + i * s.weight_strides[1] + tap / s.kernel_w * s.weight_strides[2] +
                       tap % s.kernel_w * s.weight_strides[3]);
    p.weight[p.places.back()] = draw_value();
  }
  return p;
}

// visit(index of the position, entry, output row, output column, input row, input column) for all products.
template <typename Visit>
void for_each_product(const Problem& p, Visit visit) {
  const ConvShape& s = p.shape;
  for (size_t i = 0; i < p.positions.size(); ++i) {
    if (p.positions[i] < 0) continue;
    const Entry e = entry(s, p.positions[i]);
    for (int64_t y = 0; y < s.out_height; ++y)
      for (int64_t x = 0; x < s.out_width; ++x) {
        const int64_t h = y * s.stride_h + e.row * s.dilation_h - s.padding_h;
        const int64_t w = x * s.stride_w + e.col * s.dilation_w - s.padding_w;
        if (h >= 0 && h < s.height && w >= 0 && w < s.width) visit(i, e, y, x, h, w);
      }
  }
}

std::optional<Tiling> draw_tiling(const ConvShape& s, bool lines) {
  if (draw(0, 1)) return std::nullopt;
  for (;;) {
    if (!lines && draw(0, 1)) {  // pixels
      const int rows = static_cast<int>(draw(1, 9)), cols = static_cast<int>(draw(1, 40)), images = static_cast<int>(draw(1, 4));
      // No pitch is more than this; lines that a row of a tile has.
      const int64_t pitch = cols + (s.kernel_w - 1) * s.dilation_w + 1, most = ((rows - 1) * pitch + cols + kLanes - 1) / kLanes;
      if (most <= kMaxTileLines && line_kernels().forward[images][most])
        return Tiling{rows, cols, images, rows, static_cast<int>(draw(1, 24)), 1};
      continue;
    }
    const Tiling t{static_cast<int>(draw(1, kMaxTileRows)), static_cast<int>(draw(1, 16)), static_cast<int>(draw(1, 5)),
                   static_cast<int>(draw(1, 9)), static_cast<int>(draw(1, 24))};
    if (line_kernels().forward[t.tile_rows][std::min(t.tile_cols * t.tile_blocks, kMaxTileLines)] &&
        t.tile_cols * t.tile_blocks <= kMaxTileLines)
      return t;
  }
}

[[noreturn]] void fail(const char* what, const Problem& p, int64_t images, const ConvPlan& plan) {
  const ConvShape& s = p.shape;
  const Tiling& t = plan.tiling();
  std::fprintf(stderr,
               "%s: images=%ld channels=%ld->%ld groups=%ld maps=%ldx%ld->%ldx%ld kernel=%ldx%ld stride=%ldx%ld "
               "padding=%ldx%ld dilation=%ldx%ld positions=%zu tiling=%d,%d,%d,%d,%d,%d isa=%d\n",
               what, static_cast<long>(images), static_cast<long>(s.channels), static_cast<long>(s.out_channels),
               static_cast<long>(s.groups), static_cast<long>(s.height), static_cast<long>(s.width),
               static_cast<long>(s.out_height), static_cast<long>(s.out_width), static_cast<long>(s.kernel_h),
               static_cast<long>(s.kernel_w), static_cast<long>(s.stride_h), static_cast<long>(s.stride_w),
               static_cast<long>(s.padding_h), static_cast<long>(s.padding_w), static_cast<long>(s.dilation_h),
               static_cast<long>(s.dilation_w), p.positions.size(), t.tile_rows, t.tile_cols, t.tile_blocks, t.strip_rows,
               t.planes_per_block, t.block_images, static_cast<int>(isa()));
  std::exit(1);
}

// Up to the rounding of sums in float32, and with bfloat16 operands or results up to theirs.
bool close(double got, double expected, double magnitude, bool exact) {
  return std::fabs(got - expected) <= (exact ? 2e-6 : 0.02) * magnitude + 1e-30;
}

Layout draw_layout(bool lines) {
  return lines ? pick({kContiguous, kChannelsLast, kGaps, kTransposed, kLines})
               : pick({kContiguous, kChannelsLast, kGaps, kTransposed});
}

ConvPlan make_plan(const Problem& p, bool input_gradient, int64_t images, bool lines) {
  const std::optional<Tiling> tiling = draw_tiling(p.shape, lines);
  const auto count = static_cast<int64_t>(p.positions.size());
  return tiling ? ConvPlan(p.shape, input_gradient, p.positions.data(), count, *tiling)
                : ConvPlan(p.shape, input_gradient, p.positions.data(), count, images, lines ? MapsLayout::lines : pick({MapsLayout::pixels, MapsLayout::planes}));
}

// The forward pass, or the gradient of the input: `in` convolved into maps of the shape of `expected`.
void check_forward(const Problem& p, bool input_gradient, const Dense& in, Dense expected, int threads) {
  const bool lines = draw(0, 1);
  const ConvPlan plan = make_plan(p, input_gradient, in.n, lines);
  Dense magnitude = expected;
  const bool with_bias = !input_gradient && draw(0, 1);
  std::vector<float> bias(expected.c);
  for (float& b : bias) b = draw_value();
  Buffer from(in, draw_layout(lines));
  Buffer to(expected, draw_layout(lines));
  from.fill(in);
  const bool accumulate = !with_bias && draw(0, 1);
  const Dense before = draw_dense(in.n, expected.c, expected.h, expected.w);
  if (accumulate) to.fill(before);
  for (int64_t n = 0; n < in.n; ++n) {
    for (int64_t c = 0; c < expected.c; ++c)
      for (int64_t h = 0; h < expected.h; ++h)
        for (int64_t w = 0; w < expected.w; ++w) {
          const double start = accumulate ? before.at(n, c, h, w) : with_bias ? bias[c] : 0;
          expected.at(n, c, h, w) = start;
          magnitude.at(n, c, h, w) = std::fabs(start);
        }
    for_each_product(p, [&](size_t i, const Entry& e, int64_t y, int64_t x, int64_t h, int64_t w) {
      const double value = p.weight[p.places[i]];
      const double product = input_gradient ? value * in.at(n, e.out, y, x) : value * in.at(n, e.in, h, w);
      (input_gradient ? expected.at(n, e.in, h, w) : expected.at(n, e.out, y, x)) += product;
      (input_gradient ? magnitude.at(n, e.in, h, w) : magnitude.at(n, e.out, y, x)) += std::fabs(product);
    });
  }
  plan.forward(p.weight.data(), Element::float32, from.maps, to.maps, with_bias ? bias.data() : nullptr, accumulate, threads);
  for (int64_t n = 0; n < in.n; ++n)
    for (int64_t c = 0; c < expected.c; ++c)
      for (int64_t h = 0; h < expected.h; ++h)
        for (int64_t w = 0; w < expected.w; ++w) {
          const int64_t place = to.at(expected, n, c, h, w);
          const float got = to.memory->get(place);
          const bool exact = from.maps.element == Element::float32 && to.maps.element == Element::float32;
          if (!close(got, expected.at(n, c, h, w), magnitude.at(n, c, h, w), exact))
            fail(input_gradient ? accumulate ? "accumulated input gradient" : "input gradient"
                 : accumulate   ? "accumulated output"
                                : "output",
                 p, in.n, plan);
          to.memory->set(place, kNaN);
        }
  // What belongs to no image: untouched, and in lines as zero as it was read.
  for (int64_t i = 0; i < to.memory->size; ++i)
    if (!(std::isnan(to.memory->get(i)) || (to.maps.lines && (with_bias || to.memory->get(i) == 0))))
      fail("memory between the maps", p, in.n, plan);
}

void check_weight_grad(const Problem& p, const Dense& in, const Dense& grad_out, int threads) {
  const bool lines = draw(0, 1);
  const ConvPlan plan = make_plan(p, false, in.n, lines);
  Buffer from(in, draw_layout(lines));
  Buffer grad(grad_out, draw_layout(lines));
  from.fill(in);
  grad.fill(grad_out);
  std::vector<double> expected(p.positions.size()), magnitude(p.positions.size());
  for (int64_t n = 0; n < in.n; ++n)
    for_each_product(p, [&](size_t i, const Entry& e, int64_t y, int64_t x, int64_t h, int64_t w) {
      const double product = in.at(n, e.in, h, w) * grad_out.at(n, e.out, y, x);
      expected[i] += product;
      magnitude[i] += std::fabs(product);
    });
  const bool scatter = draw(0, 1);
  const int64_t size = static_cast<int64_t>(scatter ? p.weight.size() : p.positions.size());
  Elements grads(scatter ? draw_element() : Element::float32, size);
  plan.weight_grad(from.maps, grad.maps, grads.data(), grads.element, scatter, threads);
  const bool exact = from.maps.element == Element::float32 && grad.maps.element == Element::float32 &&
                     grads.element == Element::float32;
  for (size_t i = 0; i < p.positions.size(); ++i) {
    if (scatter && p.positions[i] < 0) continue;
    const int64_t place = scatter ? p.places[i] : static_cast<int64_t>(i);
    if (!close(grads.get(place), expected[i], magnitude[i], exact)) fail("weight gradient", p, in.n, plan);
    grads.set(place, kNaN);
  }
  for (int64_t i = 0; i < size; ++i)
    if (!std::isnan(grads.get(i))) fail("weight gradient at other positions", p, in.n, plan);
}

}  // namespace

int main() {
  for (int repeat = 0; repeat < 400; ++repeat) {
    const Problem p = draw_problem();
    const ConvShape& s = p.shape;
    const int64_t images = pick<int64_t>({1, 1, 2, 3, 4, 7, 15, 16, 17, 31, 50, 70});
    const Dense in = draw_dense(images, s.channels, s.height, s.width);
    const Dense grad_out = draw_dense(images, s.out_channels, s.out_height, s.out_width);
    for (const Isa wanted : {Isa::scalar, Isa::avx2, Isa::avx512}) {
      set_isa(wanted);
      if (isa() != wanted) continue;  // not on this processor
      const int threads = pick({1, 2, 3});
      check_forward(p, false, in, grad_out, threads);
      check_forward(p, true, grad_out, in, threads);
      check_weight_grad(p, in, grad_out, threads);
    }
  }
  std::puts("ok");
}
