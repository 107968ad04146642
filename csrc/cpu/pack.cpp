// A mask is read once, as bytes, and turned into bits; all that follows reads those, an eighth of the size. The words are
// cut into one part a thread at multiples of kBlock, each part is counted, and from the sums of the counts every thread
// knows where its share of the output begins.
#include "pack.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "isa.h"
#ifdef SPARSEBILEVEL_X86
#include <immintrin.h>
#endif

namespace sparsebilevel {
namespace {

constexpr int64_t kBlock = 1024;       // words of one block of block16: 65536 elements
constexpr int64_t kEscape = 255;       // byte of delta8 that skips so many elements
constexpr uint64_t kGoldenRatio = 0x9e3779b97f4a7c15u;
constexpr int kFew = 4;                // bits of a word that are faster walked than handled as vectors
constexpr int64_t kStreamed = 8 << 20;  // bytes that are better written past the caches

struct Tally {
  int64_t count = 0, groups = 0, escapes = 0;  // bits, non-zero bytes, escapes of delta8 between bits of the same part
  int64_t first = -1, last = -1;               // positions of bits; -1 without any
  uint64_t hash = 0;
};

// The last, `keep`, leaves elements alone whose bit is not set; the others write zeros, `stream` past the caches.
enum class Mode { keep, zero, stream };

template <class T>
struct ValueKernels {
  void (*gather)(const T*, const uint64_t*, int64_t, int64_t, int64_t, T*, T*);
  void (*keep)(const T*, const T*, const uint64_t*, int64_t, int64_t, int64_t, T*);
  void (*zero)(const T*, const T*, const uint64_t*, int64_t, int64_t, int64_t, T*);
  void (*stream)(const T*, const T*, const uint64_t*, int64_t, int64_t, int64_t, T*);
};

// See pack_inc.h.
struct Kernels {
  Tally (*tally)(const uint8_t*, int64_t, uint64_t*, int64_t, int64_t);
  void (*encode_hierarchical)(const uint64_t*, int64_t, int64_t, uint8_t*, uint8_t*, const uint8_t*);
  bool (*decode_hierarchical)(const uint8_t*, const uint8_t*, const uint8_t*, int64_t, int64_t, uint64_t*);
  void (*encode_delta8)(const uint64_t*, int64_t, int64_t, int64_t, uint8_t*);
  void (*encode_block16)(const uint64_t*, int64_t, int64_t, uint8_t*, uint8_t*);
  ValueKernels<uint16_t> values2;
  ValueKernels<uint32_t> values4;
  ValueKernels<uint64_t> values8;

