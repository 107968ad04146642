// Bodies of line_kernels.h, included once for each instruction set inside a namespace of its own, after `Vector`
// (vector.h) and `kMaxTile`, the lines of a tile that the registers hold.
// No lambdas, no standard library: their code would be compiled for this instruction set and linked into the others.

template <int R, int L>
void forward(const int32_t* offsets, const float* values, const EntryRow* row, const EntryRow* last, Patch patch,
             Tile out, const float* bias, bool first) {
  for (; row != last; ++row) {
    float* tile = out.lines + row->out * out.plane;
    for (int lane = 0; lane < kLanes; lane += Vector::kWidth) {
      Vector::Type sum[R][L];
      if (first) {
        const Vector::Type start = bias ? Vector::broadcast(bias[row->out]) : Vector::zero();
        for (int i = 0; i < R; ++i)
          for (int j = 0; j < L; ++j) sum[i][j] = start;
      } else {
        for (int i = 0; i < R; ++i)
          for (int j = 0; j < L; ++j) sum[i][j] = Vector::load(tile + i * out.pitch + j * kLanes + lane);
      }
      const char* base = reinterpret_cast<const char*>(patch.lines + lane);
      for (uint32_t k = row->begin; k != row->end; ++k) {
        const char* line = base + offsets[k];
        const Vector::Type value = Vector::broadcast(values[k]);
        for (int i = 0; i < R; ++i, line += patch.pitch)
          for (int j = 0; j < L; ++j)
            sum[i][j] = Vector::fma(value, Vector::load(reinterpret_cast<const float*>(line) + j * kLanes), sum[i][j]);
      }
      for (int i = 0; i < R; ++i)
        for (int j = 0; j < L; ++j) Vector::store(tile + i * out.pitch + j * kLanes + lane, sum[i][j]);
    }
  }
}

// Adds up the lanes of kWidth vectors: lane v of the result is the sum of vector v. Four vectors become one whose
// groups of four lanes hold partial sums of all four; `fold` adds up the groups.
inline Vector::Type sum_lanes(const Vector::Type* vectors) {
  Vector::Type quads[Vector::kWidth / 4];
  for (int q = 0; q < Vector::kWidth / 4; ++q) {
    const Vector::Type* v = vectors + 4 * q;
    const Vector::Type ab = Vector::add(Vector::unpack_lo(v[0], v[1]), Vector::unpack_hi(v[0], v[1]));
    const Vector::Type cd = Vector::add(Vector::unpack_lo(v[2], v[3]), Vector::unpack_hi(v[2], v[3]));
    quads[q] = Vector::add(Vector::unpack_lo_pair(ab, cd), Vector::unpack_hi_pair(ab, cd));
  }
  return Vector::fold(quads);
}

template <int R, int L>
void weight_grad(const int32_t* offsets, const EntryRow* row, const EntryRow* last, Patch patch, Tile grad,
                 float* sums) {
  if (row == last) return;
  for (int lane = 0; lane < kLanes; lane += Vector::kWidth) {
    const char* base = reinterpret_cast<const char*>(patch.lines + lane);
    // The entries of consecutive rows follow each other, so a batch of kWidth products may span rows.
    Vector::Type batch[Vector::kWidth];
    int filled = 0;
    float* sum = sums + row->begin;
    for (const EntryRow* r = row; r != last; ++r) {
      const float* tile = grad.lines + r->out * grad.plane + lane;
      Vector::Type held[R][L];
      for (int i = 0; i < R; ++i)
        for (int j = 0; j < L; ++j) held[i][j] = Vector::load(tile + i * grad.pitch + j * kLanes);
      for (uint32_t k = r->begin; k != r->end; ++k) {
        const char* line = base + offsets[k];
        Vector::Type product = Vector::zero();
        for (int i = 0; i < R; ++i, line += patch.pitch)
          for (int j = 0; j < L; ++j)
            product = Vector::fma(held[i][j], Vector::load(reinterpret_cast<const float*>(line) + j * kLanes), product);
        batch[filled++] = product;
        if (filled == Vector::kWidth) {
          Vector::store(sum, Vector::add(Vector::load(sum), sum_lanes(batch)));
          sum += Vector::kWidth;
          filled = 0;
        }
      }
    }
    if (filled) {
      for (int v = filled; v < Vector::kWidth; ++v) batch[v] = Vector::zero();
      alignas(64) float rest[Vector::kWidth];
      Vector::store(rest, sum_lanes(batch));
      for (int v = 0; v < filled; ++v) sum[v] += rest[v];
    }
  }
}

