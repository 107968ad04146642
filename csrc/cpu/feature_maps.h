// What stands between convolutions, on lines, contiguous [ceil(images / 16), channels, height, width, 16]: conversion to
// and from ordinary tensors, batch normalization with ReLU and residual addition, and maximum pooling.
#pragma once

#include <cstdint>

#include "line_kernels.h"
#include "masked_conv2d.h"

namespace sparsebilevel {

struct LineMaps {
  int64_t images, channels, pixels;
  Element element;  // of all lines that come with it
};

// Lanes of missing images become zero. `maps` has ordinary strides; `element` is that of the lines.
void to_lines(const Maps& maps, int64_t channels, int64_t height, int64_t width, void* lines, Element element,
              int threads);
void from_lines(const void* lines, Element element, const Maps& maps, int64_t channels, int64_t height, int64_t width,
                int threads);

// What a normalization does to each channel: activation = scale * line + shift. All [channels].
struct NormTerms {
  float *mean, *inverse;  // inverse: 1 / sqrt(biased variance + epsilon)
  float *scale, *shift;
};

// Terms of the batch, over images and pixels, with weight and bias (null: 1 and 0). If not null, the running mean and
// (unbiased) variance move towards those of the batch by `momentum`.
void batch_norm_terms(const LineMaps& maps, const void* lines, const float* weight, const float* bias, double epsilon,
                      float* running_mean, float* running_variance, double momentum, const NormTerms& terms,
                      int threads);

// out = scale * lines + shift (+ residual, if not null), with `relu` no less than zero. scale, shift: [channels].
void batch_norm_forward(const LineMaps& maps, const void* lines, const void* residual, const float* scale,
                        const float* shift, bool relu, void* out, int threads);

// Gradients of all operands: of the lines (may be written over grad), the residual (if not null), weight and bias
// [channels]. `activation` is what the forward pass gave, or null: it follows from the lines then (without residual).
// In `training` mean and variance are functions of the lines. inverse: 1 / standard deviation [channels].
void batch_norm_backward(const LineMaps& maps, const void* grad, const void* lines, const void* activation,
                         const float* scale, const float* shift, const float* mean, const float* inverse, bool relu,
                         bool training, void* grad_lines, void* grad_residual, float* grad_weight, float* grad_bias,
                         int threads);

// Lines of shape.height x width to lines of shape.out_height x out_width, and back.
void max_pool_forward(const PoolShape& shape, int64_t planes, Element element, const void* in, void* out, int threads);
void max_pool_backward(const PoolShape& shape, int64_t planes, Element element, const void* in, const void* out,
                       const void* grad_out, void* grad_in, int threads);

}  // namespace sparsebilevel