  const ValueKernels<uint16_t>& values(uint16_t) const { return values2; }
  const ValueKernels<uint32_t>& values(uint32_t) const { return values4; }
  const ValueKernels<uint64_t>& values(uint64_t) const { return values8; }
};

// The finalizer of splitmix64.
inline uint64_t mix(uint64_t x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

// 1 in each byte that is not zero, else 0.
inline uint64_t ones_where_nonzero(uint64_t x) {
  x |= x >> 4;
  x |= x >> 2;
  x |= x >> 1;
  return x & 0x0101010101010101u;
}

// The lowest bit of byte j as bit j: the multiplication moves it to bit 56 + j.
inline uint8_t low_bits(uint64_t ones) { return static_cast<uint8_t>(ones * 0x0102040810204080u >> 56); }

// The other way, by a copy of all bits in each byte, of which byte j keeps bit j.
inline uint64_t spread_bits(uint8_t bits) {
  return ones_where_nonzero(bits * 0x0101010101010101u & 0x8040201008040201u);
}

namespace scalar {

struct Word {
  template <class T>
  static constexpr bool kVector = false;
  static uint64_t bits(const uint8_t* mask) {
    uint64_t word = 0;
    for (int j = 0; j < 8; ++j) {
      uint64_t bytes;
      __builtin_memcpy(&bytes, mask + 8 * j, 8);
      word |= static_cast<uint64_t>(low_bits(ones_where_nonzero(bytes))) << 8 * j;
    }
    return word;
  }
  static uint64_t compress_bytes(uint64_t word, uint64_t ones) {
    uint64_t bytes = 0;
    for (int shift = 0; ones != 0; word >>= 8, ones >>= 8) {
      bytes |= (ones & 1) * (word & 0xff) << shift;
      shift += 8 * (ones & 1);
    }
    return bytes;
  }
  static uint64_t expand_bytes(uint64_t bytes, uint64_t ones) {
    uint64_t word = 0;
    for (int shift = 0; shift < 64; shift += 8) {
      const uint64_t taken = ones >> shift & 1;
      word |= taken * (bytes & 0xff) << shift;
      bytes >>= 8 * taken;
    }
    return word;
  }
  template <class T>
  static T* gather(const T*, uint64_t, T*);  // never called, and so not defined; the same below
  template <Mode mode, class T>
  static const T* scatter(const T*, uint64_t, T*);
  static void fence() {}
};

#include "pack_inc.h"

}  // namespace scalar

#ifdef SPARSEBILEVEL_X86
// For 8 lanes with the bits m: `compress[m]` names the lanes that are set, in order; `expand[m]` says for each lane that
// is set how many are before it.
struct LaneTables {
  std::array<std::array<uint8_t, 8>, 256> compress{}, expand{};
};

constexpr LaneTables make_lane_tables() {
  LaneTables tables;
  for (int m = 0; m < 256; ++m) {
    for (int lane = 0, count = 0; lane < 8; ++lane) {
      tables.expand[m][lane] = static_cast<uint8_t>(count);
      if (m >> lane & 1) tables.compress[m][count++] = static_cast<uint8_t>(lane);
    }
  }
  return tables;
}

constexpr LaneTables kLaneTables = make_lane_tables();
const uint8_t (&kCompressLanes)[256][8] = reinterpret_cast<const uint8_t (&)[256][8]>(kLaneTables.compress);
const uint8_t (&kExpandLanes)[256][8] = reinterpret_cast<const uint8_t (&)[256][8]>(kLaneTables.expand);

SPARSEBILEVEL_BEGIN_AVX2
namespace avx2 {

struct Word {
  template <class T>
  static constexpr bool kVector = sizeof(T) == 4;
  static uint64_t bits(const uint8_t* mask) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask + 32));
    const __m256i zero = _mm256_setzero_si256();
    const auto zeros_low = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(low, zero)));
    const auto zeros_high = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(high, zero)));
    return ~(static_cast<uint64_t>(zeros_high) << 32 | zeros_low);
  }
  static uint64_t compress_bytes(uint64_t word, uint64_t ones) { return _pext_u64(word, ones * 255); }
  static uint64_t expand_bytes(uint64_t bytes, uint64_t ones) { return _pdep_u64(bytes, ones * 255); }
  static uint32_t* gather(const uint32_t* dense, uint64_t word, uint32_t* values) {
    for (int lane = 0; lane < 64; lane += 8) {
      const auto m = static_cast<uint8_t>(word >> lane);
      const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(dense + lane));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), _mm256_permutevar8x32_epi32(all, lanes(kCompressLanes[m])));
      values += __builtin_popcount(m);
    }
    return values;
  }
  template <Mode mode>
  static const uint32_t* scatter(const uint32_t* values, uint64_t word, uint32_t* dense) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    for (int lane = 0; lane < 64; lane += 8) {
      const auto m = static_cast<uint8_t>(word >> lane);
      const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(m), bit), bit);
      __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
      v = _mm256_and_si256(_mm256_permutevar8x32_epi32(v, lanes(kExpandLanes[m])), set);
      values += __builtin_popcount(m);
      auto* target = reinterpret_cast<__m256i*>(dense + lane);
      if (mode == Mode::keep)
        _mm256_maskstore_epi32(reinterpret_cast<int*>(target), set, v);
      else if (mode == Mode::stream)
        _mm256_stream_si256(target, v);
      else
        _mm256_storeu_si256(target, v);
    }
    return values;
  }
  static void fence() { _mm_sfence(); }

 private:
  static __m256i lanes(const uint8_t (&table)[8]) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(table)));
  }
};

#include "pack_inc.h"

}  // namespace avx2
SPARSEBILEVEL_END_ISA

