// The rows are cut into the same parts for any number of threads, and a thread takes the same parts of all maps of a
// batch: what it wrote it reads again. Sums go through one double a part, added up in order.
#include "batch_norm.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "isa.h"
#include "vector.h"

namespace sparsebilevel {
namespace {

namespace scalar {

using Vector = ScalarVector;

#include "batch_norm_inc.h"

}  // namespace scalar

#ifdef SPARSEBILEVEL_X86
SPARSEBILEVEL_BEGIN_AVX2
namespace avx2 {

using Vector = Avx2Vector;

#include "batch_norm_inc.h"

}  // namespace avx2
SPARSEBILEVEL_END_ISA

SPARSEBILEVEL_BEGIN_AVX512
namespace avx512 {

using Vector = Avx512Vector;

#include "batch_norm_inc.h"

}  // namespace avx512
SPARSEBILEVEL_END_ISA
#endif

template <class T>
struct Kernels {
  decltype(&scalar::moments<T>) moments = scalar::moments<T>;
  decltype(&scalar::normalize<T>) normalize = scalar::normalize<T>;
  decltype(&scalar::grad_sums<T>) grad_sums = scalar::grad_sums<T>;
  decltype(&scalar::gradient<T>) gradient = scalar::gradient<T>;
};

// Those of isa().
template <class T>
Kernels<T> kernels() {
#ifdef SPARSEBILEVEL_X86
  if (isa() == Isa::avx512)
    return {avx512::moments<T>, avx512::normalize<T>, avx512::grad_sums<T>, avx512::gradient<T>};
  if (isa() == Isa::avx2) return {avx2::moments<T>, avx2::normalize<T>, avx2::grad_sums<T>, avx2::gradient<T>};
#endif
  return {};
}

// The parts that rows are cut into: enough for many threads, and each worth a sum of its own.
struct Parts {
  int64_t rows, count;
  bool alone;  // too little work for more than one thread

