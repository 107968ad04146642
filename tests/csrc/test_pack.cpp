// Masks as bits, positions, values and the checksum against plain loops, in buffers of exactly the sizes that are told,
// so that a sanitizer sees a step outside; and damaged positions, which must be refused or be those of some mask.
#include "pack.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "isa.h"

namespace {

using namespace sparsebilevel;

std::mt19937_64 random_bits(0);

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }

// Memory of exactly this size: a vector may have more.
template <class T>
struct Buffer {
  int64_t size;
  std::unique_ptr<T[]> memory;
  explicit Buffer(int64_t n) : size(n), memory(new T[n]) { std::memset(memory.get(), 0xa5, n * sizeof(T)); }
  T* data() const { return memory.get(); }
  T& operator[](int64_t i) const { return memory[i]; }
  bool operator==(const Buffer& other) const {
    return size == other.size && std::equal(data(), data() + size, other.data());
  }
};

void require(bool condition, const char* what, int64_t n, int threads) {
  if (condition) return;
  std::fprintf(stderr, "%s: n=%lld isa=%d threads=%d\n", what, static_cast<long long>(n), static_cast<int>(isa()), threads);
  std::exit(1);
}

uint32_t plain_crc(const uint8_t* data, int64_t size) {
  uint32_t crc = ~0u;
  for (int64_t i = 0; i < size; ++i) {
    crc ^= data[i];
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
  }
  return ~crc;
}

template <class T>
void check_values(const std::vector<int64_t>& positions, const Buffer<uint64_t>& bits, int64_t n, int threads) {
  const int64_t count = static_cast<int64_t>(positions.size());
  const Buffer<T> dense(n), values(count), old(n);
  for (int64_t i = 0; i < n; ++i) dense[i] = static_cast<T>(random_bits());
  gather_values(dense.data(), sizeof(T), bits.data(), n, values.data(), threads);
  for (int64_t i = 0; i < count; ++i) require(values[i] == dense[positions[i]], "gather", n, threads);
  for (const bool keep : {false, true}) {
    const Buffer<T> out(n), expected(n);
    if (!keep) std::fill_n(expected.data(), n, T{0});
    for (int64_t i = 0; i < count; ++i) expected[positions[i]] = values[i];
    scatter_values(values.data(), sizeof(T), bits.data(), n, out.data(), keep, threads);
    require(out == expected, keep ? "scatter, keep" : "scatter", n, threads);
  }
}

// Whatever was done to the bytes: refused, or what encode_positions writes for the bits that were read.
void check_damaged(PositionFormat format, const Buffer<uint8_t>& original, int64_t n, int threads) {
  for (int repeat = 0; repeat < 4; ++repeat) {
    const Buffer<uint8_t> data(std::max<int64_t>(0, original.size + draw(-2, 2)));
    std::copy_n(original.data(), std::min(original.size, data.size), data.data());
    for (int64_t change = draw(0, 2); change > 0 && data.size > 0; --change)
      data[draw(0, draw(0, 1) ? std::min<int64_t>(8, data.size - 1) : data.size - 1)] = static_cast<uint8_t>(random_bits());
    const Buffer<uint64_t> bits((n + 63) / 64);
    if (!decode_positions(format, data.data(), data.size, n, bits.data(), threads)) continue;
    const MaskSummary s = summarize_bits(bits.data(), n, threads);
    const int64_t size = format == PositionFormat::bitmap         ? (n + 7) / 8
                         : format == PositionFormat::hierarchical ? s.hierarchical_size
                         : format == PositionFormat::delta8       ? s.delta8_size
                                                                  : 4 * ((n + 65535) / 65536) + 2 * s.count;
    require(size == data.size, "accepted size", n, threads);
    const Buffer<uint8_t> again(size);
    encode_positions(format, bits.data(), n, again.data(), threads);
    require(again == data, "accepted bytes", n, threads);
  }
}

void check(int64_t n, double density) {
  const Buffer<uint8_t> mask(n);
  std::vector<int64_t> positions;
  const int64_t zeros_before = draw(0, 2) == 0 ? draw(0, n) : 0;
  for (int64_t i = 0; i < n; ++i) {
    mask[i] = i >= zeros_before && std::uniform_real_distribution<>(0, 1)(random_bits) < density;
    if (mask[i]) positions.push_back(i);
  }
  MaskSummary first{};
  std::vector<std::unique_ptr<Buffer<uint8_t>>> encoded;
  for (const Isa wanted : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    set_isa(wanted);  // as far as the processor goes
    for (const int threads : {1, 2, 5}) {
      const Buffer<uint64_t> bits((n + 63) / 64);
      const MaskSummary s = mask_to_bits(mask.data(), n, bits.data(), threads);
      if (encoded.empty()) first = s;
      require(s.count == static_cast<int64_t>(positions.size()), "count", n, threads);
      require(s.hash == first.hash && s.hierarchical_size == first.hierarchical_size && s.delta8_size == first.delta8_size,
              "summary", n, threads);
      const Buffer<uint8_t> back(n);
      bits_to_mask(bits.data(), n, back.data(), threads);
      require(back == mask, "bits_to_mask", n, threads);
      const int64_t sizes[] = {(n + 7) / 8, s.hierarchical_size, s.delta8_size, 4 * ((n + 65535) / 65536) + 2 * s.count};
      for (int f = 0; f < 4; ++f) {
        const auto format = static_cast<PositionFormat>(2 + f);
        auto out = std::make_unique<Buffer<uint8_t>>(sizes[f]);
        encode_positions(format, bits.data(), n, out->data(), threads);
        const Buffer<uint64_t> read(bits.size);
        require(decode_positions(format, out->data(), out->size, n, read.data(), threads), "decode", n, threads);
        require(read == bits, "decoded bits", n, threads);
        check_damaged(format, *out, n, threads);
        if (encoded.size() < 4)
          encoded.push_back(std::move(out));
        else
          require(*out == *encoded[f], "encode", n, threads);
      }
      check_values<uint16_t>(positions, bits, n, threads);
      check_values<uint32_t>(positions, bits, n, threads);
      check_values<uint64_t>(positions, bits, n, threads);
      require(crc32c(mask.data(), n, threads) == plain_crc(mask.data(), n), "crc32c", n, threads);
    }
  }
}

}  // namespace

int main() {
  for (int64_t n = 0; n <= 200; n += draw(1, 3))
    for (const double density : {0.0, 0.01, 0.1, 0.5, 1.0}) check(n, density);
  for (const double density : {0.001, 0.02, 0.3}) {
    check(draw(201, 5000), density);
    check(draw(1 << 16, 1 << 18), density);  // shared among threads
  }
  check((1 << 22) + 5, 0.01);  // written past the caches
  std::puts("ok");
}