SPARSEBILEVEL_BEGIN_AVX512
namespace avx512 {

struct Word {
  template <class T>
  static constexpr bool kVector = sizeof(T) <= 4;
  static uint64_t bits(const uint8_t* mask) {
    const __m512i bytes = _mm512_loadu_si512(mask);
    return _mm512_test_epi8_mask(bytes, bytes);
  }
  static uint64_t compress_bytes(uint64_t word, uint64_t ones) { return _pext_u64(word, ones * 255); }
  static uint64_t expand_bytes(uint64_t bytes, uint64_t ones) { return _pdep_u64(bytes, ones * 255); }
  // Compressing stores are microcode on some processors: the register is compressed and stored whole. Two-byte elements
  // are widened to four: the instructions for them (VBMI2) came later than the rest.
  template <class T>
  static T* gather(const T* dense, uint64_t word, T* values) {
    for (int lane = 0; lane < 64; lane += 16) {
      const auto m = static_cast<__mmask16>(word >> lane);
      store(values, _mm512_maskz_compress_epi32(m, load(dense + lane)));
      values += __builtin_popcount(m);
    }
    return values;
  }
  template <Mode mode, class T>
  static const T* scatter(const T* values, uint64_t word, T* dense) {
    for (int lane = 0; lane < 64; lane += 16) {
      const auto m = static_cast<__mmask16>(word >> lane);
      const __m512i v = _mm512_maskz_expand_epi32(m, load(values));
      values += __builtin_popcount(m);
      if (mode == Mode::keep)
        store_lanes(dense + lane, m, v);
      else if (mode == Mode::stream)
        stream(dense + lane, v);
      else
        store(dense + lane, v);
    }
    return values;
  }
  static void fence() { _mm_sfence(); }

 private:
  static __m512i load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static __m512i load(const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(uint32_t* p, __m512i v) { _mm512_storeu_si512(p, v); }
  static void store(uint16_t* p, __m512i v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
  }
  static void stream(uint32_t* p, __m512i v) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), v); }
  static void stream(uint16_t* p, __m512i v) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
  }
  static void store_lanes(uint32_t* p, __mmask16 m, __m512i v) { _mm512_mask_storeu_epi32(p, m, v); }
  static void store_lanes(uint16_t* p, __mmask16 m, __m512i v) {
    _mm256_mask_storeu_epi16(p, m, _mm512_cvtepi32_epi16(v));
  }
};

#include "pack_inc.h"

}  // namespace avx512
SPARSEBILEVEL_END_ISA
#endif

const Kernels& kernels() {
#ifdef SPARSEBILEVEL_X86
  if (isa() == Isa::avx512) return avx512::kKernels;
  if (isa() == Isa::avx2) return avx2::kKernels;
#endif
  return scalar::kKernels;
}

int64_t words_of(int64_t n) { return (n + 63) / 64; }

struct Part {
  int64_t begin, end;  // words
  Tally tally;
  int64_t count_before, groups_before, escapes_before;  // in all parts before; escapes up to the first bit of this one
  int64_t next;                                         // the first element behind the last bit before this part
};

// With a mask, `bits` is written.
std::vector<Part> scan(const uint8_t* mask, int64_t n, uint64_t* bits, int threads) {
  const int64_t words = words_of(n), blocks = (words + kBlock - 1) / kBlock;
  const int64_t count = std::clamp<int64_t>(blocks, 1, std::max(threads, 1));
  std::vector<Part> parts(count);
#pragma omp parallel for num_threads(count) schedule(static, 1) if (count > 1)
  for (int64_t p = 0; p < count; ++p) {
    Part& part = parts[p];
    part.begin = std::min(words, blocks * p / count * kBlock);
    part.end = std::min(words, blocks * (p + 1) / count * kBlock);
    part.tally = kernels().tally(mask, n, bits, part.begin, part.end);
  }
  int64_t counted = 0, groups = 0, escapes = 0, next = 0;
  for (Part& part : parts) {
    part.count_before = counted;
    part.groups_before = groups;
    part.escapes_before = escapes;
    part.next = next;
    counted += part.tally.count;
    groups += part.tally.groups;
    if (part.tally.count == 0) continue;
    escapes += part.tally.escapes + (part.tally.first - next) / kEscape;
    next = part.tally.last + 1;
  }
  return parts;
}

std::vector<Part> scan(const uint64_t* bits, int64_t n, int threads) {
  return scan(nullptr, n, const_cast<uint64_t*>(bits), threads);  // written only with a mask
}

MaskSummary summary(const std::vector<Part>& parts, int64_t n) {
  MaskSummary s{0, 0, words_of(n), 0};
  int64_t next = 0;
  for (const Part& part : parts) {
    s.count += part.tally.count;
    s.hash += part.tally.hash;
    s.hierarchical_size += part.tally.groups;
    if (part.tally.count == 0) continue;
    s.delta8_size += part.tally.count + part.tally.escapes + (part.tally.first - next) / kEscape;
    next = part.tally.last + 1;
  }
  return s;
}

