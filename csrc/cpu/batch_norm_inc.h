// Inner loops of batch_norm.cpp, included once for each instruction set inside a namespace of its own, after `Vector`
// (vector.h).
// No lambdas, no standard library: their code would be compiled for this instruction set and linked into the others.

constexpr int kColumns = 4;  // vectors side by side in a row: enough sums at once to hide the latency of an addition

struct AllLanes {
  template <class T>
  Vector::Type load(const T* p) const {
    return Vector::load(p);
  }
  template <class T>
  void store(T* p, Vector::Type v) const {
    Vector::store(p, v);
  }
};

struct FirstLanes {
  int count;
  template <class T>
  Vector::Type load(const T* p) const {
    return Vector::load_first(p, count);
  }
  template <class T>
  void store(T* p, Vector::Type v) const {
    Vector::store_first(p, v, count);
  }
};

// Down all rows, kColumns vectors of each; then one vector of each; then what is left of one.
template <class Walk>
void walk_columns(const Walk& walk, int64_t channels) {
  int64_t c = 0;
  for (; c + kColumns * Vector::kWidth <= channels; c += kColumns * Vector::kWidth)
    walk.template columns<kColumns>(c, AllLanes{});
  for (; c + Vector::kWidth <= channels; c += Vector::kWidth) walk.template columns<1>(c, AllLanes{});
  if (c < channels) walk.template columns<1>(c, FirstLanes{static_cast<int>(channels - c)});
}

// Sums in float32 go into a double after this many rows at most: long ones lose digits. Fewer rows where these are long,
// so that all columns of a chunk are read from a cache.
inline int64_t chunk_rows(int64_t channels) {
  const int64_t fitting = 16384 / channels;
  return fitting < 32 ? 32 : fitting > 128 ? 128 : fitting;
}

// Sums of x - center and of its square.
template <class T>
struct Moments {
  const T* x;
  int64_t rows, channels;
  const float* center;
  float *sum, *squares;

  template <int B, class Lanes>
  void columns(int64_t c, Lanes lanes) const {
    constexpr int kRows = kColumns / B;  // rows that have sums of their own
    Vector::Type s[kRows][B], q[kRows][B], k[B];
    for (int b = 0; b < B; ++b) {
      k[b] = lanes.load(center + c + b * Vector::kWidth);
      for (int r = 0; r < kRows; ++r) s[r][b] = q[r][b] = Vector::zero();
    }
    const T* p = x + c;
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows)
      for (int r = 0; r < kRows; ++r, p += channels) add<B>(p, k, lanes, s[r], q[r]);
    for (; i < rows; ++i, p += channels) add<B>(p, k, lanes, s[0], q[0]);
    for (int b = 0; b < B; ++b) {
      for (int r = 1; r < kRows; ++r) {
        s[0][b] = Vector::add(s[0][b], s[r][b]);
        q[0][b] = Vector::add(q[0][b], q[r][b]);
      }
      lanes.store(sum + c + b * Vector::kWidth, s[0][b]);
      lanes.store(squares + c + b * Vector::kWidth, q[0][b]);
    }
  }

  template <int B, class Lanes>
  static void add(const T* p, const Vector::Type* k, Lanes lanes, Vector::Type* s, Vector::Type* q) {
    for (int b = 0; b < B; ++b) {
      const Vector::Type d = Vector::sub(lanes.load(p + b * Vector::kWidth), k[b]);
      s[b] = Vector::add(s[b], d);
      q[b] = Vector::fma(d, d, q[b]);
    }
  }
};

// Mean of each column, and sum of the squared distances from it; work: [3, channels].
template <class T>
void moments(const T* x, int64_t rows, int64_t channels, float* work, double* mean, double* squares) {
  float *center = work, *sum = work + channels, *square = work + 2 * channels;
  // Distances are from the mean so far, at first from a row: squares of values far from zero would hide the variance.
  for (int64_t c = 0; c < channels; ++c) center[c] = 0;
  walk_columns(Moments<T>{x, 1, channels, center, sum, square}, channels);
  for (int64_t c = 0; c < channels; ++c) mean[c] = sum[c], squares[c] = 0;
  const int64_t chunk = chunk_rows(channels);
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t n = rows - begin < chunk ? rows - begin : chunk;
    for (int64_t c = 0; c < channels; ++c) center[c] = static_cast<float>(mean[c]);
    walk_columns(Moments<T>{x + begin * channels, n, channels, center, sum, square}, channels);
    // Joined as in Chan et al. (1983).
    const double inverse = 1.0 / static_cast<double>(n), share = static_cast<double>(n) / static_cast<double>(begin + n);
    const double weight = static_cast<double>(begin) * share;
    for (int64_t c = 0; c < channels; ++c) {
      const double from_center = sum[c] * inverse, delta = center[c] - mean[c] + from_center;
      squares[c] += square[c] - sum[c] * from_center + delta * delta * weight;
      mean[c] += delta * share;
    }
  }
}