inline void transpose_in_groups(Vector::Type* v) {
  const Vector::Type ab_lo = Vector::unpack_lo(v[0], v[1]), ab_hi = Vector::unpack_hi(v[0], v[1]);
  const Vector::Type cd_lo = Vector::unpack_lo(v[2], v[3]), cd_hi = Vector::unpack_hi(v[2], v[3]);
  v[0] = Vector::unpack_lo_pair(ab_lo, cd_lo);
  v[1] = Vector::unpack_hi_pair(ab_lo, cd_lo);
  v[2] = Vector::unpack_lo_pair(ab_hi, cd_hi);
  v[3] = Vector::unpack_hi_pair(ab_hi, cd_hi);
}

// Transposes kWidth vectors: in groups of four lanes, then the groups.
inline void transpose(Vector::Type* v) {
  constexpr int groups = Vector::kWidth / 4;
  for (int g = 0; g < groups; ++g) transpose_in_groups(v + 4 * g);
  for (int i = 0; i < 4; ++i) {
    Vector::Type across[groups];
    for (int g = 0; g < groups; ++g) across[g] = v[4 * g + i];
    Vector::transpose_groups(across);
    for (int g = 0; g < groups; ++g) v[4 * g + i] = across[g];
  }
}

// Whole vectors of an image at a time: images often lie a multiple of 4 KiB apart, all in the same cache set, so a line
// that is touched once in passing and needed again would be gone.
template <typename E>
void load(const E* images, int64_t image_stride, int valid, float* lines, int64_t line_step, int64_t count) {
  Vector::Type v[Vector::kWidth];
  for (int64_t c = 0; c < count; c += Vector::kWidth) {
    const int there = count - c < Vector::kWidth ? static_cast<int>(count - c) : Vector::kWidth;
    for (int lane = 0; lane < kLanes; lane += Vector::kWidth) {
      const E* image = images + lane * image_stride + c;
      if (valid - lane >= Vector::kWidth && there == Vector::kWidth) {
        for (int i = 0; i < Vector::kWidth; ++i) v[i] = Vector::load(image + i * image_stride);
      } else {
        for (int i = 0; i < Vector::kWidth; ++i)
          v[i] = lane + i < valid ? Vector::load_first(image + i * image_stride, there) : Vector::zero();
      }
      transpose(v);
      for (int i = 0; i < there; ++i) Vector::store(lines + (c + i) * line_step + lane, v[i]);
    }
  }
}

template <typename E>
void store(const float* lines, int64_t line_step, E* images, int64_t image_stride, int valid, int64_t count) {
  Vector::Type v[Vector::kWidth];
  for (int64_t c = 0; c < count; c += Vector::kWidth) {
    const int there = count - c < Vector::kWidth ? static_cast<int>(count - c) : Vector::kWidth;
    for (int lane = 0; lane < kLanes; lane += Vector::kWidth) {
      for (int i = 0; i < Vector::kWidth; ++i)
        v[i] = i < there ? Vector::load(lines + (c + i) * line_step + lane) : Vector::zero();
      transpose(v);
      E* image = images + lane * image_stride + c;
      if (valid - lane >= Vector::kWidth && there == Vector::kWidth) {
        for (int i = 0; i < Vector::kWidth; ++i) Vector::store(image + i * image_stride, v[i]);
      } else {
        for (int i = 0; i < Vector::kWidth && lane + i < valid; ++i)
          Vector::store_first(image + i * image_stride, v[i], there);
      }
    }
  }
}