// Whether the bits beyond n are zero.
bool padding_is_zero(const uint64_t* bits, int64_t n) { return n % 64 == 0 || bits[n / 64] >> n % 64 == 0; }

bool decode_bitmap(const uint8_t* data, int64_t size, int64_t n, uint64_t* bits) {
  if (size != (n + 7) / 8) return false;
  if (n == 0) return true;
  bits[words_of(n) - 1] = 0;
  std::memcpy(bits, data, size);
  return padding_is_zero(bits, n);
}

bool decode_hierarchical(const uint8_t* data, int64_t size, int64_t n, uint64_t* bits, int threads) {
  const int64_t words = words_of(n);
  if (size < words) return false;
  const int64_t count = std::clamp<int64_t>(words / kBlock, 1, std::max(threads, 1));
  std::vector<int64_t> groups(count + 1);
  const auto begin = [&](int64_t p) { return words * p / count; };
#pragma omp parallel for num_threads(count) schedule(static, 1) if (count > 1)
  for (int64_t p = 0; p < count; ++p) {
    int64_t sum = 0;
    for (int64_t w = begin(p); w < begin(p + 1); ++w) sum += __builtin_popcount(data[w]);
    groups[p + 1] = sum;
  }
  for (int64_t p = 0; p < count; ++p) groups[p + 1] += groups[p];
  if (size != words + groups[count]) return false;
  bool canonical = true;
#pragma omp parallel for num_threads(count) schedule(static, 1) reduction(&& : canonical) if (count > 1)
  for (int64_t p = 0; p < count; ++p)
    canonical = kernels().decode_hierarchical(data, data + words + groups[p], data + size, begin(p), begin(p + 1), bits);
  return canonical && (n == 0 || padding_is_zero(bits, n));
}

bool decode_delta8(const uint8_t* data, int64_t size, int64_t n, uint64_t* bits) {
  std::fill_n(bits, words_of(n), 0);
  if (size > 0 && data[size - 1] == kEscape) return false;  // escapes to nowhere
  int64_t next = 0;
  for (int64_t i = 0; i < size; ++i) {
    next += data[i];
    if (data[i] == kEscape) continue;
    if (next >= n) return false;
    bits[next / 64] |= uint64_t{1} << next % 64;
    ++next;
  }
  return true;
}

bool decode_block16(const uint8_t* data, int64_t size, int64_t n, uint64_t* bits, int threads) {
  const int64_t words = words_of(n), blocks = (words + kBlock - 1) / kBlock;
  if (size < 4 * blocks) return false;
  std::vector<int64_t> before(blocks + 1);
  for (int64_t b = 0; b < blocks; ++b) {
    uint32_t count;
    std::memcpy(&count, data + 4 * b, 4);
    if (count > 64 * kBlock) return false;
    before[b + 1] = before[b] + count;
  }
  if (size != 4 * blocks + 2 * before[blocks]) return false;
  bool valid = true;
#pragma omp parallel for num_threads(std::max(threads, 1)) schedule(static) reduction(&& : valid) if (blocks > 1)
  for (int64_t b = 0; b < blocks; ++b) {
    uint64_t* block = bits + b * kBlock;
    const int64_t block_words = std::min(kBlock, words - b * kBlock);
    const int64_t length = std::min(64 * kBlock, n - 64 * kBlock * b);
    std::fill_n(block, block_words, 0);
    int64_t last = -1;
    for (int64_t i = before[b]; i < before[b + 1]; ++i) {
      uint16_t position;
      std::memcpy(&position, data + 4 * blocks + 2 * i, 2);
      if (position <= last || position >= length) {
        valid = false;
        break;
      }
      block[position / 64] |= uint64_t{1} << position % 64;
      last = position;
    }
  }
  return valid;
}

template <class T>
void gather(const T* dense, const uint64_t* bits, int64_t n, T* values, int threads) {
  const std::vector<Part> parts = scan(bits, n, threads);
  const int64_t count = static_cast<int64_t>(parts.size());
#pragma omp parallel for num_threads(count) schedule(static, 1) if (count > 1)
  for (int64_t p = 0; p < count; ++p) {
    const Part& part = parts[p];
    T* out = values + part.count_before;
    kernels().values(T{}).gather(dense + 64 * part.begin, bits, part.begin, part.end, n, out, out + part.tally.count);
  }
}