template <class T, bool kResidual>
struct Normalize {
  const T *x, *residual;
  int64_t rows, channels;
  const float *scale, *shift;
  bool relu;
  T* out;

  template <int B, class Lanes>
  void columns(int64_t c, Lanes lanes) const {
    Vector::Type a[B], s[B];
    for (int b = 0; b < B; ++b) {
      a[b] = lanes.load(scale + c + b * Vector::kWidth);
      s[b] = lanes.load(shift + c + b * Vector::kWidth);
    }
    const Vector::Type least = Vector::broadcast(relu ? 0 : -__builtin_inff());
    for (int64_t at = c; at < rows * channels; at += channels) {
      for (int b = 0; b < B; ++b) {
        const int64_t i = at + b * Vector::kWidth;
        Vector::Type y = Vector::fma(a[b], lanes.load(x + i), s[b]);
        if (kResidual) y = Vector::add(y, lanes.load(residual + i));
        lanes.store(out + i, Vector::max(least, y));
      }
    }
  }
};

template <class T>
void normalize(const T* x, const T* residual, int64_t rows, int64_t channels, const float* scale, const float* shift,
               bool relu, T* out) {
  const int64_t chunk = chunk_rows(channels);
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t n = rows - begin < chunk ? rows - begin : chunk, at = begin * channels;
    if (residual)
      walk_columns(Normalize<T, true>{x + at, residual + at, n, channels, scale, shift, relu, out + at}, channels);
    else
      walk_columns(Normalize<T, false>{x + at, nullptr, n, channels, scale, shift, relu, out + at}, channels);
  }
}

// What the gradient passes through on its way to the sum of normalized maps and residual: nothing, or a ReLU whose sign
// is that of the result, or follows from the normalized maps.
enum class Through { nothing, relu_of_out, relu_of_x };

template <Through kThrough, class T, class Lanes>
Vector::Type passed(Vector::Type g, const T* out, int64_t i, Vector::Type x, const float* scale, const float* shift,
                    Lanes lanes) {
  if (kThrough == Through::relu_of_out) return Vector::where_passing(lanes.load(out + i), g);
  if (kThrough == Through::relu_of_x)
    return Vector::where_passing(Vector::fma(lanes.load(scale), x, lanes.load(shift)), g);
  return g;
}

// Sums of the gradient g that passes, and of g * (x - mean). The gradient is grad + more, if that is not null.
template <class T, Through kThrough>
struct GradSums {
  const T *grad, *more, *x, *out;
  int64_t rows, channels;
  const float *mean, *scale, *shift;
  T* passing;  // receives g unless null
  float *sum, *product;

  template <int B, class Lanes>
  void columns(int64_t c, Lanes lanes) const {
    constexpr int kRows = kColumns / B;
    Vector::Type s[kRows][B], p[kRows][B];
    for (int b = 0; b < B; ++b)
      for (int r = 0; r < kRows; ++r) s[r][b] = p[r][b] = Vector::zero();
    int64_t i = 0, at = c;
    for (; i + kRows <= rows; i += kRows)
      for (int r = 0; r < kRows; ++r, at += channels) add<B>(c, at, lanes, s[r], p[r]);
    for (; i < rows; ++i, at += channels) add<B>(c, at, lanes, s[0], p[0]);
    for (int b = 0; b < B; ++b) {
      for (int r = 1; r < kRows; ++r) {
        s[0][b] = Vector::add(s[0][b], s[r][b]);
        p[0][b] = Vector::add(p[0][b], p[r][b]);
      }
      lanes.store(sum + c + b * Vector::kWidth, s[0][b]);
      lanes.store(product + c + b * Vector::kWidth, p[0][b]);
    }
  }

