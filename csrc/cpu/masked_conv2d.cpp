// The convolution is cut into strips: a few pixel rows, at most eight columns wide, of one block of 16 images. For a
// strip, the input planes are taken block by block; of each block, the lines that the next tile needs are packed into a
// small buffer (with zeros beyond the edge), where every kernel tap is at a fixed offset, and all output planes are
// updated from there: while a tile is worked on, its patch stays in the L1 cache. Packing also is the conversion: it
// reads ordinary tensors, transposing on the way.
//
// A small batch would leave most of the 16 lanes empty. There the lanes are pixels: a strip of one image is packed as a
// flat sequence, row after row with the halo between them, so that a kernel tap still is at a fixed offset and 16
// consecutive pixels are a line. What falls on the halo is computed and dropped; in the weight gradient it is multiplied
// by zero, so that infinite maps make NaN of gradients that would be finite. A strip is one tile, and a row of the tile
// another image.
#include "masked_conv2d.h"

#include <algorithm>
#include <memory>
#include <new>
#include <stdexcept>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <unistd.h>
#endif

namespace sparsebilevel {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t floor_divide(int64_t a, int64_t b) { return a >= 0 ? a / b : -divide_up(-a, b); }
int64_t odd(int64_t n) { return n | 1; }  // planes an odd number of lines apart do not fall on the same cache sets

struct Caches {
  int64_t l1, l2;
};

const Caches& caches() {
  static const Caches sizes = [] {
    Caches c{0, 0};
#if defined(__linux__) && defined(_SC_LEVEL1_DCACHE_SIZE)
    c.l1 = sysconf(_SC_LEVEL1_DCACHE_SIZE);
    c.l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return Caches{c.l1 > 0 ? c.l1 : 32 << 10, c.l2 > 0 ? c.l2 : 512 << 10};
  }();
  return sizes;
}

// Memory of one thread, reused from call to call.
class Scratch {
 public:
  float* floats(int64_t count) {
    if (count > size_) {
      data_.reset();
      data_.reset(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t{64})));
      size_ = count;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

thread_local Scratch patch_scratch, strip_scratch, entry_scratch;

float load_element(const void* data, Element element, int64_t at) {
  return with_element(element, [&](auto e) { return to_float(static_cast<const decltype(e)*>(data)[at]); });
}

void store_element(void* data, Element element, int64_t at, float value) {
  with_element(element, [&](auto e) { assign(static_cast<decltype(e)*>(data)[at], value); });
}

// Where a kernel tap reads: `shift` pixels further in the phase `phase` of a grid that takes every `step`-th pixel.
struct Tap {
  int64_t phase, shift;
};

Tap forward_tap(int64_t tap, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t distance = tap * dilation - padding;
  const int64_t shift = floor_divide(distance, stride);
  return {distance - shift * stride, shift};
}

// The transposed direction: which phase of the input's gradient the tap contributes to, and from which output pixel.
Tap backward_tap(int64_t tap, int64_t stride, int64_t padding, int64_t dilation) {
  const Tap forward = forward_tap(tap, stride, padding, dilation);
  return {forward.phase, -forward.shift};
}

// As many planes as fit into L1, each with `window` lines; more of them if an output plane would find next to nothing to
// do in a block. By sixteens: of ordinary tensors in channels_last, sixteen channels of a pixel are transposed at a time.
int choose_planes(int64_t window, int64_t planes, double entries_per_plane_pair) {
  constexpr int64_t kStep = kLanes, kGoodEntries = 8;
  window *= kLanes * sizeof(float);
  int64_t block = std::max(kStep, (caches().l1 * 13 / 16 / window + kStep / 2) / kStep * kStep);
  const int64_t most = std::max(block, caches().l2 / 2 / window);
  while (block < most && block * entries_per_plane_pair < kGoodEntries) block += kStep;
  return static_cast<int>(std::min(block, std::max<int64_t>(planes, 1)));
}

Tiling choose_tiling(int64_t grid_h, int64_t grid_w, int64_t halo_h, int64_t halo_w, int64_t image_blocks,
                     int64_t planes, double entries_per_plane_pair, int max_tile) {
  constexpr int64_t kWide = 8, kGoodTile = 16;
  Tiling t{};
  t.tile_cols = static_cast<int>(divide_up(grid_w, divide_up(grid_w, kWide)));
  t.tile_blocks = 1;
  if (t.tile_cols <= kWide / 2) {
    const int64_t wanted = grid_h == 1 ? std::min<int64_t>(kMaxTileLines, max_tile) : kWide;
    t.tile_blocks = static_cast<int>(std::clamp<int64_t>(wanted / t.tile_cols, 1, std::max<int64_t>(image_blocks, 1)));
  }
  const int64_t lines = t.tile_cols * t.tile_blocks;
  const int64_t good = std::min<int64_t>(kGoodTile, max_tile);
  t.tile_rows = static_cast<int>(std::clamp<int64_t>(good / lines, 1, std::min<int64_t>(kMaxTileRows, grid_h)));
  const int64_t strip = divide_up(grid_h, divide_up(grid_h, 8));
  t.strip_rows = static_cast<int>(divide_up(strip, t.tile_rows) * t.tile_rows);

  t.planes_per_block = choose_planes((t.tile_rows + halo_h) * (t.tile_cols + halo_w) * t.tile_blocks, planes,
                                     entries_per_plane_pair);
  return t;
}

// Lines of `rows` flat rows; the halo behind the last one is not needed.
int64_t flat_lines(int64_t rows, int64_t cols, int64_t pitch) { return divide_up((rows - 1) * pitch + cols, kLanes); }

// With lanes of pixels. A strip is as many rows as make a tile, and of small maps a tile is several images.
Tiling choose_pixel_tiling(int64_t grid_h, int64_t grid_w, int64_t halo_h, int64_t halo_w, int64_t images,
                           int64_t planes, double entries_per_plane_pair, int max_tile) {
  const int64_t most = std::min(kMaxTileLines, max_tile);
  const auto even = [](int64_t all, int64_t part) { return divide_up(all, divide_up(all, part)); };
  Tiling t{};
  t.block_images = 1;
  t.tile_cols = static_cast<int>(even(grid_w, most * kLanes));
  const int64_t pitch = t.tile_cols + halo_w;
  int64_t rows = 1;
  while (rows < grid_h && flat_lines(rows + 1, t.tile_cols, pitch) <= most) ++rows;
  t.tile_rows = t.strip_rows = static_cast<int>(even(grid_h, rows));
  const int64_t lines = flat_lines(t.strip_rows, t.tile_cols, pitch);
  t.tile_blocks = 1;
  if (lines <= kMaxTileLines / 2 && images > 1)  // so many lines have tiles of several rows
    t.tile_blocks = static_cast<int>(even(images, std::clamp<int64_t>(max_tile / lines, 1, kMaxTileRows)));
  t.planes_per_block = choose_planes(divide_up((t.strip_rows + halo_h) * pitch, kLanes) * t.tile_blocks, planes,
                                     entries_per_plane_pair);
  return t;
}

// How fast one way is beside the other: the part of the lanes that hold something, times what was measured. Lines of
// pixels begin anywhere in a cache line if there is a halo, so that most are two to load; NCHW maps are made lines of
// images and back as a whole.
double image_speed(int64_t images, MapsLayout layout) {
  constexpr double kPlanes = 0.7;
  const double used = static_cast<double>(images) / static_cast<double>(divide_up(images, kLanes) * kLanes);
  return layout == MapsLayout::planes ? used * kPlanes : used;
}

double pixel_speed(const Tiling& t, int64_t grid_h, int64_t grid_w, int64_t halo_h, int64_t halo_w) {
  constexpr double kUnaligned = 0.87;
  const int64_t strips = divide_up(grid_h, t.strip_rows) * divide_up(grid_w, t.tile_cols);
  const int64_t lines = strips * flat_lines(t.strip_rows, t.tile_cols, t.tile_cols + halo_w);
  const double used = static_cast<double>(grid_h * grid_w) / static_cast<double>(lines * kLanes);
  return halo_h + halo_w > 0 ? used * kUnaligned : used;
}

}  // namespace

// A rectangle of grid pixels, of blocks of images [block, block + blocks).
struct ConvPlan::Window {
  int64_t row_begin, row_end, col_begin, col_end, block, blocks;
};

ConvPlan::ConvPlan(const ConvShape& shape, bool input_gradient, const int64_t* positions, int64_t count,
                   int64_t images, MapsLayout layout) {
  build(shape, input_gradient, positions, count, images, layout, nullptr);
}

ConvPlan::ConvPlan(const ConvShape& shape, bool input_gradient, const int64_t* positions, int64_t count,
                   Tiling tiling) {
  build(shape, input_gradient, positions, count, 0, MapsLayout::lines, &tiling);
}

void ConvPlan::build(const ConvShape& s, bool input_gradient, const int64_t* positions, int64_t count, int64_t images,
                     MapsLayout layout, const Tiling* tiling) {
  if (s.groups < 1 || s.channels % s.groups || s.out_channels % s.groups)
    throw std::invalid_argument("groups that do not divide the channels");
  const int64_t group_in = s.channels / s.groups, group_out = s.out_channels / s.groups;
  const int64_t taps = s.kernel_h * s.kernel_w, fan_in = group_in * taps;
  if (s.out_channels * fan_in > UINT32_MAX) throw std::length_error("a weight of more than 2^32 elements");
  count_ = count;

  // The two sides and the phases on the strided one.
  Side input{s.channels, s.height, s.width, 1, 1, {{0, 0}}}, output{s.out_channels, s.out_height, s.out_width, 1, 1, {{0, 0}}};
  input.step_h = s.stride_h;
  input.step_w = s.stride_w;
  const int64_t all_phases = s.stride_h * s.stride_w;
  std::vector<int64_t> phase_of(all_phases, -1);  // index into input.phases
  const auto tap_of = input_gradient ? backward_tap : forward_tap;
  std::vector<Tap> row_taps(s.kernel_h), col_taps(s.kernel_w);
  for (int64_t r = 0; r < s.kernel_h; ++r) row_taps[r] = tap_of(r, s.stride_h, s.padding_h, s.dilation_h);
  for (int64_t c = 0; c < s.kernel_w; ++c) col_taps[c] = tap_of(c, s.stride_w, s.padding_w, s.dilation_w);
  std::vector<bool> used(all_phases, input_gradient);  // a gradient is written (as zero) where no tap leads, too
  for (const Tap& row : row_taps)
    for (const Tap& col : col_taps) used[row.phase * s.stride_w + col.phase] = true;
  input.phases.clear();
  for (int64_t p = 0; p < all_phases; ++p) {
    if (!used[p]) continue;
    phase_of[p] = static_cast<int64_t>(input.phases.size());
    input.phases.push_back({p / s.stride_w, p % s.stride_w});
  }
  in_ = input_gradient ? output : input;
  out_ = input_gradient ? input : output;
  grid_h_ = divide_up(out_.height, out_.step_h);
  grid_w_ = divide_up(out_.width, out_.step_w);
  const auto by_shift = [](const Tap& a, const Tap& b) { return a.shift < b.shift; };
  const auto [low_row, high_row] = std::minmax_element(row_taps.begin(), row_taps.end(), by_shift);
  const auto [low_col, high_col] = std::minmax_element(col_taps.begin(), col_taps.end(), by_shift);
  min_row_shift_ = low_row->shift;
  max_row_shift_ = high_row->shift;
  min_col_shift_ = low_col->shift;
  max_col_shift_ = high_col->shift;
  const int64_t halo_h = max_row_shift_ - min_row_shift_, halo_w = max_col_shift_ - min_col_shift_;

  int64_t real = 0;
  for (int64_t i = 0; i < count; ++i) real += positions[i] >= 0;
  const double pairs = static_cast<double>(in_.planes()) * static_cast<double>(out_.planes()) / s.groups;
  const double per_pair = real / std::max(pairs, 1.0);
  if (tiling) {
    tiling_ = *tiling;
  } else {
    const int max_tile = line_kernels().max_tile;
    tiling_ = choose_tiling(grid_h_, grid_w_, halo_h, halo_w, divide_up(images, kLanes), in_.planes(), per_pair, max_tile);
    if (layout != MapsLayout::lines) {
      const Tiling pixels = choose_pixel_tiling(grid_h_, grid_w_, halo_h, halo_w, images, in_.planes(), per_pair, max_tile);
      if (pixel_speed(pixels, grid_h_, grid_w_, halo_h, halo_w) > image_speed(images, layout)) tiling_ = pixels;
    }
  }

  // Blocks of planes; none spans two phases.
  std::vector<int64_t> block_of(in_.planes());
  for (size_t phase = 0; phase < in_.phases.size(); ++phase) {
    const int64_t parts = divide_up(in_.channels, tiling_.planes_per_block);
    const int64_t size = divide_up(divide_up(in_.channels, parts), kLanes) * kLanes;
    for (int64_t c = 0; c < in_.channels; c += size) {
      const int64_t first = static_cast<int64_t>(phase) * in_.channels + c;
      blocks_.push_back({first, std::min(size, in_.channels - c), 0, 0});
      most_planes_ = std::max(most_planes_, blocks_.back().count);
      for (int64_t p = first; p < first + blocks_.back().count; ++p)
        block_of[p] = static_cast<int64_t>(blocks_.size()) - 1;
    }
  }

  if (has_pixel_lanes()) {
    // One more line each: the last one of a tile reads past the patch, and 16 pixels are transposed at a time.
    pitch_ = tiling_.tile_cols + halo_w;
    patch_row_ = divide_up((tiling_.strip_rows + halo_h) * pitch_, kLanes) + 1;
    strip_row_ = flat_lines(tiling_.strip_rows, tiling_.tile_cols, pitch_) + 1;
    patch_plane_ = odd(tiling_.tile_blocks * patch_row_);
    strip_plane_ = odd(tiling_.tile_blocks * strip_row_);
  } else {
    patch_row_ = (tiling_.tile_cols + halo_w) * tiling_.tile_blocks;
    strip_row_ = int64_t{tiling_.tile_cols} * tiling_.tile_blocks;
    patch_plane_ = odd((tiling_.strip_rows + halo_h) * patch_row_);
    strip_plane_ = odd(tiling_.strip_rows * strip_row_);
  }

  // Counting sort of the positions by (block, output plane); positions that ascend keep their order.
  const int64_t out_planes = out_.planes();
  struct Place {
    int64_t out, in, memory;
    const Tap *row, *col;
  };
  const auto place = [&](int64_t position) {
    const int64_t o = position / fan_in, inner = position % fan_in;
    const int64_t channel = o / group_out * group_in + inner / taps, tap = inner % taps;
    const Tap &row = row_taps[tap / s.kernel_w], &col = col_taps[tap % s.kernel_w];
    const int64_t plane = phase_of[row.phase * s.stride_w + col.phase] * s.channels + channel;
    const int64_t memory = o * s.weight_strides[0] + inner / taps * s.weight_strides[1] +
                           tap / s.kernel_w * s.weight_strides[2] + tap % s.kernel_w * s.weight_strides[3];
    return input_gradient ? Place{plane, o, memory, &row, &col} : Place{o, plane, memory, &row, &col};
  };
  std::vector<uint32_t> starts(blocks_.size() * out_planes + 1, 0);
  for (int64_t i = 0; i < count; ++i) {
    if (positions[i] < 0) continue;
    const Place at = place(positions[i]);
    ++starts[block_of[at.in] * out_planes + at.out + 1];
  }
  for (size_t b = 0; b < blocks_.size(); ++b) {
    blocks_[b].row_begin = static_cast<int64_t>(rows_.size());
    for (int64_t o = 0; o < out_planes; ++o) {
      const size_t bucket = b * out_planes + o;
      const uint32_t begin = starts[bucket], entries = starts[bucket + 1];
      starts[bucket + 1] += begin;
      // The first block starts every sum, so it has a row for every plane.
      if (entries > 0 || b == 0) rows_.push_back({static_cast<int32_t>(o), begin, begin + entries});
    }
    blocks_[b].row_end = static_cast<int64_t>(rows_.size());
  }
  offsets_.resize(real);
  places_.resize(real);
  sources_.resize(real);
  for (int64_t i = 0; i < count; ++i) {
    if (positions[i] < 0) continue;
    const Place at = place(positions[i]);
    const int64_t block = block_of[at.in], k = starts[block * out_planes + at.out]++;
    const int64_t row = at.row->shift - min_row_shift_, col = at.col->shift - min_col_shift_;
    const int64_t within = has_pixel_lanes() ? row * pitch_ + col : (row * patch_row_ + col * tiling_.tile_blocks) * kLanes;
    const int64_t bytes = ((at.in - blocks_[block].first) * patch_plane_ * kLanes + within) * static_cast<int64_t>(sizeof(float));
    if (bytes > INT32_MAX) throw std::length_error("a kernel too large to pack");
    offsets_[k] = static_cast<int32_t>(bytes);
    places_[k] = static_cast<uint32_t>(at.memory);
    sources_[k] = static_cast<uint32_t>(i);
  }
}

// Both ways, for pixels that exist: between the maps and flat sequences [plane][image][row][col]. Images are line_image
// lines apart; up to 15 pixels behind a row are overwritten.
template <bool kPack, typename E, typename Float>
void ConvPlan::move_pixels(const Maps& maps, const Side& side, int64_t plane, int64_t count, const Window& window,
                           Float* lines, int64_t line_plane, int64_t line_image) const {
  const Phase& phase = side.phases[plane / side.channels];
  const MapKernels<E>& kernels = line_kernels().of<E>();
  const int64_t top = std::clamp<int64_t>(0, window.row_begin, window.row_end);
  const int64_t left = std::clamp<int64_t>(0, window.col_begin, window.col_end);
  int64_t rows = std::min(window.row_end, divide_up(side.height - phase.row, side.step_h)) - top;
  int64_t cols = std::min(window.col_end, divide_up(side.width - phase.col, side.step_w)) - left;
  if (rows <= 0 || cols <= 0) return;
  const int64_t step_h = side.step_h * maps.stride_h, step_w = side.step_w * maps.stride_w;
  const int64_t plane_step = line_plane * kLanes;
  if (cols == pitch_ && step_h == cols * step_w) {  // nothing lies between rows, on either side
    cols *= rows;
    rows = 1;
  }
  for (int64_t b = 0; b < window.blocks; ++b) {
    E* map = static_cast<E*>(maps.data) + (window.block + b) * maps.stride_n + plane % side.channels * maps.stride_c +
                 (top * side.step_h + phase.row) * maps.stride_h + (left * side.step_w + phase.col) * maps.stride_w;
    Float* flat = lines + b * line_image * kLanes + (top - window.row_begin) * pitch_ + left - window.col_begin;
    if (maps.stride_c == 1) {
      for (int64_t y = 0; y < rows; ++y) {
        for (int64_t x = 0; x < cols; x += kLanes) {
          const int valid = static_cast<int>(std::min<int64_t>(cols - x, kLanes));
          E* pixels = map + y * step_h + x * step_w;
          if constexpr (kPack)
            kernels.load(pixels, step_w, valid, flat + y * pitch_ + x, plane_step, count);
          else
            kernels.store(flat + y * pitch_ + x, plane_step, pixels, step_w, valid, count);
        }
      }
      continue;
    }
    for (int64_t p = 0; p < count; ++p, map += maps.stride_c, flat += plane_step) {
      if (step_w == 1) {
        if constexpr (kPack)
          kernels.pack_rows(map, step_h, flat, pitch_, rows, cols);
        else
          kernels.unpack_rows(flat, pitch_, map, step_h, rows, cols);
        continue;
      }
      for (int64_t y = 0; y < rows; ++y)
        for (int64_t x = 0; x < cols; ++x) {
          if constexpr (kPack)
            flat[y * pitch_ + x] = to_float(map[y * step_h + x * step_w]);
          else
            assign(map[y * step_h + x * step_w], flat[y * pitch_ + x]);
        }
    }
  }
}

// Packs `window` of planes [plane, plane + count) into lines [plane][row][col][image block].
template <typename E>
void ConvPlan::pack(const Maps& maps, const Side& side, int64_t plane, int64_t count, const Window& window,
                    float* lines, int64_t line_plane, int64_t line_row) const {
  if (has_pixel_lanes()) {
    line_kernels().float32.pack(nullptr, 0, 0, lines, line_plane * kLanes, kLanes, count, tiling_.tile_blocks * line_row);
    return move_pixels<true, E>(maps, side, plane, count, window, lines, line_plane, line_row);
  }
  const Phase& phase = side.phases[plane / side.channels];
  const int64_t channel = plane % side.channels, tile_blocks = tiling_.tile_blocks;
  const MapKernels<E>& kernels = line_kernels().of<E>();
  E* data = static_cast<E*>(maps.data);
  // Columns that exist in the maps: phase.col + x * step in [0, width).
  const int64_t cols = divide_up(side.width - phase.col, side.step_w), rows = divide_up(side.height - phase.row, side.step_h);
  const int64_t left = std::clamp<int64_t>(0, window.col_begin, window.col_end);
  const int64_t right = std::clamp<int64_t>(cols, left, window.col_end);
  for (int64_t y = window.row_begin; y < window.row_end; ++y, lines += line_row * kLanes) {
    const auto clear = [&](int64_t begin, int64_t end) {
      kernels.pack(nullptr, 0, 0, lines + (begin - window.col_begin) * tile_blocks * kLanes, line_plane * kLanes, kLanes,
                   count, (end - begin) * tile_blocks);
    };
    if (y < 0 || y >= rows || left == right) {
      clear(window.col_begin, window.col_end);
      continue;
    }
    if (window.col_begin < left) clear(window.col_begin, left);
    if (right < window.col_end) clear(right, window.col_end);
    for (int64_t b = 0; b < tile_blocks; ++b) {
      const int64_t first_image = (window.block + b) * kLanes;
      const int valid = static_cast<int>(std::clamp<int64_t>(maps.images - first_image, 0, kLanes));
      float* to = lines + ((left - window.col_begin) * tile_blocks + b) * kLanes;
      if (b >= window.blocks || valid == 0) {
        kernels.pack(nullptr, 0, 0, to, line_plane * kLanes, tile_blocks * kLanes, count, right - left);
        continue;
      }
      if (maps.lines) {
        const E* from = data + (((window.block + b) * side.channels + channel) * side.height + y * side.step_h + phase.row) * side.width * kLanes +
                            (left * side.step_w + phase.col) * kLanes;
        const int64_t from_plane = side.height * side.width * kLanes, from_step = side.step_w * kLanes;
        if (maps.scale)
          kernels.pack_affine(from, from_plane, from_step, to, line_plane * kLanes, tile_blocks * kLanes, count,
                              right - left, maps.scale + channel, maps.shift + channel, maps.relu);
        else
          kernels.pack(from, from_plane, from_step, to, line_plane * kLanes, tile_blocks * kLanes, count, right - left);
        continue;
      }
      const int64_t step = side.step_w * maps.stride_w;
      const E* from = data + first_image * maps.stride_n + channel * maps.stride_c +
                          (y * side.step_h + phase.row) * maps.stride_h + (left * side.step_w + phase.col) * maps.stride_w;
      if (maps.stride_c == 1) {
        for (int64_t x = 0; x < right - left; ++x)
          kernels.load(from + x * step, maps.stride_n, valid, to + x * tile_blocks * kLanes, line_plane * kLanes, count);
      } else if (step == 1) {
        for (int64_t p = 0; p < count; ++p)
          kernels.load(from + p * maps.stride_c, maps.stride_n, valid, to + p * line_plane * kLanes, tile_blocks * kLanes,
               right - left);
      } else {
        for (int64_t p = 0; p < count; ++p)
          for (int64_t x = 0; x < right - left; ++x)
            kernels.load(from + p * maps.stride_c + x * step, maps.stride_n, valid,
                 to + (p * line_plane + x * tile_blocks) * kLanes, 0, 1);
      }
    }
  }
}

// The way back, for pixels that exist: from lines [plane][row][col][image block] to the maps.
template <typename E>
void ConvPlan::unpack(const Maps& maps, const Side& side, int64_t plane, int64_t count, const Window& window,
                      const float* lines, int64_t line_plane, int64_t line_row) const {
  if (has_pixel_lanes()) return move_pixels<false, E>(maps, side, plane, count, window, lines, line_plane, line_row);
  const Phase& phase = side.phases[plane / side.channels];
  const int64_t channel = plane % side.channels, tile_blocks = tiling_.tile_blocks;
  const MapKernels<E>& kernels = line_kernels().of<E>();
  E* data = static_cast<E*>(maps.data);
  const int64_t cols = std::min(window.col_end, divide_up(side.width - phase.col, side.step_w)) - window.col_begin;
  const int64_t rows = std::min(window.row_end, divide_up(side.height - phase.row, side.step_h));
  const int64_t step = side.step_w * maps.stride_w;
  for (int64_t y = window.row_begin; y < rows; ++y, lines += line_row * kLanes) {
    for (int64_t b = 0; b < window.blocks; ++b) {
      const int64_t first_image = (window.block + b) * kLanes;
      const int valid = static_cast<int>(std::min<int64_t>(maps.images - first_image, kLanes));
      const float* from = lines + b * kLanes;
      const int64_t map_row = y * side.step_h + phase.row, map_col = window.col_begin * side.step_w + phase.col;
      if (maps.lines) {
        E* to = data + (((window.block + b) * side.channels + channel) * side.height + map_row) * side.width * kLanes + map_col * kLanes;
        kernels.unpack(from, line_plane * kLanes, tile_blocks * kLanes, to, side.height * side.width * kLanes,
                     side.step_w * kLanes, count, cols);
        continue;
      }
      E* to = data + first_image * maps.stride_n + channel * maps.stride_c + map_row * maps.stride_h + map_col * maps.stride_w;
      if (maps.stride_c == 1) {
        for (int64_t x = 0; x < cols; ++x)
          kernels.store(from + x * tile_blocks * kLanes, line_plane * kLanes, to + x * step, maps.stride_n, valid, count);
      } else if (step == 1) {
        for (int64_t p = 0; p < count; ++p)
          kernels.store(from + p * line_plane * kLanes, tile_blocks * kLanes, to + p * maps.stride_c, maps.stride_n, valid,
                cols);
      } else {
        for (int64_t p = 0; p < count; ++p)
          for (int64_t x = 0; x < cols; ++x)
            kernels.store(from + (p * line_plane + x * tile_blocks) * kLanes, 0, to + p * maps.stride_c + x * step,
                  maps.stride_n, valid, 1);
      }
    }
  }
}

// Output planes that one thread takes through all blocks of a strip: as many as keep the strip's sums in half of L2
// (what they read is packed again for every chunk), fewer if there would not be work for every thread.
int64_t ConvPlan::chunk_rows(int64_t strips, int threads) const {
  const int64_t planes = out_.planes(), strip = strip_plane_ * kLanes * static_cast<int64_t>(sizeof(float));
  int64_t chunks = divide_up(planes * strip, std::max<int64_t>(caches().l2 / 2, strip));
  const auto uneven = [&](int64_t items) {
    // Few strips of few images: what they read is a good part of the work, and no more than an even share is wanted.
    if (has_pixel_lanes()) return divide_up(items, threads) * threads - items > items / 4;
    return items < 4 * threads;
  };
  while (threads > 1 && planes / (chunks + 1) >= 16 && uneven(strips * chunks)) ++chunks;
  return divide_up(divide_up(planes, chunks), 4) * 4;
}

int64_t ConvPlan::count_strips(int64_t images) const {
  return divide_up(divide_up(images, tiling_.block_images), tiling_.tile_blocks) * divide_up(grid_h_, tiling_.strip_rows) *
         divide_up(grid_w_, tiling_.tile_cols);
}

// The output pixels of strip `index`. Columns come first, then rows, then images.
ConvPlan::Window ConvPlan::strip(int64_t index, int64_t images) const {
  const int64_t down = divide_up(grid_h_, tiling_.strip_rows), across = divide_up(grid_w_, tiling_.tile_cols);
  Window w;
  w.col_begin = index % across * tiling_.tile_cols;
  w.col_end = std::min<int64_t>(w.col_begin + tiling_.tile_cols, grid_w_);
  w.row_begin = index / across % down * tiling_.strip_rows;
  w.row_end = std::min<int64_t>(w.row_begin + tiling_.strip_rows, grid_h_);
  w.block = index / across / down * tiling_.tile_blocks;
  w.blocks = std::min<int64_t>(tiling_.tile_blocks, divide_up(images, tiling_.block_images) - w.block);
  return w;
}

// The kernel for a tile of `rows` pixel rows of a strip.
template <typename Table>
auto ConvPlan::kernel(const Table& table, const Window& strip, int64_t rows) const {
  const int64_t cols = strip.col_end - strip.col_begin;
  return has_pixel_lanes() ? table[strip.blocks][flat_lines(rows, cols, pitch_)] : table[rows][cols * tiling_.tile_blocks];
}

void ConvPlan::check(const Maps& a, const Maps& b) const {
  if (has_pixel_lanes() && (a.lines || b.lines)) throw std::invalid_argument("a plan for ordinary tensors, given lines");
}

// Tiles can be used where they belong if they are made of lines as kernels know them, pixel after pixel.
bool ConvPlan::is_direct(const Maps& maps) const {
  return maps.lines && maps.element == Element::float32 && out_.step_h == 1 && out_.step_w == 1 && tiling_.tile_blocks == 1;
}

// Calls visit(first plane, planes) for the parts of output planes [first, last) that lie in one phase each.
template <typename Visit>
void ConvPlan::for_each_phase(int64_t first, int64_t last, Visit visit) const {
  while (first < last) {
    const int64_t end = std::min(last, (first / out_.channels + 1) * out_.channels);
    visit(first, end - first);
    first = end;
  }
}

// Packs the block's planes for one tile of the strip after the other and calls visit(begin, end, patch, tile, rows)
// with the entries of output planes [first, last). The tile is in `maps` where that is possible, else in `sums`.
template <typename Visit>
void ConvPlan::for_each_tile(const Maps& in, const Maps& maps, const PlaneBlock& block, const Window& strip,
                             int64_t first, int64_t last, float* patch, float* sums, Visit visit) const {
  const auto before = [](const EntryRow& row, int64_t plane) { return row.out < plane; };
  const EntryRow* rows_end = rows_.data() + block.row_end;
  const EntryRow* begin = std::lower_bound(rows_.data() + block.row_begin, rows_end, first, before);
  const EntryRow* end = std::lower_bound(begin, rows_end, last, before);
  if (begin == end) return;
  const auto pack = with_element(in.element, [](auto e) { return &ConvPlan::pack<decltype(e)>; });
  Window read{0, strip.row_begin + min_row_shift_, strip.col_begin + min_col_shift_, strip.col_end + max_col_shift_,
              strip.block, strip.blocks};
  for (int64_t y = strip.row_begin, next; y < strip.row_end; y = next) {
    next = std::min<int64_t>(y + tiling_.tile_rows, strip.row_end);
    read.row_begin = read.row_end;  // the rows before are there from the last tile
    read.row_end = next + max_row_shift_;
    float* place = patch + (read.row_begin - strip.row_begin - min_row_shift_) * patch_row_ * kLanes;
    (this->*pack)(in, in_, block.first, block.count, read, place, patch_plane_, patch_row_);
    Tile tile;
    if (is_direct(maps)) {
      tile.plane = out_.height * out_.width * kLanes;
      tile.pitch = out_.width * kLanes;
      tile.lines = static_cast<float*>(maps.data) + strip.block * out_.channels * tile.plane + y * tile.pitch + strip.col_begin * kLanes;
    } else {
      tile.plane = strip_plane_ * kLanes;
      tile.pitch = strip_row_ * kLanes;
      tile.lines = sums - first * tile.plane + (y - strip.row_begin) * tile.pitch;
    }
    const int64_t pitch = patch_row_ * kLanes * static_cast<int64_t>(sizeof(float));
    visit(begin, end, Patch{patch + (y - strip.row_begin) * patch_row_ * kLanes, pitch}, tile, next - y);
  }
}

void ConvPlan::forward(const void* weight, Element element, const Maps& in, const Maps& out, const float* bias,
                       bool accumulate, int threads) const {
  check(in, out);
  const LineKernels& kernels = line_kernels();
  const int64_t strips = count_strips(in.images), chunk = chunk_rows(strips, threads);
  const int64_t chunks = divide_up(out_.planes(), chunk), entries = non_zeros();
  const bool direct = is_direct(out);
  float* values = entry_scratch.floats(entries);
  const auto pack = with_element(out.element, [](auto e) { return &ConvPlan::pack<decltype(e)>; });
  const auto unpack = with_element(out.element, [](auto e) { return &ConvPlan::unpack<decltype(e)>; });
#pragma omp parallel num_threads(std::max(threads, 1))
  {
#pragma omp for schedule(static)
    for (int64_t k = 0; k < entries; ++k) values[k] = load_element(weight, element, places_[k]);
    float* patch = patch_scratch.floats(most_planes_ * patch_plane_ * kLanes);
    float* sums = direct ? nullptr : strip_scratch.floats(chunk * strip_plane_ * kLanes);
    // Consecutive items share their images, and a thread takes consecutive items: so the thread that writes a line is
    // likely to be the one that reads it in the next layer.
#pragma omp for schedule(static)
    for (int64_t item = 0; item < strips * chunks; ++item) {
      const int64_t first = item % chunks * chunk, last = std::min(first + chunk, out_.planes());
      const Window pixels = strip(item / chunks, in.images);
      const auto place = [&](int64_t plane) { return sums + (plane - first) * strip_plane_ * kLanes; };
      if (accumulate && !direct)
        for_each_phase(first, last, [&](int64_t plane, int64_t count) {
          (this->*pack)(out, out_, plane, count, pixels, place(plane), strip_plane_, strip_row_);
        });
      for (const PlaneBlock& block : blocks_) {
        const bool start = &block == blocks_.data() && !accumulate;
        for_each_tile(in, out, block, pixels, first, last, patch, sums,
                      [&](const EntryRow* begin, const EntryRow* end, Patch from, Tile tile, int64_t rows) {
                        kernel(kernels.forward, pixels, rows)(offsets_.data(), values, begin, end, from, tile, bias, start);
                      });
      }
      if (!direct)
        for_each_phase(first, last, [&](int64_t plane, int64_t count) {
          (this->*unpack)(out, out_, plane, count, pixels, place(plane), strip_plane_, strip_row_);
        });
    }
  }
}

void ConvPlan::weight_grad(const Maps& in, const Maps& grad_out, void* grads, Element element, bool scatter,
                           int threads) const {
  check(in, grad_out);
  const LineKernels& kernels = line_kernels();
  // The strips are summed in parts, each on its own, and the parts in their order: how many there are must not depend
  // on the number of threads. Within a part the output planes can be shared out freely.
  const int64_t strips = count_strips(in.images), entries = non_zeros();
  const int64_t parts = std::clamp<int64_t>((1 << 19) / std::max<int64_t>(entries, 1), 1, std::min<int64_t>(strips, 16));
  const int64_t chunk = chunk_rows(parts, threads), chunks = divide_up(out_.planes(), chunk);
  const bool direct = is_direct(grad_out);
  float* sums = entry_scratch.floats(parts * entries);
  const auto pack = with_element(grad_out.element, [](auto e) { return &ConvPlan::pack<decltype(e)>; });
#pragma omp parallel num_threads(std::max(threads, 1))
  {
    float* patch = patch_scratch.floats(most_planes_ * patch_plane_ * kLanes);
#pragma omp for schedule(static)
    for (int64_t k = 0; k < parts * entries; ++k) sums[k] = 0.0f;
    float* tiles = direct ? nullptr : strip_scratch.floats(chunk * strip_plane_ * kLanes);
#pragma omp for schedule(static)
    for (int64_t item = 0; item < parts * chunks; ++item) {
      const int64_t part = item / chunks, first = item % chunks * chunk, last = std::min(first + chunk, out_.planes());
      for (int64_t s = strips * part / parts; s < strips * (part + 1) / parts; ++s) {
        const Window pixels = strip(s, in.images);
        if (!direct) (this->*pack)(grad_out, out_, first, last - first, pixels, tiles, strip_plane_, strip_row_);
        for (const PlaneBlock& block : blocks_)
          for_each_tile(in, grad_out, block, pixels, first, last, patch, tiles,
                        [&](const EntryRow* begin, const EntryRow* end, Patch from, Tile tile, int64_t rows) {
                          kernel(kernels.weight_grad, pixels, rows)(offsets_.data(), begin, end, from, tile, sums + part * entries);
                        });
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < (scatter ? 0 : count_); ++i) static_cast<float*>(grads)[i] = 0.0f;  // padding
#pragma omp for schedule(static)
    for (int64_t k = 0; k < entries; ++k) {
      float sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += sums[part * entries + k];
      store_element(grads, element, scatter ? places_[k] : sources_[k], sum);
    }
  }
}

}  // namespace sparsebilevel
