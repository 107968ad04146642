// Sparse 2-D convolution: forward, input gradient, and weight gradient at chosen positions. A linear layer is a 1x1
// convolution on 1x1 maps.
#pragma once

#include <cstdint>
#include <vector>

#include "line_kernels.h"

namespace sparsebilevel {

// Of the convolution itself; the weight is [out_channels, channels / groups, kernel_h, kernel_w] with these strides.
struct ConvShape {
  int64_t channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t groups;
  int64_t weight_strides[4];
};

// A batch of feature maps: ordinary strides (in elements), or, with `lines`, contiguous [ceil(images / 16), C, H, W, 16].
// Lines can be read through the normalization before the convolution: as scale[c] * x + shift[c], with `relu` no less
// than zero. That saves one pass over the maps, and keeping them for the backward pass.
struct Maps {
  void* data;
  int64_t images;
  int64_t stride_n, stride_c, stride_h, stride_w;
  bool lines;
  const float* scale = nullptr;
  const float* shift = nullptr;
  bool relu = false;
  Element element = Element::float32;
};

// What a plan is for: maps in lines, some of them at least; or ordinary tensors alone, pixels or planes being together
// in memory (channels_last, NCHW). It only helps to choose.
enum class MapsLayout { lines, pixels, planes };

// How the work is cut up. `choose_tiling` gives one; what it holds changes results by rounding at most, and the time.
struct Tiling {
  int tile_rows;         // pixels of a register tile: rows ...
  int tile_cols;         // ... and columns,
  int tile_blocks;       // of this many blocks of images (more than one on small maps)
  int strip_rows;        // pixel rows that are worked through before the next columns
  int planes_per_block;  // input planes packed together, so that what one tile reads stays in the L1 cache
  // Of a block of images: 16, side by side in lines; or 1, whose lines are 16 pixels side by side, for batches that
  // would leave most lanes empty. The maps must be ordinary tensors then, and a tile is a whole strip.
  int block_images = kLanes;
};

// Everything about one mask (or set of learning positions) and one pass that does not change from step to step.
// Immutable, so that several threads may run the same plan.
class ConvPlan {
 public:
  // positions [count]: flat row-major positions in the weight; negative ones are padding. `input_gradient` plans the
  // transposed convolution, from the output's gradient to the input's.
  ConvPlan(const ConvShape& shape, bool input_gradient, const int64_t* positions, int64_t count, int64_t images,
           MapsLayout layout);
  // With a tiling of the caller's own.
  ConvPlan(const ConvShape& shape, bool input_gradient, const int64_t* positions, int64_t count, Tiling tiling);

  // out = bias + sum of weight[position] * in, or with `accumulate` out += that sum, without bias.
  // weight: the dense weight, of `element`, with the strides of the shape; bias: [out_channels] or null, for a plan of
  // the forward pass.
  void forward(const void* weight, Element element, const Maps& in, const Maps& out, const float* bias,
               bool accumulate, int threads) const;

  // grads[i] = dloss/dweight[positions[i]], float32, 0 at padding; or, with `scatter`, written to the places of the
  // positions in a tensor of `element` with the weight's strides, and nowhere else. For a plan of the forward pass. The
  // sums are formed in an order that does not depend on `threads`.
  void weight_grad(const Maps& in, const Maps& grad_out, void* grads, Element element, bool scatter,
                   int threads) const;

  const Tiling& tiling() const { return tiling_; }
  bool has_pixel_lanes() const { return tiling_.block_images == 1; }
  int64_t non_zeros() const { return static_cast<int64_t>(offsets_.size()); }

 private:
  struct Phase {
    int64_t row, col;
  };
  // One side of the convolution as planes on a common grid: plane (phase, channel) holds every step-th pixel of the
  // channel from `phase` on. Strides so become shifts, of the input in the forward pass, of the output in the gradient.
  struct Side {
    int64_t channels, height, width, step_h, step_w;
    std::vector<Phase> phases;
    int64_t planes() const { return channels * static_cast<int64_t>(phases.size()); }
  };
  struct PlaneBlock {
    int64_t first, count;        // planes
    int64_t row_begin, row_end;  // into rows_
  };
  struct Window;

  void build(const ConvShape& shape, bool input_gradient, const int64_t* positions, int64_t count, int64_t images,
             MapsLayout layout, const Tiling* tiling);
  void check(const Maps& a, const Maps& b) const;
  template <typename E>
  void pack(const Maps& maps, const Side& side, int64_t plane, int64_t count, const Window& window, float* lines,
            int64_t line_plane, int64_t line_row) const;
  template <typename E>
  void unpack(const Maps& maps, const Side& side, int64_t plane, int64_t count, const Window& window,
              const float* lines, int64_t line_plane, int64_t line_row) const;
  template <bool kPack, typename E, typename Float>
  void move_pixels(const Maps& maps, const Side& side, int64_t plane, int64_t count, const Window& window,
                   Float* lines, int64_t line_plane, int64_t line_image) const;
  template <typename Table>
  auto kernel(const Table& table, const Window& strip, int64_t rows) const;
  int64_t chunk_rows(int64_t strips, int threads) const;
  int64_t count_strips(int64_t images) const;
  Window strip(int64_t index, int64_t images) const;
  bool is_direct(const Maps& maps) const;
  template <typename Visit>
  void for_each_phase(int64_t first, int64_t last, Visit visit) const;
  template <typename Visit>
  void for_each_tile(const Maps& in, const Maps& maps, const PlaneBlock& block, const Window& strip, int64_t first,
                     int64_t last, float* patch, float* sums, Visit visit) const;

  Tiling tiling_;
  Side in_, out_;
  int64_t grid_h_, grid_w_;
  int64_t min_row_shift_, max_row_shift_, min_col_shift_, max_col_shift_;
  int64_t pitch_ = 0;                // with lanes of pixels: pixels of a packed row, those of the halo included
  int64_t patch_row_, patch_plane_;  // lines of a packed patch, from tile row to tile row and from plane to plane,
  int64_t strip_row_, strip_plane_;  // and of a strip of output
  int64_t most_planes_ = 0;          // of a block
  int64_t count_;
  std::vector<PlaneBlock> blocks_;
  std::vector<EntryRow> rows_;
  std::vector<int32_t> offsets_;   // bytes from a patch's first line; in the order in which kernels read
  std::vector<uint32_t> places_;   // in the weight's memory
  std::vector<uint32_t> sources_;  // in the list of positions given
};

}  // namespace sparsebilevel
