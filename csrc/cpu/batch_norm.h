// Batch normalization with ReLU and residual addition on ordinary maps in channels_last: rows of channels, contiguous
// [images * height * width, channels], in float32, or in bfloat16 with arithmetic in float32. (feature_maps.h has it for
// lines.)
#pragma once

#include <cstdint>

namespace sparsebilevel {

struct NormRows {
  int64_t count, channels;
  bool is_bfloat16;
};

// All float32 [channels]. weight and bias null: 1 and 0. With `of_batch` the batch's own statistics are taken, and the
// running ones, if not null, move towards them by `momentum` (the variance: unbiased); else the running ones are taken.
struct NormOperands {
  const float *weight, *bias;
  float *running_mean, *running_variance;
  double momentum, epsilon;
  bool of_batch;
};

// out = scale * x + shift (+ residual, if not null), with `relu` no less than zero. `terms`, float32 [4, channels],
// receives what the backward pass needs: mean, 1 / standard deviation, scale and shift.
void batch_norm_nhwc_forward(const NormRows& rows, const NormOperands& norm, const void* x, const void* residual,
                             bool relu, void* out, float* terms, int threads);

// Gradients of x, of the residual (both: unless null), and of weight and bias [channels], from that of the result: grad,
// or grad + more if that is not null. With `relu` it passes where the result was positive: `out`, or what follows from x
// if that is null (without residual).
void batch_norm_nhwc_backward(const NormRows& rows, const float* terms, bool of_batch, bool relu, const void* grad,
                              const void* more, const void* x, const void* out, void* grad_x, void* grad_residual,
                              float* grad_weight, float* grad_bias, int threads);

}  // namespace sparsebilevel
