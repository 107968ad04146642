// The inner loops, one table of function pointers for each instruction set.
//
// A *line* is 16 float32 of one pixel and channel: 16 images of the batch side by side. Every multiply-add of a sparse
// convolution is then `line += weight * line`, whatever the position of the weight, and strides, padding and dilation
// are only a matter of which line. A *tile* is R rows of L lines, held in registers.
//
// Maps may be stored as bfloat16, in half the memory; all arithmetic, and what is packed for it, is float32.
#pragma once

#include <cstdint>
#include <type_traits>

#include "bfloat16.h"
#include "isa.h"

namespace sparsebilevel {

constexpr int kLanes = 16;
constexpr int kMaxTileRows = 4;
constexpr int kMaxTileLines = 16;  // in one row of a tile

// The non-zeros entry[begin..end) of one output plane.
struct EntryRow {
  int32_t out;
  uint32_t begin, end;
};

// A patch of packed input lines; an offset (bytes) leads from `lines` to the first line that a non-zero touches in it,
// the second row of the tile begins `pitch` bytes further.
struct Patch {
  const float* lines;
  int64_t pitch;
};

// Where tiles of output lines lie: tile of plane o at lines + o * plane, its rows `pitch` apart (in floats).
struct Tile {
  float* lines;
  int64_t plane, pitch;
};

// Of one channel: activation = scale * line + shift; mean of the lines; a, b, c of the gradient.
struct NormalizeTerms {
  float scale, shift, mean, a, b, c;
  bool relu;
};

// Pooling of maps of height x width; padding counts as minus infinity.
struct PoolShape {
  int64_t height, width, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

// What reads and writes maps of elements E. Steps and strides are in elements.
template <typename E>
struct MapKernels {
  // `count` packed lines of `valid` images <-> `count` consecutive elements of each image, images `image_stride` apart.
  // Lanes of missing images are written as zero, and are not stored.
  void (*load)(const E* images, int64_t image_stride, int valid, float* packed, int64_t line_step, int64_t count);
  void (*store)(const float* packed, int64_t line_step, E* images, int64_t image_stride, int valid, int64_t count);

  // planes x count lines, into packed ones and out of them; `from` null writes zeros. Steps between planes and between
  // lines.
  void (*pack)(const E* from, int64_t from_plane, int64_t from_step, float* to, int64_t to_plane, int64_t to_step,
               int64_t planes, int64_t count);
  void (*unpack)(const float* from, int64_t from_plane, int64_t from_step, E* to, int64_t to_plane, int64_t to_step,
                 int64_t planes, int64_t count);

  // `rows` x `count` elements, rows so many elements apart.
  void (*pack_rows)(const E* from, int64_t from_row, float* to, int64_t to_row, int64_t rows, int64_t count);
  void (*unpack_rows)(const float* from, int64_t from_row, E* to, int64_t to_row, int64_t rows, int64_t count);

  // As pack, of scale[p] * line + shift[p], with `relu` no less than zero.
  void (*pack_affine)(const E* from, int64_t from_plane, int64_t from_step, float* to, int64_t to_plane,
                      int64_t to_step, int64_t planes, int64_t count, const float* scale, const float* shift,
                      bool relu);

  // Batch normalization, `count` lines of one channel, lanes of missing images left out of every sum.
  // Mean of the values and sum of their squared distances from it.
  void (*moments)(const E* lines, int64_t count, int valid, double* mean, double* squares);
  // out = scale * lines + shift (+ residual), with `relu` no less than zero.
  void (*normalize)(const E* lines, const E* residual, float scale, float shift, bool relu, E* out, int64_t count);
  // The gradient before the activation is grad, or with `relu` grad where the activation is positive: `activation`,
  // or scale * lines + shift if that is null. Its sum, and that of its products with lines - mean.
  void (*normalize_sums)(const E* grad, const E* lines, const E* activation, NormalizeTerms terms, int64_t count,
                         int valid, double* sum, double* products);
  // grad_lines = a * <that gradient> + b * (lines - mean) + c, lanes of missing images zero; may be `grad` itself.
  // `before`, if not null, receives the gradient before the activation.
  void (*normalize_grad)(const E* grad, const E* lines, const E* activation, NormalizeTerms terms, int64_t count,
                         int valid, E* grad_lines, E* before);

  // Of one plane. The gradient goes to the first of equal maxima; grad_in is written whole.
  void (*max_pool)(const PoolShape& shape, const E* in, E* out);
  void (*max_pool_grad)(const PoolShape& shape, const E* in, const E* out, const E* grad_out, E* grad_in);
};

struct LineKernels {
  // out[o] (+)= sum over the row's entries of value * patch. With `first` the tile starts from bias[o] (0 without
  // bias), else from what it holds.
  using Forward = void (*)(const int32_t* offsets, const float* values, const EntryRow* row, const EntryRow* last,
                           Patch patch, Tile out, const float* bias, bool first);
  // sums[entry] += <patch of the entry, tile of its row's plane>, for the entries of rows [row, last).
  using WeightGrad = void (*)(const int32_t* offsets, const EntryRow* row, const EntryRow* last, Patch patch,
                              Tile grad, float* sums);

  int max_tile;  // lines of a tile that registers hold
  Forward forward[kMaxTileRows + 1][kMaxTileLines + 1];
  WeightGrad weight_grad[kMaxTileRows + 1][kMaxTileLines + 1];

  MapKernels<float> float32;
  MapKernels<Bfloat16> bfloat16;

  template <typename E>
  const MapKernels<E>& of() const {
    if constexpr (std::is_same_v<E, float>)
      return float32;
    else
      return bfloat16;
  }
};

const LineKernels& line_kernels_scalar();
#ifdef SPARSEBILEVEL_X86
const LineKernels& line_kernels_avx2();
const LineKernels& line_kernels_avx512();
#endif

// Those of isa().
inline const LineKernels& line_kernels() {
#ifdef SPARSEBILEVEL_X86
  if (isa() == Isa::avx512) return line_kernels_avx512();
  if (isa() == Isa::avx2) return line_kernels_avx2();
#endif
  return line_kernels_scalar();
}

}  // namespace sparsebilevel
