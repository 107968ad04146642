// Work is shared out with the image block as the slowest index, as the convolutions do it: the thread that wrote a line
// reads it again. Sums go through one double for each plane, added up in a fixed order.
#include "feature_maps.h"

#include <algorithm>
#include <cmath>
#include <memory>
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

}  // namespace

void to_lines(const Maps& maps, int64_t channels, int64_t height, int64_t width, float* lines, int threads) {
  const LineKernels& kernels = line_kernels();
  const int64_t plane = height * width * kLanes;
  for_each_row(maps, channels, height, width, threads, [&](int64_t line, int64_t image, int valid) {
    if (maps.stride_w == 1) {
      for (int64_t c = 0; c < channels; ++c)
        kernels.load(maps.data + image + c * maps.stride_c, maps.stride_n, valid, lines + line + c * plane, kLanes, width);
    } else {
      const int64_t together = maps.stride_c == 1 ? channels : 1;
      for (int64_t x = 0; x < width; ++x)
        for (int64_t c = 0; c < channels; c += together)
          kernels.load(maps.data + image + x * maps.stride_w + c * maps.stride_c, maps.stride_n, valid,
                       lines + line + x * kLanes + c * plane, plane, together);
    }
  });
}

void from_lines(const float* lines, const Maps& maps, int64_t channels, int64_t height, int64_t width, int threads) {
  const LineKernels& kernels = line_kernels();
  const int64_t plane = height * width * kLanes;
  for_each_row(maps, channels, height, width, threads, [&](int64_t line, int64_t image, int valid) {
    if (maps.stride_w == 1) {
      for (int64_t c = 0; c < channels; ++c)
        kernels.store(lines + line + c * plane, kLanes, maps.data + image + c * maps.stride_c, maps.stride_n, valid, width);
    } else {
      const int64_t together = maps.stride_c == 1 ? channels : 1;
      for (int64_t x = 0; x < width; ++x)
        for (int64_t c = 0; c < channels; c += together)
          kernels.store(lines + line + x * kLanes + c * plane, plane,
                        maps.data + image + x * maps.stride_w + c * maps.stride_c, maps.stride_n, valid, together);
    }
  });
}

void batch_norm_terms(const LineMaps& maps, const float* lines, const float* weight, const float* bias, double epsilon,
                      float* running_mean, float* running_variance, double momentum, const NormTerms& terms,
                      int threads) {
  const LineKernels& kernels = line_kernels();
  const int64_t blocks = (maps.images + kLanes - 1) / kLanes, size = maps.pixels * kLanes;
  std::vector<double> means(blocks * maps.channels), squares(blocks * maps.channels);
  for_each_plane(maps, threads, [&](int64_t plane, int64_t, int valid) {
    kernels.moments(lines + plane * size, maps.pixels, valid, &means[plane], &squares[plane]);
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

void batch_norm_forward(const LineMaps& maps, const float* lines, const float* residual, const float* scale,
                        const float* shift, bool relu, float* out, int threads) {
  const LineKernels& kernels = line_kernels();
  const int64_t size = maps.pixels * kLanes;
  for_each_plane(maps, threads, [&](int64_t plane, int64_t c, int) {
    kernels.normalize(lines + plane * size, residual ? residual + plane * size : nullptr, scale[c], shift[c], relu,
                      out + plane * size, maps.pixels);
  });
}

void batch_norm_backward(const LineMaps& maps, const float* grad, const float* lines, const float* activation,
                         const float* scale, const float* shift, const float* mean, const float* inverse, bool relu,
                         bool training, float* grad_lines, float* grad_residual, float* grad_weight, float* grad_bias,
                         int threads) {
  const LineKernels& kernels = line_kernels();
  const int64_t blocks = (maps.images + kLanes - 1) / kLanes, size = maps.pixels * kLanes;
  const auto at = [size](auto* p, int64_t plane) { return p ? p + plane * size : nullptr; };
  std::vector<NormalizeTerms> terms(maps.channels);
  for (int64_t c = 0; c < maps.channels; ++c) terms[c] = {scale[c], shift[c], mean[c], scale[c], 0, 0, relu};
  std::vector<double> sums(blocks * maps.channels), products(blocks * maps.channels);
  for_each_plane(maps, threads, [&](int64_t plane, int64_t c, int valid) {
    kernels.normalize_sums(at(grad, plane), at(lines, plane), at(activation, plane), terms[c], maps.pixels, valid,
                           &sums[plane], &products[plane]);
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
  for_each_plane(maps, threads, [&](int64_t plane, int64_t c, int valid) {
    kernels.normalize_grad(at(grad, plane), at(lines, plane), at(activation, plane), terms[c], maps.pixels, valid,
                           at(grad_lines, plane), at(grad_residual, plane));
  });
}

void max_pool_forward(const PoolShape& shape, int64_t planes, const float* in, float* out, int threads) {
  const LineKernels& kernels = line_kernels();
  const int64_t size = shape.height * shape.width * kLanes, out_size = shape.out_height * shape.out_width * kLanes;
#pragma omp parallel for num_threads(std::max(threads, 1)) schedule(static)
  for (int64_t plane = 0; plane < planes; ++plane) kernels.max_pool(shape, in + plane * size, out + plane * out_size);
}

void max_pool_backward(const PoolShape& shape, int64_t planes, const float* in, const float* out,
                       const float* grad_out, float* grad_in, int threads) {
  const LineKernels& kernels = line_kernels();
  const int64_t size = shape.height * shape.width * kLanes, out_size = shape.out_height * shape.out_width * kLanes;
#pragma omp parallel for num_threads(std::max(threads, 1)) schedule(static)
  for (int64_t plane = 0; plane < planes; ++plane)
    kernels.max_pool_grad(shape, in + plane * size, out + plane * out_size, grad_out + plane * out_size,
                          grad_in + plane * size);
}

}  // namespace sparsebilevel
