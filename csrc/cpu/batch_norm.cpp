// The rows are cut into the same parts for any number of threads, and a thread takes the same parts of all maps of a
// batch: what it wrote it reads again. Sums go through one double a part, added up in order.
#include "batch_norm.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "isa.h"
#ifdef SPARSEBILEVEL_X86
#include <immintrin.h>
#endif

namespace sparsebilevel {
namespace {

namespace scalar {

// Four lanes of a vector extension: as much as every 64-bit processor has.
struct Vector {
  using Type = float __attribute__((vector_size(16)));
  using Bits = int32_t __attribute__((vector_size(16)));
  static constexpr int kWidth = 4;
  static Type zero() { return Type{}; }
  static Type broadcast(float x) { return Type{x, x, x, x}; }
  static Type add(Type a, Type b) { return a + b; }
  static Type sub(Type a, Type b) { return a - b; }
  static Type fma(Type a, Type b, Type c) { return a * b + c; }
  static Type max(Type a, Type b) { return (a > b) ? a : b; }
  static Type where_passing(Type y, Type g) { return (y <= Type{}) ? Type{} : g; }
  static Type load(const float* p) {
    Type v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, Type v) { __builtin_memcpy(p, &v, sizeof v); }
  static Type load(const uint16_t* p) { return (Type)(Bits{p[0], p[1], p[2], p[3]} << 16); }
  static void store(uint16_t* p, Type v) { store_first(p, v, kWidth); }
  static Type load_first(const float* p, int n) {
    Type v{};
    for (int i = 0; i < n; ++i) v[i] = p[i];
    return v;
  }
  static void store_first(float* p, Type v, int n) {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
  static Type load_first(const uint16_t* p, int n) {
    Bits v{};
    for (int i = 0; i < n; ++i) v[i] = p[i];
    return (Type)(v << 16);
  }
  static void store_first(uint16_t* p, Type v, int n) {
    const Bits bits = (Bits)v;
    const Bits nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to even
    const Bits rounded = (v == v) ? nearest : (bits >> 16) | 0x40;    // a NaN stays one
    for (int i = 0; i < n; ++i) p[i] = static_cast<uint16_t>(rounded[i]);
  }
};

#include "batch_norm_inc.h"

}  // namespace scalar

#ifdef SPARSEBILEVEL_X86
SPARSEBILEVEL_BEGIN_AVX2
namespace avx2 {

struct Vector {
  using Type = __m256;
  static constexpr int kWidth = 8;
  static Type zero() { return _mm256_setzero_ps(); }
  static Type broadcast(float x) { return _mm256_set1_ps(x); }
  static Type add(Type a, Type b) { return _mm256_add_ps(a, b); }
  static Type sub(Type a, Type b) { return _mm256_sub_ps(a, b); }
  static Type fma(Type a, Type b, Type c) { return _mm256_fmadd_ps(a, b, c); }
  static Type max(Type a, Type b) { return _mm256_max_ps(a, b); }
  static Type where_passing(Type y, Type g) { return _mm256_and_ps(g, _mm256_cmp_ps(y, zero(), _CMP_NLE_UQ)); }
  static Type load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Type v) { _mm256_storeu_ps(p, v); }
  static Type load(const uint16_t* p) { return widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store(uint16_t* p, Type v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), rounded(v)); }
  static Type load_first(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static void store_first(float* p, Type v, int n) { _mm256_maskstore_ps(p, first(n), v); }
  static Type load_first(const uint16_t* p, int n) {
    uint16_t lanes[kWidth] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  static void store_first(uint16_t* p, Type v, int n) {
    uint16_t lanes[kWidth];
    store(lanes, v);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  }

 private:
  static __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Type widened(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
  static __m128i rounded(Type v) {  // to nearest, ties to even; a NaN stays one
    const __m256i bits = _mm256_castps_si256(v), high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i nan = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i wide = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), nan, is_nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  }
};

#include "batch_norm_inc.h"

}  // namespace avx2
SPARSEBILEVEL_END_ISA

SPARSEBILEVEL_BEGIN_AVX512
namespace avx512 {

struct Vector {
  using Type = __m512;
  static constexpr int kWidth = 16;
  static Type zero() { return _mm512_setzero_ps(); }
  static Type broadcast(float x) { return _mm512_set1_ps(x); }
  static Type add(Type a, Type b) { return _mm512_add_ps(a, b); }
  static Type sub(Type a, Type b) { return _mm512_sub_ps(a, b); }
  static Type fma(Type a, Type b, Type c) { return _mm512_fmadd_ps(a, b, c); }
  static Type max(Type a, Type b) { return _mm512_maskz_max_ps(0xffff, a, b); }
  static Type where_passing(Type y, Type g) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, zero(), _CMP_NLE_UQ), g);
  }
  static Type load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Type v) { _mm512_storeu_ps(p, v); }
  static Type load(const uint16_t* p) { return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void store(uint16_t* p, Type v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded(v)); }
  static Type load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store_first(float* p, Type v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
  static Type load_first(const uint16_t* p, int n) { return widened(_mm256_maskz_loadu_epi16(first(n), p)); }
  static void store_first(uint16_t* p, Type v, int n) { _mm256_mask_storeu_epi16(p, first(n), rounded(v)); }

 private:
  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Type widened(__m256i v) {
    const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, v);
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, wide, 16));
  }
  static __m256i rounded(Type v) {  // to nearest, ties to even; a NaN stays one
    const __m512i bits = _mm512_castps_si512(v), high = _mm512_maskz_srli_epi32(0xffff, bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i nan = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    const __m512i wide =
        _mm512_mask_mov_epi32(_mm512_maskz_srli_epi32(0xffff, up, 16), _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), nan);
    return _mm512_maskz_cvtepi32_epi16(0xffff, wide);
  }
};

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
  rows.is_bfloat16 ? run(static_cast<uint16_t*>(out)) : run(static_cast<float*>(out));
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
  rows.is_bfloat16 ? run(static_cast<uint16_t*>(grad_x)) : run(static_cast<float*>(grad_x));
}

}  // namespace sparsebilevel