template <typename From, typename To>
void copy(const From* from, int64_t from_plane, int64_t from_step, To* to, int64_t to_plane, int64_t to_step,
          int64_t planes, int64_t count) {
  for (int64_t p = 0; p < planes; ++p, to += to_plane) {
    if (from) {
      for (int64_t x = 0; x < count; ++x)
        for (int lane = 0; lane < kLanes; lane += Vector::kWidth)
          Vector::store(to + x * to_step + lane, Vector::load(from + x * from_step + lane));
      from += from_plane;
    } else {
      for (int64_t x = 0; x < count; ++x)
        for (int lane = 0; lane < kLanes; lane += Vector::kWidth) Vector::store(to + x * to_step + lane, Vector::zero());
    }
  }
}

template <typename From, typename To>
void copy_rows(const From* from, int64_t from_row, To* to, int64_t to_row, int64_t rows, int64_t count) {
  for (; rows > 0; --rows, from += from_row, to += to_row) {
    int64_t x = 0;
    for (; x + Vector::kWidth <= count; x += Vector::kWidth) Vector::store(to + x, Vector::load(from + x));
    const int rest = static_cast<int>(count - x);
    if (rest) Vector::store_first(to + x, Vector::load_first(from + x, rest), rest);
  }
}

template <typename E>
void pack_affine(const E* from, int64_t from_plane, int64_t from_step, float* to, int64_t to_plane,
                 int64_t to_step, int64_t planes, int64_t count, const float* scale, const float* shift, bool relu) {
  for (int64_t p = 0; p < planes; ++p, to += to_plane, from += from_plane) {
    const Vector::Type a = Vector::broadcast(scale[p]), b = Vector::broadcast(shift[p]);
    for (int64_t x = 0; x < count; ++x) {
      for (int lane = 0; lane < kLanes; lane += Vector::kWidth) {
        const Vector::Type y = Vector::fma(a, Vector::load(from + x * from_step + lane), b);
        Vector::store(to + x * to_step + lane, relu ? Vector::max(Vector::zero(), y) : y);
      }
    }
  }
}

// float32 sums of this many lines at most go into one double: long sums in float32 lose digits.
constexpr int64_t kFlush = 128;

inline double add_up(Vector::Type v) {
  alignas(64) float lanes[Vector::kWidth];
  Vector::store(lanes, v);
  double sum = 0;
  for (int i = 0; i < Vector::kWidth; ++i) sum += lanes[i];
  return sum;
}

template <typename E>
void moments(const E* lines, int64_t count, int valid, double* mean, double* squares) {
  double all = 0, all_mean = 0, all_squares = 0;  // of the chunks so far; joined as in Chan et al. (1983)
  for (int64_t begin = 0; begin < count; begin += kFlush) {
    const int64_t end = begin + kFlush < count ? begin + kFlush : count;
    double sum = 0, distance = 0;
    for (int lane = 0; lane < valid; lane += Vector::kWidth) {
      Vector::Type s = Vector::zero();
      for (int64_t i = begin; i < end; ++i) s = Vector::add(s, Vector::load(lines + i * kLanes + lane));
      sum += add_up(Vector::keep_first(s, valid - lane));
    }
    const double n = static_cast<double>((end - begin) * valid), chunk_mean = sum / n;
    const Vector::Type center = Vector::broadcast(static_cast<float>(-chunk_mean));
    for (int lane = 0; lane < valid; lane += Vector::kWidth) {
      Vector::Type s = Vector::zero();
      for (int64_t i = begin; i < end; ++i) {
        const Vector::Type d = Vector::add(Vector::load(lines + i * kLanes + lane), center);
        s = Vector::fma(d, d, s);
      }
      distance += add_up(Vector::keep_first(s, valid - lane));
    }
    const double delta = chunk_mean - all_mean;
    all_squares += distance + delta * delta * all * n / (all + n);
    all_mean += delta * n / (all + n);
    all += n;
  }
  *mean = all_mean;
  *squares = all_squares;
}

