// bfloat16 in memory: arithmetic is in float32.
#pragma once

#include <cstdint>
#include <cstring>

namespace sparsebilevel {

// As it is stored: the upper half of a float32.
struct Bfloat16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(Bfloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// The nearest, the even one of two.
inline Bfloat16 to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = value != value ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
  return {static_cast<uint16_t>(bits >> 16)};
}

inline void assign(float& to, float value) { to = value; }
inline void assign(Bfloat16& to, float value) { to = to_bfloat16(value); }

enum class Element { float32, bfloat16 };

// visit(E{}) for the type E that stands for `element`.
template <typename Visit>
auto with_element(Element element, Visit visit) {
  return element == Element::bfloat16 ? visit(Bfloat16{}) : visit(float{});
}

}  // namespace sparsebilevel
