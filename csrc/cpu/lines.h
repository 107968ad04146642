// Conversion of whole feature maps to and from lines, contiguous [ceil(images / 16), channels, height, width, 16].
#pragma once

#include "masked_conv2d.h"

namespace sparsebilevel {

// Lanes of missing images become zero. `maps` has ordinary strides.
void to_lines(const Maps& maps, int64_t channels, int64_t height, int64_t width, float* lines, int threads);
void from_lines(const float* lines, const Maps& maps, int64_t channels, int64_t height, int64_t width, int threads);

}  // namespace sparsebilevel
