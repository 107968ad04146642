// Work is shared out with the image block as the slowest index, as the convolutions do it: the thread that wrote a line
// reads it again. Sums go through one double for each plane, added up in a fixed order.
#include "feature_maps.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

namespace sparsebilevel {
namespace {

// visit(first float of the row's first line, of its first image, images of the block) for all rows of all blocks.
template <typename Visit>
void for_each_row(const Maps& maps, int64_t channels, int64_t height, int64_t width, int threads, Visit visit) {
  const int64_t rows = (maps.images + kLanes - 1) / kLanes * height;
#pragma omp parallel for num_threads(std::max(threads, 1)) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t block = row / height, y = row % height;
    visit((block * channels * height + y) * width * kLanes, block * kLanes * maps.stride_n + y * maps.stride_h,
          static_cast<int>(std::min<int64_t>(maps.images - block * kLanes, kLanes)));
  }
}

// visit(plane, channel, images of the block) for all planes.
template <typename Visit>
void for_each_plane(const LineMaps& maps, int threads, Visit visit) {
  const int64_t planes = (maps.images + kLanes - 1) / kLanes * maps.channels;
#pragma omp parallel for num_threads(std::max(threads, 1)) schedule(static)
  for (int64_t plane = 0; plane < planes; ++plane) {
    const int64_t block = plane / maps.channels;
    visit(plane, plane % maps.channels, static_cast<int>(std::min<int64_t>(maps.images - block * kLanes, kLanes)));
  }
}

// The elements from `at` on, of maps that may not be there.
template <typename E>
const E* plane_of(const void* maps, int64_t at) {
  return maps ? static_cast<const E*>(maps) + at : nullptr;
}
template <typename E>
E* plane_of(void* maps, int64_t at) {
  return maps ? static_cast<E*>(maps) + at : nullptr;
}

constexpr int64_t kChunk = 64;  // lines converted at a time

// `count` lines as MapKernels::load gives them, and store takes them, but of any element.
template <typename From, typename To>
void load_lines(const From* images, int64_t image_stride, int valid, To* lines, int64_t step, int64_t count) {
  const LineKernels& kernels = line_kernels();
  if constexpr (std::is_same_v<To, float>) {
    kernels.of<From>().load(images, image_stride, valid, lines, step, count);
  } else {
    float packed[kChunk * kLanes];
    for (int64_t i = 0; i < count; i += kChunk) {
      const int64_t here = std::min(kChunk, count - i);
      kernels.of<From>().load(images + i, image_stride, valid, packed, kLanes, here);
      kernels.of<To>().unpack(packed, 0, kLanes, lines + i * step, 0, step, 1, here);
    }
  }
}

template <typename From, typename To>
void store_lines(const From* lines, int64_t step, To* images, int64_t image_stride, int valid, int64_t count) {
  const LineKernels& kernels = line_kernels();
  if constexpr (std::is_same_v<From, float>) {
    kernels.of<To>().store(lines, step, images, image_stride, valid, count);
  } else {
    float packed[kChunk * kLanes];
    for (int64_t i = 0; i < count; i += kChunk) {
      const int64_t here = std::min(kChunk, count - i);
      kernels.of<From>().pack(lines + i * step, 0, step, packed, 0, kLanes, 1, here);
      kernels.of<To>().store(packed, kLanes, images + i, image_stride, valid, here);
    }
  }
}

// visit(first line, its step from line to line, first image element, valid, lines) for runs of elements that are next
// to each other in the maps: pixels of a row, or channels of a pixel.
template <typename Visit>
void for_each_run(const Maps& maps, int64_t channels, int64_t height, int64_t width, int threads, Visit visit) {
  const int64_t plane = height * width * kLanes;
  for_each_row(maps, channels, height, width, threads, [&](int64_t line, int64_t image, int valid) {
    if (maps.stride_w == 1) {
      for (int64_t c = 0; c < channels; ++c) visit(line + c * plane, kLanes, image + c * maps.stride_c, valid, width);
    } else {
      const int64_t together = maps.stride_c == 1 ? channels : 1;
      for (int64_t x = 0; x < width; ++x)
        for (int64_t c = 0; c < channels; c += together)
          visit(line + x * kLanes + c * plane, plane, image + x * maps.stride_w + c * maps.stride_c, valid, together);
    }
  });
}

}  // namespace

