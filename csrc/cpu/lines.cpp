#include "lines.h"

#include <algorithm>

#include "line_kernels.h"

namespace sparsebilevel {
namespace {

// visit(first float of the row's first line, of its first image, images of the block) for all rows of all blocks.
template <typename Visit>
void for_each_row(const Maps& maps, int64_t channels, int64_t height, int64_t width, int threads, Visit visit) {
  const int64_t rows = (maps.images + kLanes - 1) / kLanes * height;
#pragma omp parallel for num_threads(std::max(threads, 1)) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t block = row / height, y = row % height;
    visit((block * channels * height + y) * width * kLanes, block * kLanes * maps.stride_n + y * maps.stride_h,
          static_cast<int>(std::min<int64_t>(maps.images - block * kLanes, kLanes)));
  }
}

}  // namespace

void to_lines(const Maps& maps, int64_t channels, int64_t height, int64_t width, float* lines, int threads) {
  const LineKernels& kernels = line_kernels();
  const int64_t plane = height * width * kLanes;
  for_each_row(maps, channels, height, width, threads, [&](int64_t line, int64_t image, int valid) {
    if (maps.stride_w == 1) {
      for (int64_t c = 0; c < channels; ++c)
        kernels.load(maps.data + image + c * maps.stride_c, maps.stride_n, valid, lines + line + c * plane, kLanes, width);
    } else {
      const int64_t together = maps.stride_c == 1 ? channels : 1;
      for (int64_t x = 0; x < width; ++x)
        for (int64_t c = 0; c < channels; c += together)
          kernels.load(maps.data + image + x * maps.stride_w + c * maps.stride_c, maps.stride_n, valid,
                       lines + line + x * kLanes + c * plane, plane, together);
    }
  });
}

void from_lines(const float* lines, const Maps& maps, int64_t channels, int64_t height, int64_t width, int threads) {
  const LineKernels& kernels = line_kernels();
  const int64_t plane = height * width * kLanes;
  for_each_row(maps, channels, height, width, threads, [&](int64_t line, int64_t image, int valid) {
    if (maps.stride_w == 1) {
      for (int64_t c = 0; c < channels; ++c)
        kernels.store(lines + line + c * plane, kLanes, maps.data + image + c * maps.stride_c, maps.stride_n, valid, width);
    } else {
      const int64_t together = maps.stride_c == 1 ? channels : 1;
      for (int64_t x = 0; x < width; ++x)
        for (int64_t c = 0; c < channels; c += together)
          kernels.store(lines + line + x * kLanes + c * plane, plane,
                        maps.data + image + x * maps.stride_w + c * maps.stride_c, maps.stride_n, valid, together);
    }
  });
}

}  // namespace sparsebilevel
