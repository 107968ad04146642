// Sparse messages (docs/message-format.md): a mask as bits, its positions in four formats, the values at them, and the
// checksum. Bit i of the words `bits` [(n + 63) / 64] is element i of a flat mask [n]; bits beyond n are zero. Nothing
// depends on `threads`. Words and files share their byte order on little-endian machines, the only ones that are built.
#pragma once

#include <cstdint>

namespace sparsebilevel {

enum class PositionFormat { bitmap = 2, hierarchical = 3, delta8 = 4, block16 = 5 };

struct MaskSummary {
  int64_t count;                        // bits that are set
  uint64_t hash;                        // of all bits
  int64_t hierarchical_size, delta8_size;  // bytes of these formats; those of the others follow from n and count
};

// Writes the bits of a mask, any non-zero byte of which is true.
MaskSummary mask_to_bits(const uint8_t* mask, int64_t n, uint64_t* bits, int threads);
MaskSummary summarize_bits(const uint64_t* bits, int64_t n, int threads);
void bits_to_mask(const uint64_t* bits, int64_t n, uint8_t* mask, int threads);

// Writes the positions of the bits, as many bytes as the format needs.
void encode_positions(PositionFormat format, const uint64_t* bits, int64_t n, uint8_t* out, int threads);

// Reads `size` untrusted bytes. False where they are not exactly what encode_positions writes for some n bits; the words
// then hold anything.
bool decode_positions(PositionFormat format, const uint8_t* data, int64_t size, int64_t n, uint64_t* bits, int threads);

// Elements of 2, 4 or 8 bytes. `values` holds one for each bit that is set, `dense` one for each of the n.
void gather_values(const void* dense, int element_size, const uint64_t* bits, int64_t n, void* values, int threads);

// The other way; all other elements become zero, or with `keep` stay as they are, untouched.
void scatter_values(const void* values, int element_size, const uint64_t* bits, int64_t n, void* dense, bool keep,
                    int threads);

// CRC-32C (Castagnoli), as in iSCSI: that of "123456789" is 0xe3069283.
uint32_t crc32c(const uint8_t* data, int64_t size, int threads);

}  // namespace sparsebilevel
