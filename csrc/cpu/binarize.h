// The k largest of n scores as a boolean mask.
#pragma once

#include <cstdint>

namespace sparsebilevel {

// scores [n] float32 -> mask [n], exactly k true; equal scores go to the smaller index, and -0 equals +0.
// Returns the number of NaNs among the scores; the mask is left unwritten when there are any.
// Requires 0 <= k <= n. The result does not depend on `threads`.
int64_t binarize(const float* scores, int64_t n, int64_t k, bool* mask, int threads);

}  // namespace sparsebilevel