  template <int B, class Lanes>
  void add(int64_t c, int64_t at, Lanes lanes, Vector::Type* s, Vector::Type* p) const {
    for (int b = 0; b < B; ++b) {
      const int64_t column = c + b * Vector::kWidth, i = at + b * Vector::kWidth;
      const Vector::Type v = lanes.load(x + i);
      Vector::Type g = lanes.load(grad + i);
      if (more) g = Vector::add(g, lanes.load(more + i));
      g = passed<kThrough>(g, out, i, v, scale + column, shift + column, lanes);
      if (passing) lanes.store(passing + i, g);
      s[b] = Vector::add(s[b], g);
      p[b] = Vector::fma(g, Vector::sub(v, lanes.load(mean + column)), p[b]);
    }
  }
};

template <Through kThrough, class T>
void grad_sums_through(const T* grad, const T* more, const T* x, const T* out, int64_t rows, int64_t channels,
                       const float* mean, const float* scale, const float* shift, T* passing, float* work,
                       double* sums, double* products) {
  for (int64_t c = 0; c < channels; ++c) sums[c] = products[c] = 0;
  float *sum = work, *product = work + channels;
  const int64_t chunk = chunk_rows(channels);
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t n = rows - begin < chunk ? rows - begin : chunk, at = begin * channels;
    walk_columns(GradSums<T, kThrough>{grad + at, more ? more + at : more, x + at, out ? out + at : out, n, channels,
                                       mean, scale, shift, passing ? passing + at : passing, sum, product},
                 channels);
    for (int64_t c = 0; c < channels; ++c) sums[c] += sum[c], products[c] += product[c];
  }
}

template <class T>
void grad_sums(const T* grad, const T* more, const T* x, const T* out, int64_t rows, int64_t channels,
               const float* mean, const float* scale, const float* shift, bool relu, T* passing, float* work,
               double* sums, double* products) {
  const auto run = !relu ? grad_sums_through<Through::nothing, T>
                   : out ? grad_sums_through<Through::relu_of_out, T>
                         : grad_sums_through<Through::relu_of_x, T>;
  run(grad, more, x, out, rows, channels, mean, scale, shift, passing, work, sums, products);
}

// grad_x = scale * g + slope * (x - mean) + offset; slope null: scale * g.
template <class T, Through kThrough>
struct Gradient {
  const T *grad, *x, *out;
  int64_t rows, channels;
  const float *mean, *scale, *shift, *slope, *offset;
  T* grad_x;

  template <int B, class Lanes>
  void columns(int64_t c, Lanes lanes) const {
    Vector::Type center[B], factor[B], rest[B], a[B];
    for (int b = 0; b < B; ++b) {
      const int64_t column = c + b * Vector::kWidth;
      center[b] = lanes.load(mean + column);
      factor[b] = slope ? lanes.load(slope + column) : Vector::zero();
      rest[b] = slope ? lanes.load(offset + column) : Vector::zero();
      a[b] = lanes.load(scale + column);
    }
    for (int64_t at = c; at < rows * channels; at += channels) {
      for (int b = 0; b < B; ++b) {
        const int64_t column = c + b * Vector::kWidth, i = at + b * Vector::kWidth;
        const Vector::Type v = lanes.load(x + i);
        const Vector::Type g =
            passed<kThrough>(lanes.load(grad + i), out, i, v, scale + column, shift + column, lanes);
        Vector::Type of_statistics = Vector::zero();
        if (slope) of_statistics = Vector::fma(factor[b], Vector::sub(v, center[b]), rest[b]);
        lanes.store(grad_x + i, Vector::fma(a[b], g, of_statistics));
      }
    }
  }
};

template <Through kThrough, class T>
void gradient_through(const T* grad, const T* x, const T* out, int64_t rows, int64_t channels, const float* mean,
                      const float* scale, const float* shift, const float* slope, const float* offset, T* grad_x) {
  const int64_t chunk = chunk_rows(channels);
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t n = rows - begin < chunk ? rows - begin : chunk, at = begin * channels;
    walk_columns(Gradient<T, kThrough>{grad + at, x + at, out ? out + at : out, n, channels, mean, scale, shift, slope,
                                       offset, grad_x + at},
                 channels);
  }
}

template <class T>
void gradient(const T* grad, const T* x, const T* out, int64_t rows, int64_t channels, const float* mean,
              const float* scale, const float* shift, const float* slope, const float* offset, bool relu, T* grad_x) {
  const auto run = !relu ? gradient_through<Through::nothing, T>
                   : out ? gradient_through<Through::relu_of_out, T>
                         : gradient_through<Through::relu_of_x, T>;
  run(grad, x, out, rows, channels, mean, scale, shift, slope, offset, grad_x);
}