  explicit Parts(const NormRows& r)
      : rows(r.count), count(std::clamp<int64_t>(r.count / 32, 1, 64)), alone(r.count * r.channels < (1 << 14)) {}
  int64_t begin(int64_t part) const { return rows * part / count; }
  int64_t size(int64_t part) const { return begin(part + 1) - begin(part); }
};

// visit(part, first row, rows)
template <class Visit>
void for_each_part(const Parts& parts, int threads, Visit visit) {
#pragma omp parallel for num_threads(std::max(threads, 1)) schedule(static) if (!parts.alone)
  for (int64_t part = 0; part < parts.count; ++part) visit(part, parts.begin(part), parts.size(part));
}

// Mean and biased variance over all rows.
template <class T>
void batch_moments(const Parts& parts, int64_t channels, const T* x, double* mean, double* variance, int threads) {
  const Kernels<T> run = kernels<T>();
  const std::unique_ptr<float[]> work(new float[3 * parts.count * channels]);
  const std::unique_ptr<double[]> means(new double[parts.count * channels]);
  const std::unique_ptr<double[]> squares(new double[parts.count * channels]);
  for_each_part(parts, threads, [&](int64_t part, int64_t begin, int64_t rows) {
    const int64_t at = part * channels;
    run.moments(x + begin * channels, rows, channels, &work[3 * at], &means[at], &squares[at]);
  });
  std::fill_n(mean, channels, 0.0);
  std::fill_n(variance, channels, 0.0);
  for (int64_t part = 0; part < parts.count; ++part) {
    const double before = static_cast<double>(parts.begin(part)), rows = static_cast<double>(parts.size(part));
    const double share = rows / (before + rows);
    for (int64_t c = 0; c < channels; ++c) {
      const double delta = means[part * channels + c] - mean[c];
      variance[c] += squares[part * channels + c] + delta * delta * before * share;
      mean[c] += delta * share;
    }
  }
  for (int64_t c = 0; c < channels; ++c) variance[c] /= static_cast<double>(parts.rows);
}

template <class T>
void forward(const NormRows& rows, const NormOperands& norm, const T* x, const T* residual, bool relu, T* out,
             float* terms, int threads) {
  const Parts parts(rows);
  const int64_t channels = rows.channels;
  std::vector<double> mean(channels), variance(channels);
  if (norm.of_batch) {
    batch_moments(parts, channels, x, mean.data(), variance.data(), threads);
  } else {
    std::copy_n(norm.running_mean, channels, mean.data());
    std::copy_n(norm.running_variance, channels, variance.data());
  }
  const double count = static_cast<double>(rows.count);
  for (int64_t c = 0; c < channels; ++c) {
    const double inverse = 1.0 / std::sqrt(variance[c] + norm.epsilon);
    const double scale = inverse * (norm.weight ? norm.weight[c] : 1.0f);
    terms[c] = static_cast<float>(mean[c]);
    terms[channels + c] = static_cast<float>(inverse);
    terms[2 * channels + c] = static_cast<float>(scale);
    terms[3 * channels + c] = static_cast<float>((norm.bias ? norm.bias[c] : 0.0f) - mean[c] * scale);
    if (norm.of_batch && norm.running_mean) {
      const double unbiased = variance[c] * count / (count - 1);
      norm.running_mean[c] += static_cast<float>(norm.momentum * (mean[c] - norm.running_mean[c]));
      norm.running_variance[c] += static_cast<float>(norm.momentum * (unbiased - norm.running_variance[c]));
    }
  }
  const Kernels<T> run = kernels<T>();
  for_each_part(parts, threads, [&](int64_t, int64_t begin, int64_t size) {
    const int64_t at = begin * channels;
    run.normalize(x + at, residual ? residual + at : nullptr, size, channels, terms + 2 * channels,
                  terms + 3 * channels, relu, out + at);
  });
}

template <class T>
void backward(const NormRows& rows, const float* terms, bool of_batch, bool relu, const T* grad, const T* more,
              const T* x, const T* out, T* grad_x, T* grad_residual, float* grad_weight, float* grad_bias, int threads) {
  const Parts parts(rows);
  const int64_t channels = rows.channels;
  const float *mean = terms, *inverse = terms + channels, *scale = terms + 2 * channels, *shift = terms + 3 * channels;
  const Kernels<T> run = kernels<T>();
  const std::unique_ptr<float[]> work(new float[2 * parts.count * channels]);
  const std::unique_ptr<double[]> sums(new double[parts.count * channels]);
  const std::unique_ptr<double[]> products(new double[parts.count * channels]);
  const auto at = [channels](auto* p, int64_t row) { return p ? p + row * channels : p; };
  // What is known after the first pass, the second does not work out again.
  T* passing = grad_residual || !more ? grad_residual : grad_x;
  for_each_part(parts, threads, [&](int64_t part, int64_t begin, int64_t size) {
    run.grad_sums(at(grad, begin), at(more, begin), at(x, begin), at(out, begin), size, channels, mean, scale, shift,
                  relu, at(passing, begin), &work[2 * part * channels], &sums[part * channels],
                  &products[part * channels]);
  });
  for (int64_t part = 1; part < parts.count; ++part) {
    for (int64_t c = 0; c < channels; ++c) {
      sums[c] += sums[part * channels + c];
      products[c] += products[part * channels + c];
    }
  }
  std::vector<float> slope(channels), offset(channels);
  const double count = static_cast<double>(rows.count);
  for (int64_t c = 0; c < channels; ++c) {
    grad_bias[c] = static_cast<float>(sums[c]);
    grad_weight[c] = static_cast<float>(products[c] * inverse[c]);
    if (of_batch) {
      // scale * (g - mean(g) - (x - mean) * inverse^2 * mean(g * (x - mean)))
      slope[c] = static_cast<float>(-scale[c] * products[c] / count * inverse[c] * inverse[c]);
      offset[c] = static_cast<float>(-scale[c] * sums[c] / count);
    }
  }
  if (!grad_x) return;
  if (passing) {
    grad = passing;
    relu = false;
  }
  for_each_part(parts, threads, [&](int64_t, int64_t begin, int64_t size) {
    run.gradient(at(grad, begin), at(x, begin), at(out, begin), size, channels, mean, scale, shift,
                 of_batch ? slope.data() : nullptr, offset.data(), relu, at(grad_x, begin));
  });
}

}  // namespace

void batch_norm_nhwc_forward(const NormRows& rows, const NormOperands& norm, const void* x, const void* residual,
                             bool relu, void* out, float* terms, int threads) {
  const auto run = [&](auto* result) {
    using T = std::remove_pointer_t<decltype(result)>;
    forward(rows, norm, static_cast<const T*>(x), static_cast<const T*>(residual), relu, result, terms, threads);
  };
  rows.is_bfloat16 ? run(static_cast<Bfloat16*>(out)) : run(static_cast<float*>(out));
}

void batch_norm_nhwc_backward(const NormRows& rows, const float* terms, bool of_batch, bool relu, const void* grad,
                              const void* more, const void* x, const void* out, void* grad_x, void* grad_residual,
                              float* grad_weight, float* grad_bias, int threads) {
  const auto run = [&](auto* result) {
    using T = std::remove_pointer_t<decltype(result)>;
    backward(rows, terms, of_batch, relu, static_cast<const T*>(grad), static_cast<const T*>(more),
             static_cast<const T*>(x), static_cast<const T*>(out), result, static_cast<T*>(grad_residual), grad_weight,
             grad_bias, threads);
  };
  rows.is_bfloat16 ? run(static_cast<Bfloat16*>(grad_x)) : run(static_cast<float*>(grad_x));
}

}  // namespace sparsebilevel