template <class T>
void scatter(const T* values, const uint64_t* bits, int64_t n, T* dense, bool keep, int threads) {
  const std::vector<Part> parts = scan(bits, n, threads);
  const int64_t count = static_cast<int64_t>(parts.size());
  const T* values_end = values + parts.back().count_before + parts.back().tally.count;
  const bool aligned = reinterpret_cast<uintptr_t>(dense) % 64 == 0;
  const ValueKernels<T>& of = kernels().values(T{});
  const bool stream = aligned && n * static_cast<int64_t>(sizeof(T)) >= kStreamed;
  const auto run = keep ? of.keep : stream ? of.stream : of.zero;
#pragma omp parallel for num_threads(count) schedule(static, 1) if (count > 1)
  for (int64_t p = 0; p < count; ++p) {
    const Part& part = parts[p];
    run(values + part.count_before, values_end, bits, part.begin, part.end, n, dense + 64 * part.begin);
  }
}

// Polynomials over GF(2) modulo that of CRC-32C, the highest power in the lowest bit: x^0 is 1 << 31.
constexpr uint32_t kPolynomial = 0x82f63b78u;

uint32_t multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (; a != 0; a <<= 1) {
    if (a >> 31) product ^= b;
    b = b >> 1 ^ (b & 1 ? kPolynomial : 0);
  }
  return product;
}

// The checksum of A followed by B.
uint32_t combine(uint32_t crc_a, uint32_t crc_b, int64_t size_b) {
  for (uint32_t power = 1u << 23; size_b != 0; size_b >>= 1) {  // x^8, x^16, x^32 ...: x^8 a byte
    if (size_b & 1) crc_a = multiply(crc_a, power);
    power = multiply(power, power);
  }
  return crc_a ^ crc_b;
}

using CrcTables = std::array<std::array<uint32_t, 256>, 8>;

constexpr CrcTables make_crc_tables() {
  CrcTables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? kPolynomial : 0);
    tables[0][byte] = crc;
  }
  for (size_t t = 1; t < 8; ++t)
    for (size_t byte = 0; byte < 256; ++byte)
      tables[t][byte] = tables[t - 1][byte] >> 8 ^ tables[0][tables[t - 1][byte] & 0xff];
  return tables;
}

uint32_t crc_by_table(const uint8_t* data, int64_t size) {
  static constexpr CrcTables tables = make_crc_tables();
  uint32_t crc = ~0u;
  for (; size >= 8; data += 8, size -= 8) {
    uint64_t word;
    std::memcpy(&word, data, 8);
    word ^= crc;
    crc = 0;
    for (int byte = 0; byte < 8; ++byte) crc ^= tables[7 - byte][word >> 8 * byte & 0xff];
  }
  for (; size > 0; ++data, --size) crc = crc >> 8 ^ tables[0][(crc ^ *data) & 0xff];
  return ~crc;
}

#ifdef SPARSEBILEVEL_X86
// The instruction takes three cycles and starts every cycle: three streams run in the time of one.
SPARSEBILEVEL_AVX2 uint32_t crc_by_instruction(const uint8_t* data, int64_t size) {
  const int64_t third = size < 1024 ? 0 : size / 24 * 8;
  uint64_t a = ~0u, b = ~0u, c = ~0u;
  for (int64_t i = 0; i < third; i += 8) {
    uint64_t words[3];
    for (int lane = 0; lane < 3; ++lane) __builtin_memcpy(&words[lane], data + lane * third + i, 8);
    a = _mm_crc32_u64(a, words[0]);
    b = _mm_crc32_u64(b, words[1]);
    c = _mm_crc32_u64(c, words[2]);
  }
  int64_t i = 3 * third;
  for (; i + 8 <= size; i += 8) {
    uint64_t word;
    __builtin_memcpy(&word, data + i, 8);
    c = _mm_crc32_u64(c, word);
  }
  for (; i < size; ++i) c = _mm_crc32_u8(static_cast<uint32_t>(c), data[i]);
  if (third == 0) return ~static_cast<uint32_t>(c);
  const uint32_t first_two = combine(~static_cast<uint32_t>(a), ~static_cast<uint32_t>(b), third);
  return combine(first_two, ~static_cast<uint32_t>(c), size - 2 * third);
}
#endif

}  // namespace

MaskSummary mask_to_bits(const uint8_t* mask, int64_t n, uint64_t* bits, int threads) {
  return summary(scan(mask, n, bits, threads), n);
}

MaskSummary summarize_bits(const uint64_t* bits, int64_t n, int threads) { return summary(scan(bits, n, threads), n); }

