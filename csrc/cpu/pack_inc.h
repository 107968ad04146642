// Inner loops of pack.cpp, included once for each instruction set inside a namespace of its own, after a struct `Word`
// of functions on 64 elements: bits(mask), the bits of 64 bytes; compress_bytes(word, ones) and expand_bytes(word, ones),
// which move those of the 8 bytes that `ones` has a 1 in to the front and back; and, for the element sizes in kVector,
// gather(dense, word, values) and scatter<mode>(values, word, dense). These two return how far they came in `values`,
// where they may touch as many as 64 elements.
// No lambdas, no standard library: their code would be compiled for this instruction set and linked into the others.

// Of the words [begin, end). The mask, if there is one, first becomes those bits.
Tally tally(const uint8_t* mask, int64_t n, uint64_t* bits, int64_t begin, int64_t end) {
  Tally t;
  for (int64_t w = begin; w < end; ++w) {
    if (mask) {
      if (64 * w + 64 <= n) {
        bits[w] = Word::bits(mask + 64 * w);
      } else {
        uint8_t rest[64] = {};
        __builtin_memcpy(rest, mask + 64 * w, n - 64 * w);
        bits[w] = Word::bits(rest);
      }
    }
    const uint64_t word = bits[w];
    t.hash += mix(word ^ static_cast<uint64_t>(w + 1) * kGoldenRatio);
    if (word == 0) continue;
    t.count += __builtin_popcountll(word);
    t.groups += __builtin_popcountll(ones_where_nonzero(word));
    const int64_t first = 64 * w + __builtin_ctzll(word);
    if (t.first < 0)
      t.first = first;
    else
      t.escapes += (first - t.last - 1) / kEscape;  // inside a word no gap is that wide
    t.last = 64 * w + 63 - __builtin_clzll(word);
  }
  return t;
}

void encode_hierarchical(const uint64_t* bits, int64_t begin, int64_t end, uint8_t* top, uint8_t* groups,
                         const uint8_t* groups_end) {
  for (int64_t w = begin; w < end; ++w) {
    const uint64_t ones = ones_where_nonzero(bits[w]);
    top[w] = low_bits(ones);
    const uint64_t bytes = Word::compress_bytes(bits[w], ones);
    const int count = __builtin_popcountll(ones);
    __builtin_memcpy(groups, &bytes, groups_end - groups >= 8 ? 8 : count);
    groups += count;
  }
}

bool decode_hierarchical(const uint8_t* top, const uint8_t* groups, const uint8_t* groups_end, int64_t begin,
                         int64_t end, uint64_t* bits) {
  bool canonical = true;
  for (int64_t w = begin; w < end; ++w) {
    const uint64_t ones = spread_bits(top[w]);
    const int count = __builtin_popcountll(ones);
    uint64_t bytes = 0;
    __builtin_memcpy(&bytes, groups, groups_end - groups >= 8 ? 8 : count);
    groups += count;
    bits[w] = Word::expand_bytes(bytes, ones);
    canonical &= ones_where_nonzero(bits[w]) == ones;
  }
  return canonical;
}

// `next` is the first position behind the last one that was written before.
void encode_delta8(const uint64_t* bits, int64_t begin, int64_t end, int64_t next, uint8_t* out) {
  for (int64_t w = begin; w < end; ++w) {
    for (uint64_t word = bits[w]; word != 0; word &= word - 1) {
      const int64_t position = 64 * w + __builtin_ctzll(word);
      int64_t gap = position - next;
      for (; gap >= kEscape; gap -= kEscape) *out++ = kEscape;
      *out++ = static_cast<uint8_t>(gap);
      next = position + 1;
    }
  }
}

void encode_block16(const uint64_t* bits, int64_t begin, int64_t end, uint8_t* counts, uint8_t* positions) {
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t block_end = block + kBlock < end ? block + kBlock : end;
    uint32_t count = 0;
    for (int64_t w = block; w < block_end; ++w) {
      for (uint64_t word = bits[w]; word != 0; word &= word - 1) {
        const auto position = static_cast<uint16_t>(64 * (w - block) + __builtin_ctzll(word));
        __builtin_memcpy(positions + 2 * count++, &position, 2);
      }
    }
    __builtin_memcpy(counts + 4 * (block / kBlock), &count, 4);
    positions += 2 * count;
  }
}

// Words with few bits are walked bit by bit: what a vector of them costs does not depend on how many there are.
template <class T>
void gather(const T* dense, const uint64_t* bits, int64_t begin, int64_t end, int64_t n, T* values, T* values_end) {
  for (int64_t w = begin; w < end; ++w, dense += 64) {
    uint64_t word = bits[w];
    if constexpr (Word::kVector<T>) {
      if (__builtin_popcountll(word) > kFew && values_end - values >= 64 && 64 * w + 64 <= n) {
        values = Word::gather(dense, word, values);
        continue;
      }
    }
    for (; word != 0; word &= word - 1) *values++ = dense[__builtin_ctzll(word)];
  }
}

template <class T, Mode mode>
void scatter(const T* values, const T* values_end, const uint64_t* bits, int64_t begin, int64_t end, int64_t n,
             T* dense) {
  for (int64_t w = begin; w < end; ++w, dense += 64) {
    uint64_t word = bits[w];
    if constexpr (Word::kVector<T>) {
      if ((mode != Mode::keep || __builtin_popcountll(word) > kFew) && values_end - values >= 64 && 64 * w + 64 <= n) {
        values = Word::template scatter<mode>(values, word, dense);
        continue;
      }
    }
    if (mode != Mode::keep) __builtin_memset(dense, 0, sizeof(T) * (n - 64 * w < 64 ? n - 64 * w : 64));
    for (; word != 0; word &= word - 1) dense[__builtin_ctzll(word)] = *values++;
  }
  if (mode == Mode::stream) Word::fence();
}

template <class T>
constexpr ValueKernels<T> value_kernels() {
  return {&gather<T>, &scatter<T, Mode::keep>, &scatter<T, Mode::zero>, &scatter<T, Mode::stream>};
}

constexpr Kernels kKernels = {&tally,
                              &encode_hierarchical,
                              &decode_hierarchical,
                              &encode_delta8,
                              &encode_block16,
                              value_kernels<uint16_t>(),
                              value_kernels<uint32_t>(),
                              value_kernels<uint64_t>()};