void to_lines(const Maps& maps, int64_t channels, int64_t height, int64_t width, void* lines, Element element,
              int threads) {
  with_element(maps.element, [&](auto from) {
    with_element(element, [&](auto to) {
      auto* images = static_cast<const decltype(from)*>(maps.data);
      auto* first = static_cast<decltype(to)*>(lines);
      for_each_run(maps, channels, height, width, threads, [&](int64_t line, int64_t step, int64_t image, int valid, int64_t count) {
        load_lines(images + image, maps.stride_n, valid, first + line, step, count);
      });
    });
  });
}

void from_lines(const void* lines, Element element, const Maps& maps, int64_t channels, int64_t height, int64_t width,
                int threads) {
  with_element(element, [&](auto from) {
    with_element(maps.element, [&](auto to) {
      auto* first = static_cast<const decltype(from)*>(lines);
      auto* images = static_cast<decltype(to)*>(maps.data);
      for_each_run(maps, channels, height, width, threads, [&](int64_t line, int64_t step, int64_t image, int valid, int64_t count) {
        store_lines(first + line, step, images + image, maps.stride_n, valid, count);
      });
    });
  });
}

void batch_norm_terms(const LineMaps& maps, const void* lines, const float* weight, const float* bias, double epsilon,
                      float* running_mean, float* running_variance, double momentum, const NormTerms& terms,
                      int threads) {
  const int64_t blocks = (maps.images + kLanes - 1) / kLanes, size = maps.pixels * kLanes;
  std::vector<double> means(blocks * maps.channels), squares(blocks * maps.channels);
  with_element(maps.element, [&](auto e) {
    using E = decltype(e);
    const MapKernels<E>& kernels = line_kernels().of<E>();
    for_each_plane(maps, threads, [&](int64_t plane, int64_t, int valid) {
      kernels.moments(static_cast<const E*>(lines) + plane * size, maps.pixels, valid, &means[plane], &squares[plane]);
    });
  });
  for (int64_t c = 0; c < maps.channels; ++c) {
    double all = 0, all_mean = 0, all_squares = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const double n = static_cast<double>(std::min<int64_t>(maps.images - b * kLanes, kLanes) * maps.pixels);
      const double delta = means[b * maps.channels + c] - all_mean;
      all_squares += squares[b * maps.channels + c] + delta * delta * all * n / (all + n);
      all_mean += delta * n / (all + n);
      all += n;
    }
    const double inverse = 1.0 / std::sqrt(all_squares / all + epsilon), scale = inverse * (weight ? weight[c] : 1.0f);
    terms.mean[c] = static_cast<float>(all_mean);
    terms.inverse[c] = static_cast<float>(inverse);
    terms.scale[c] = static_cast<float>(scale);
    terms.shift[c] = static_cast<float>((bias ? bias[c] : 0.0f) - all_mean * scale);
    if (running_mean) {
      running_mean[c] += static_cast<float>(momentum * (all_mean - running_mean[c]));
      running_variance[c] += static_cast<float>(momentum * (all_squares / (all - 1) - running_variance[c]));
    }
  }
}

void batch_norm_forward(const LineMaps& maps, const void* lines, const void* residual, const float* scale,
                        const float* shift, bool relu, void* out, int threads) {
  const int64_t size = maps.pixels * kLanes;
  with_element(maps.element, [&](auto e) {
    using E = decltype(e);
    const MapKernels<E>& kernels = line_kernels().of<E>();
    for_each_plane(maps, threads, [&](int64_t plane, int64_t c, int) {
      kernels.normalize(plane_of<E>(lines, plane * size), plane_of<E>(residual, plane * size), scale[c], shift[c], relu,
                        plane_of<E>(out, plane * size), maps.pixels);
    });
  });
}

