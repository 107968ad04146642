// The k largest of n scores as a boolean mask, exactly: equal scores go to the smaller index, -0 equals +0, infinities
// and denormals are ordinary. Results do not depend on `threads`.
#pragma once

#include <cstdint>
#include <vector>

namespace sparsebilevel {

enum class ScoreType { float16, bfloat16, float32 };

struct ScoreTensor {
  const void* scores;
  int64_t size;
  bool* mask;
  uint64_t* words;  // the mask again, 64 positions a word from the lowest bit up, rest 0: [ceil(size / 64)]; or null
};

// Masks of the k largest scores of all tensors together; of equal ones in different tensors those of the earlier come
// first. Returns nothing, or where there are NaNs their number in each tensor; the masks are then of no meaning.
// Requires 0 <= k <= the sum of the sizes. `hint` [2] is null or what a call on similar scores left there, zeros before
// the first: it may say anything and changes only how long it takes.
std::vector<int64_t> binarize(const std::vector<ScoreTensor>& tensors, ScoreType type, int64_t k, int threads,
                              int32_t* hint = nullptr);

// scores and mask [outer, length, inner]: the k largest along the middle dimension. Returns the number of NaNs; where
// there are any the mask is of no meaning. Requires 0 <= k <= length, and inner = 1 or length <= kShortRow.
constexpr int64_t kShortRow = 64;
int64_t binarize_rows(const void* scores, int64_t outer, int64_t length, int64_t inner, ScoreType type, int64_t k,
                      bool* mask, int threads);

// The words of a mask [size], as in ScoreTensor.
void pack_words(const bool* mask, int64_t size, uint64_t* words, int threads);

// counts [ceil(size / 1024) + 1]: how many positions before each multiple of 1024 are True, and last how many of all.
constexpr int64_t kCountStep = 1024;
void count_words(const uint64_t* words, int64_t size, int64_t* counts);

// words of a mask [rows, cols] -> tiles [ceil(rows / tile_rows), ceil(cols / tile_cols)]: is anything in the tile True?
void occupied_tiles(const uint64_t* words, int64_t rows, int64_t cols, int64_t tile_rows, int64_t tile_cols,
                    bool* tiles, int threads);

}  // namespace sparsebilevel