void bits_to_mask(const uint64_t* bits, int64_t n, uint8_t* mask, int threads) {
  const int64_t words = words_of(n);
#pragma omp parallel for num_threads(std::max(threads, 1)) schedule(static) if (words > kBlock)
  for (int64_t w = 0; w < words; ++w) {
    for (int64_t i = 64 * w; i < std::min(64 * w + 64, n); i += 8) {
      const uint64_t bytes = spread_bits(static_cast<uint8_t>(bits[w] >> (i - 64 * w)));
      std::memcpy(mask + i, &bytes, std::min<int64_t>(8, n - i));
    }
  }
}

void encode_positions(PositionFormat format, const uint64_t* bits, int64_t n, uint8_t* out, int threads) {
  if (n == 0) return;
  if (format == PositionFormat::bitmap) {
    std::memcpy(out, bits, (n + 7) / 8);
    return;
  }
  const std::vector<Part> parts = scan(bits, n, threads);
  const int64_t words = words_of(n), blocks = (words + kBlock - 1) / kBlock, count = static_cast<int64_t>(parts.size());
#pragma omp parallel for num_threads(count) schedule(static, 1) if (count > 1)
  for (int64_t p = 0; p < count; ++p) {
    const Part& part = parts[p];
    if (format == PositionFormat::hierarchical) {
      uint8_t* groups = out + words + part.groups_before;
      kernels().encode_hierarchical(bits, part.begin, part.end, out, groups, groups + part.tally.groups);
    } else if (format == PositionFormat::delta8) {
      kernels().encode_delta8(bits, part.begin, part.end, part.next, out + part.count_before + part.escapes_before);
    } else {
      kernels().encode_block16(bits, part.begin, part.end, out, out + 4 * blocks + 2 * part.count_before);
    }
  }
}

bool decode_positions(PositionFormat format, const uint8_t* data, int64_t size, int64_t n, uint64_t* bits,
                      int threads) {
  switch (format) {
    case PositionFormat::bitmap:
      return decode_bitmap(data, size, n, bits);
    case PositionFormat::hierarchical:
      return decode_hierarchical(data, size, n, bits, threads);
    case PositionFormat::delta8:
      return decode_delta8(data, size, n, bits);
    case PositionFormat::block16:
      return decode_block16(data, size, n, bits, threads);
  }
  return false;
}

void gather_values(const void* dense, int element_size, const uint64_t* bits, int64_t n, void* values, int threads) {
  if (element_size == 2)
    gather(static_cast<const uint16_t*>(dense), bits, n, static_cast<uint16_t*>(values), threads);
  else if (element_size == 4)
    gather(static_cast<const uint32_t*>(dense), bits, n, static_cast<uint32_t*>(values), threads);
  else
    gather(static_cast<const uint64_t*>(dense), bits, n, static_cast<uint64_t*>(values), threads);
}

void scatter_values(const void* values, int element_size, const uint64_t* bits, int64_t n, void* dense, bool keep,
                    int threads) {
  if (element_size == 2)
    scatter(static_cast<const uint16_t*>(values), bits, n, static_cast<uint16_t*>(dense), keep, threads);
  else if (element_size == 4)
    scatter(static_cast<const uint32_t*>(values), bits, n, static_cast<uint32_t*>(dense), keep, threads);
  else
    scatter(static_cast<const uint64_t*>(values), bits, n, static_cast<uint64_t*>(dense), keep, threads);
}

uint32_t crc32c(const uint8_t* data, int64_t size, int threads) {
  constexpr int64_t kMinPart = 1 << 18;  // bytes below which a second thread costs more than it saves
  const int64_t count = std::clamp<int64_t>(size / kMinPart, 1, std::max(threads, 1));
  std::vector<uint32_t> crcs(count);
#pragma omp parallel for num_threads(count) schedule(static, 1) if (count > 1)
  for (int64_t p = 0; p < count; ++p) {
    const int64_t begin = size * p / count, end = size * (p + 1) / count;
#ifdef SPARSEBILEVEL_X86
    if (isa() != Isa::scalar) {
      crcs[p] = crc_by_instruction(data + begin, end - begin);
      continue;
    }
#endif
    crcs[p] = crc_by_table(data + begin, end - begin);
  }
  for (int64_t p = 1; p < count; ++p) crcs[0] = combine(crcs[0], crcs[p], size * (p + 1) / count - size * p / count);
  return crcs[0];
}

}  // namespace sparsebilevel