void batch_norm_backward(const LineMaps& maps, const void* grad, const void* lines, const void* activation,
                         const float* scale, const float* shift, const float* mean, const float* inverse, bool relu,
                         bool training, void* grad_lines, void* grad_residual, float* grad_weight, float* grad_bias,
                         int threads) {
  const int64_t blocks = (maps.images + kLanes - 1) / kLanes, size = maps.pixels * kLanes;
  std::vector<NormalizeTerms> terms(maps.channels);
  for (int64_t c = 0; c < maps.channels; ++c) terms[c] = {scale[c], shift[c], mean[c], scale[c], 0, 0, relu};
  std::vector<double> sums(blocks * maps.channels), products(blocks * maps.channels);
  with_element(maps.element, [&](auto e) {
    using E = decltype(e);
    const MapKernels<E>& kernels = line_kernels().of<E>();
    for_each_plane(maps, threads, [&](int64_t plane, int64_t c, int valid) {
      const int64_t at = plane * size;
      kernels.normalize_sums(plane_of<E>(grad, at), plane_of<E>(lines, at), plane_of<E>(activation, at), terms[c],
                             maps.pixels, valid, &sums[plane], &products[plane]);
    });
  });
  const double count = static_cast<double>(maps.images * maps.pixels);
  for (int64_t c = 0; c < maps.channels; ++c) {
    double sum = 0, product = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      sum += sums[b * maps.channels + c];
      product += products[b * maps.channels + c];
    }
    grad_bias[c] = static_cast<float>(sum);
    grad_weight[c] = static_cast<float>(product * inverse[c]);
    if (training) {
      // scale * (g - mean(g) - (x - mean) * inverse^2 * mean(g * (x - mean)))
      terms[c].b = static_cast<float>(-scale[c] * product / count * inverse[c] * inverse[c]);
      terms[c].c = static_cast<float>(-scale[c] * sum / count);
    }
  }
  with_element(maps.element, [&](auto e) {
    using E = decltype(e);
    const MapKernels<E>& kernels = line_kernels().of<E>();
    for_each_plane(maps, threads, [&](int64_t plane, int64_t c, int valid) {
      const int64_t at = plane * size;
      kernels.normalize_grad(plane_of<E>(grad, at), plane_of<E>(lines, at), plane_of<E>(activation, at), terms[c],
                             maps.pixels, valid, plane_of<E>(grad_lines, at), plane_of<E>(grad_residual, at));
    });
  });
}

void max_pool_forward(const PoolShape& shape, int64_t planes, Element element, const void* in, void* out, int threads) {
  const int64_t size = shape.height * shape.width * kLanes, out_size = shape.out_height * shape.out_width * kLanes;
  with_element(element, [&](auto e) {
    using E = decltype(e);
    const MapKernels<E>& kernels = line_kernels().of<E>();
#pragma omp parallel for num_threads(std::max(threads, 1)) schedule(static)
    for (int64_t plane = 0; plane < planes; ++plane)
      kernels.max_pool(shape, plane_of<E>(in, plane * size), plane_of<E>(out, plane * out_size));
  });
}

void max_pool_backward(const PoolShape& shape, int64_t planes, Element element, const void* in, const void* out,
                       const void* grad_out, void* grad_in, int threads) {
  const int64_t size = shape.height * shape.width * kLanes, out_size = shape.out_height * shape.out_width * kLanes;
  with_element(element, [&](auto e) {
    using E = decltype(e);
    const MapKernels<E>& kernels = line_kernels().of<E>();
#pragma omp parallel for num_threads(std::max(threads, 1)) schedule(static)
    for (int64_t plane = 0; plane < planes; ++plane)
      kernels.max_pool_grad(shape, plane_of<E>(in, plane * size), plane_of<E>(out, plane * out_size),
                            plane_of<E>(grad_out, plane * out_size), plane_of<E>(grad_in, plane * size));
  });
}

}  // namespace sparsebilevel
