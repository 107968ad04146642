// Memory for maps of either element, for the drivers.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>

#include "line_kernels.h"

namespace sparsebilevel {

// `size` elements of either kind in memory of exactly that size, NaN at first: a sanitizer sees every step beyond it.
struct Elements {
  Element element;
  int64_t size;
  std::unique_ptr<char[]> memory;

  Elements(Element e, int64_t count) : element(e), size(count), memory(new char[count * bytes()]) {
    for (int64_t i = 0; i < size; ++i) set(i, std::numeric_limits<float>::quiet_NaN());
  }
  int64_t bytes() const { return element == Element::float32 ? sizeof(float) : sizeof(Bfloat16); }
  void* data() const { return memory.get(); }
  float get(int64_t i) const {
    if (element == Element::float32) return reinterpret_cast<const float*>(memory.get())[i];
    return to_float(reinterpret_cast<const Bfloat16*>(memory.get())[i]);
  }
  void set(int64_t i, float value) {
    if (element == Element::float32)
      reinterpret_cast<float*>(memory.get())[i] = value;
    else
      reinterpret_cast<Bfloat16*>(memory.get())[i] = to_bfloat16(value);
  }
};

}  // namespace sparsebilevel
