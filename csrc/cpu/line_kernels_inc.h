// Bodies of line_kernels.h, included once for each instruction set inside a namespace of its own, after a struct
// `Vector` with: Type, kWidth (lanes: 4, 8 or 16), load, store, zero, broadcast, fma, add, and on each group of four
// lanes unpack_lo/hi (32 bits) and unpack_lo/hi_pair (64 bits); `fold`, which adds up the groups of kWidth / 4 vectors
// into one; `transpose_groups`, of kWidth / 4 vectors; load_groups and store_groups, four floats to or from each of kWidth / 4 addresses.
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
void load(const float* images, int64_t image_stride, int valid, float* lines, int64_t line_step, int64_t count) {
  Vector::Type v[Vector::kWidth];
  for (int64_t c = 0; c < count; c += Vector::kWidth) {
    const int there = count - c < Vector::kWidth ? static_cast<int>(count - c) : Vector::kWidth;
    for (int lane = 0; lane < kLanes; lane += Vector::kWidth) {
      const float* image = images + lane * image_stride + c;
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

void store(const float* lines, int64_t line_step, float* images, int64_t image_stride, int valid, int64_t count) {
  Vector::Type v[Vector::kWidth];
  for (int64_t c = 0; c < count; c += Vector::kWidth) {
    const int there = count - c < Vector::kWidth ? static_cast<int>(count - c) : Vector::kWidth;
    for (int lane = 0; lane < kLanes; lane += Vector::kWidth) {
      for (int i = 0; i < Vector::kWidth; ++i)
        v[i] = i < there ? Vector::load(lines + (c + i) * line_step + lane) : Vector::zero();
      transpose(v);
      float* image = images + lane * image_stride + c;
      if (valid - lane >= Vector::kWidth && there == Vector::kWidth) {
        for (int i = 0; i < Vector::kWidth; ++i) Vector::store(image + i * image_stride, v[i]);
      } else {
        for (int i = 0; i < Vector::kWidth && lane + i < valid; ++i)
          Vector::store_first(image + i * image_stride, v[i], there);
      }
    }
  }
}

void copy(const float* from, int64_t from_plane, int64_t from_step, float* to, int64_t to_plane, int64_t to_step,
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

template <int R, int L>
constexpr void add_tile(LineKernels& table) {
  if constexpr (R * L <= Vector::kMaxTile) {
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

LineKernels make_table() {
  LineKernels table{};
  table.load = load;
  table.store = store;
  table.copy = copy;
  table.max_tile = Vector::kMaxTile;
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