template <typename E>
void normalize(const E* lines, const E* residual, float scale, float shift, bool relu, E* out, int64_t count) {
  const Vector::Type a = Vector::broadcast(scale), b = Vector::broadcast(shift), zero = Vector::zero();
  for (int64_t i = 0; i < count * kLanes; i += Vector::kWidth) {
    Vector::Type y = Vector::fma(a, Vector::load(lines + i), b);
    if (residual) y = Vector::add(y, Vector::load(residual + i));
    Vector::store(out + i, relu ? Vector::max(zero, y) : y);
  }
}

template <typename E>
Vector::Type before_activation(const E* grad, const E* lines, const E* activation, const NormalizeTerms& t) {
  const Vector::Type g = Vector::load(grad);
  if (!t.relu) return g;
  const Vector::Type y = activation ? Vector::load(activation)
                                    : Vector::fma(Vector::broadcast(t.scale), Vector::load(lines), Vector::broadcast(t.shift));
  return Vector::where_passing(y, g);
}

template <typename E>
void normalize_sums(const E* grad, const E* lines, const E* activation, NormalizeTerms t, int64_t count, int valid,
                    double* sum, double* products) {
  *sum = *products = 0;
  const Vector::Type center = Vector::broadcast(-t.mean);
  for (int64_t begin = 0; begin < count; begin += kFlush) {
    const int64_t end = begin + kFlush < count ? begin + kFlush : count;
    for (int lane = 0; lane < valid; lane += Vector::kWidth) {
      Vector::Type s = Vector::zero(), p = Vector::zero();
      for (int64_t i = begin * kLanes + lane; i < end * kLanes; i += kLanes) {
        const Vector::Type g = before_activation(grad + i, lines + i, activation ? activation + i : nullptr, t);
        s = Vector::add(s, g);
        p = Vector::fma(g, Vector::add(Vector::load(lines + i), center), p);
      }
      *sum += add_up(Vector::keep_first(s, valid - lane));
      *products += add_up(Vector::keep_first(p, valid - lane));
    }
  }
}

template <typename E>
void normalize_grad(const E* grad, const E* lines, const E* activation, NormalizeTerms t, int64_t count, int valid,
                    E* grad_lines, E* before) {
  const Vector::Type a = Vector::broadcast(t.a), b = Vector::broadcast(t.b), c = Vector::broadcast(t.c);
  const Vector::Type center = Vector::broadcast(-t.mean);
  const bool of_statistics = t.b != 0 || t.c != 0;  // else nothing of the maps may enter: 0 times inf is NaN
  for (int64_t i = 0; i < count * kLanes; i += Vector::kWidth) {
    Vector::Type g = before_activation(grad + i, lines + i, activation ? activation + i : nullptr, t);
    Vector::Type d = Vector::mul(a, g);
    if (of_statistics) d = Vector::fma(a, g, Vector::fma(b, Vector::add(Vector::load(lines + i), center), c));
    if (valid < kLanes) {
      const int here = valid - static_cast<int>(i % kLanes);
      g = Vector::keep_first(g, here);
      d = Vector::keep_first(d, here);
    }
    if (before) Vector::store(before + i, g);
    Vector::store(grad_lines + i, d);
  }
}

// The part [begin, end) of a kernel's taps that meets the map at `start`.
inline void inside(int64_t start, int64_t size, int64_t taps, int64_t dilation, int64_t* begin, int64_t* end) {
  *begin = 0;
  *end = taps;
  while (*begin < *end && start + *begin * dilation < 0) ++*begin;
  while (*end > *begin && start + (*end - 1) * dilation >= size) --*end;
}

