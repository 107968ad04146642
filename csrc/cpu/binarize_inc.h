// Inner loops of binarize.cpp, included once for each instruction set inside a namespace of its own, after a function
//   Words compare(const Bits* scores, Bits low, Bits high, Bits infinity)   for Bits = int32_t and int16_t
// on 64 scores. No lambdas, no standard library: their code would be compiled for this instruction set and linked into
// the others.

// Splits a block at a window of keys: bit maps of the scores above it and inside it, the rest of the last word 0.
template <typename Bits>
void split(const Bits* scores, int64_t n, int32_t low, int32_t high, Bits infinity, Split& out) {
  // The scores are compared before -0, whose key is then -1, is made +0: it must fall on the side of key 0.
  const Bits least = static_cast<Bits>(low == 0 ? -1 : low), most = static_cast<Bits>(high == -1 ? -2 : high);
  out.num_above = out.num_inside = 0;
  out.nan = false;
  for (int64_t i = 0; i < n; i += 64) {
    Words words;
    if (n - i >= 64) {
      words = compare(scores + i, least, most, infinity);
    } else {
      Bits last[64] = {};
      __builtin_memcpy(last, scores + i, (n - i) * sizeof(Bits));
      words = compare(last, least, most, infinity);
      const uint64_t exist = (uint64_t{1} << (n - i)) - 1;
      words.above &= exist;
      words.not_below &= exist;
    }
    const uint64_t inside = words.not_below & ~words.above;
    out.above[i / 64] = words.above;
    out.inside[i / 64] = inside;
    out.num_above += __builtin_popcountll(words.above);
    out.num_inside += __builtin_popcountll(inside);
    out.nan |= words.nan;
  }
}

// The keys of the scores inside, in their order.
template <typename Bits>
void gather(const Bits* scores, int64_t n, const uint64_t* inside, int32_t* keys) {
  for (int64_t i = 0; i < n; i += 64)
    for (uint64_t word = inside[i / 64]; word; word &= word - 1) *keys++ = to_key(scores[i + __builtin_ctzll(word)]);
}

// Of the scores inside, whose keys are given, those above the threshold move up and those equal to it stay.
inline int64_t settle(int64_t n, const int32_t* keys, int32_t threshold, uint64_t* above, uint64_t* inside) {
  int64_t num_ties = 0;
  for (int64_t i = 0; i < n; i += 64) {
    uint64_t larger = 0, equal = 0;
    for (uint64_t word = inside[i / 64]; word; word &= word - 1, ++keys) {
      const uint64_t bit = word & -word;
      larger |= *keys > threshold ? bit : 0;
      equal |= *keys == threshold ? bit : 0;
    }
    above[i / 64] |= larger;
    inside[i / 64] = equal;
    num_ties += __builtin_popcountll(equal);
  }
  return num_ties;
}

// Adds the first `ties` of the scores inside to those above, and writes these as the mask.
inline void write(int64_t n, int64_t ties, uint64_t* above, const uint64_t* inside, bool* mask) {
  for (int64_t i = 0; i < n; i += 64) {
    uint64_t word = inside[i / 64];
    if (ties > 0 && word) {
      const int64_t count = __builtin_popcountll(word);
      for (int64_t excess = count - ties; excess > 0; --excess) word &= ~(uint64_t{1} << (63 - __builtin_clzll(word)));
      above[i / 64] |= word;
      ties -= count;
    }
    if (n - i >= 64) {
      expand(above[i / 64], mask + i);
    } else {
      for (int64_t j = 0; j < n - i; ++j) mask[i + j] = above[i / 64] >> j & 1;
    }
  }
}

// Up to kRowsTogether rows, which start `step` apart and whose entries lie `stride` apart: an entry is kept if fewer than
// k of its row precede it. The rows are the lanes of every comparison. Returns the number of NaNs.
template <typename Bits>
int64_t rank(const Bits* scores, int64_t rows, int64_t step, int64_t length, int64_t stride, Bits infinity, int32_t k,
             bool* mask) {
  int32_t nans = 0;
  int32_t keys[kShortRow][kRowsTogether];
  for (int64_t j = 0; j < length; ++j)
    for (int64_t r = 0; r < rows; ++r) {
      const Bits bits = scores[r * step + j * stride];
      nans += is_nan(bits, infinity);
      keys[j][r] = to_key(bits);
    }
  for (int64_t j = 0; j < length; ++j) {
    int32_t before[kRowsTogether] = {};
    for (int64_t i = 0; i < j; ++i)
      for (int64_t r = 0; r < rows; ++r) before[r] += keys[i][r] >= keys[j][r];
    for (int64_t i = j + 1; i < length; ++i)
      for (int64_t r = 0; r < rows; ++r) before[r] += keys[i][r] > keys[j][r];
    for (int64_t r = 0; r < rows; ++r) mask[r * step + j * stride] = before[r] < k;
  }
  return nans;
}

// The same for contiguous rows of a length that the compiler knows: it unrolls the inner loops and fills lanes itself.
template <int kLength, typename Bits>
int64_t rank_contiguous(const Bits* __restrict scores, int64_t rows, int64_t, int64_t, int64_t, Bits infinity, int32_t k,
                        bool* __restrict mask) {
  int32_t nans = 0;
  for (int64_t r = 0; r < rows; ++r) {
    int32_t keys[kLength];
    for (int j = 0; j < kLength; ++j) {
      nans += is_nan(scores[kLength * r + j], infinity);
      keys[j] = to_key(scores[kLength * r + j]);
    }
    for (int j = 0; j < kLength; ++j) {
      int32_t before = 0;
      for (int i = 0; i < kLength; ++i) before += i < j ? keys[i] >= keys[j] : keys[i] > keys[j];
      mask[kLength * r + j] = before < k;
    }
  }
  return nans;
}

inline void pack(const bool* mask, int64_t n, uint64_t* words) {
  for (int64_t i = 0; i < n; i += 64) {
    uint64_t word = 0;
    const int64_t count = n - i < 64 ? n - i : 64;
    for (int64_t j = 0; j < count; ++j) word |= static_cast<uint64_t>(mask[i + j]) << j;
    words[i / 64] = word;
  }
}

inline int64_t count(const uint64_t* words, int64_t n) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += __builtin_popcountll(words[i]);
  return total;
}

template <typename Bits>
constexpr Kernels<Bits> table() {
  return {&split<Bits>, &gather<Bits>, &settle, &write,
          &rank<Bits>, &rank_contiguous<2, Bits>, &rank_contiguous<4, Bits>, &rank_contiguous<8, Bits>, &pack, &count};
}