template <typename E>
void max_pool(const PoolShape& s, const E* in, E* out) {
  for (int64_t y = 0; y < s.out_height; ++y) {
    int64_t row_begin, row_end, col_begin, col_end;
    const int64_t top = y * s.stride_h - s.padding_h;
    inside(top, s.height, s.kernel_h, s.dilation_h, &row_begin, &row_end);
    for (int64_t x = 0; x < s.out_width; ++x, out += kLanes) {
      const int64_t left = x * s.stride_w - s.padding_w;
      inside(left, s.width, s.kernel_w, s.dilation_w, &col_begin, &col_end);
      for (int lane = 0; lane < kLanes; lane += Vector::kWidth) {
        Vector::Type most = Vector::broadcast(-__builtin_inff());
        for (int64_t r = row_begin; r < row_end; ++r)
          for (int64_t c = col_begin; c < col_end; ++c)
            most = Vector::max_or_nan(
                most, Vector::load(in + ((top + r * s.dilation_h) * s.width + left + c * s.dilation_w) * kLanes + lane));
        Vector::store(out + lane, most);
      }
    }
  }
}

template <typename E>
void max_pool_grad(const PoolShape& s, const E* in, const E* out, const E* grad_out, E* grad_in) {
  for (int64_t i = 0; i < s.height * s.width * kLanes; i += Vector::kWidth) Vector::store(grad_in + i, Vector::zero());
  for (int64_t y = 0; y < s.out_height; ++y) {
    int64_t row_begin, row_end, col_begin, col_end;
    const int64_t top = y * s.stride_h - s.padding_h;
    inside(top, s.height, s.kernel_h, s.dilation_h, &row_begin, &row_end);
    for (int64_t x = 0; x < s.out_width; ++x, out += kLanes, grad_out += kLanes) {
      const int64_t left = x * s.stride_w - s.padding_w;
      inside(left, s.width, s.kernel_w, s.dilation_w, &col_begin, &col_end);
      for (int lane = 0; lane < kLanes; lane += Vector::kWidth) {
        const Vector::Type most = Vector::load(out + lane);
        Vector::Type rest = Vector::load(grad_out + lane);  // of lanes whose maximum has not been found yet
        for (int64_t r = row_begin; r < row_end; ++r) {
          for (int64_t c = col_begin; c < col_end; ++c) {
            const int64_t at = ((top + r * s.dilation_h) * s.width + left + c * s.dilation_w) * kLanes + lane;
            const Vector::Type found = Vector::where_equal(Vector::load(in + at), most, rest);
            Vector::store(grad_in + at, Vector::add(Vector::load(grad_in + at), found));
            rest = Vector::where_different(Vector::load(in + at), most, rest);
          }
        }
      }
    }
  }
}

template <int R, int L>
constexpr void add_tile(LineKernels& table) {
  if constexpr (R * L <= kMaxTile) {
    table.forward[R][L] = forward<R, L>;
    table.weight_grad[R][L] = weight_grad<R, L>;
  }
}

template <int L>
constexpr void add_tiles(LineKernels& table) {
  add_tile<1, L>(table);
  add_tile<2, L>(table);
  add_tile<3, L>(table);
  add_tile<4, L>(table);
}

template <typename E>
constexpr MapKernels<E> map_kernels() {
  return {load<E>,           store<E>,       copy<E, float>, copy<float, E>, copy_rows<E, float>,
          copy_rows<float, E>, pack_affine<E>, moments<E>,     normalize<E>,   normalize_sums<E>,
          normalize_grad<E>,   max_pool<E>,    max_pool_grad<E>};
}

LineKernels make_table() {
  LineKernels table{};
  table.float32 = map_kernels<float>();
  table.bfloat16 = map_kernels<Bfloat16>();
  table.max_tile = kMaxTile;
  add_tiles<1>(table);
  add_tiles<2>(table);
  add_tiles<3>(table);
  add_tiles<4>(table);
  add_tiles<5>(table);
  add_tiles<6>(table);
  add_tiles<7>(table);
  add_tiles<8>(table);
  add_tile<1, 9>(table);
  add_tile<1, 10>(table);
  add_tile<1, 11>(table);
  add_tile<1, 12>(table);
  add_tile<1, 13>(table);
  add_tile<1, 14>(table);
  add_tile<1, 15>(table);
  add_tile<1, 16>(table);
  return table;
}
