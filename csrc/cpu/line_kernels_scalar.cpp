// Line kernels for any processor: groups of four lanes as the compiler's own vector type.
#include "line_kernels.h"

namespace sparsebilevel {
namespace {

struct Vector {
  typedef float Type __attribute__((vector_size(16), aligned(4)));
  typedef int32_t Index __attribute__((vector_size(16)));
  static constexpr int kWidth = 4, kMaxTile = 12;
  static Type load(const float* p) { return *reinterpret_cast<const Type*>(p); }
  static void store(float* p, Type v) { *reinterpret_cast<Type*>(p) = v; }
  static Type zero() { return Type{}; }
  static Type broadcast(float x) { return Type{x, x, x, x}; }
  static Type fma(Type a, Type b, Type c) { return a * b + c; }
  static Type add(Type a, Type b) { return a + b; }
  static Type unpack_lo(Type a, Type b) { return Type{a[0], b[0], a[1], b[1]}; }
  static Type unpack_hi(Type a, Type b) { return Type{a[2], b[2], a[3], b[3]}; }
  static Type unpack_lo_pair(Type a, Type b) { return Type{a[0], a[1], b[0], b[1]}; }
  static Type unpack_hi_pair(Type a, Type b) { return Type{a[2], a[3], b[2], b[3]}; }
  static Type fold(const Type* v) { return v[0]; }
  static void transpose_groups(Type*) {}
  static Type max(Type a, Type b) { return a > b ? a : b; }
  static Type keep_first(Type v, int n) {
    for (int i = n < 0 ? 0 : n; i < kWidth; ++i) v[i] = 0;
    return v;
  }
  static Type where_positive(Type x, Type v) { return x > zero() ? v : zero(); }
  static Type where_equal(Type x, Type y, Type v) { return x == y ? v : zero(); }
  static Type where_different(Type x, Type y, Type v) { return x == y ? zero() : v; }
  static Type max_or_nan(Type a, Type b) { return (a > b) | (a != a) ? a : b; }
  static Type load_first(const float* p, int n) {
    Type v = zero();
    for (int i = 0; i < n; ++i) v[i] = p[i];
    return v;
  }
  static void store_first(float* p, Type v, int n) {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }

  typedef uint32_t Bits __attribute__((vector_size(16)));
  static Type load(const Bfloat16* p) { return load_first(p, kWidth); }
  static void store(Bfloat16* p, Type v) { store_first(p, v, kWidth); }
  static Type load_first(const Bfloat16* p, int n) {
    Bits bits{};
    for (int i = 0; i < n; ++i) bits[i] = static_cast<uint32_t>(p[i].bits) << 16;
    return reinterpret_cast<Type>(bits);
  }
  static void store_first(Bfloat16* p, Type v, int n) {  // rounds to the nearest, to even of two
    const Bits bits = reinterpret_cast<Bits>(v), rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    for (int i = 0; i < n; ++i) p[i].bits = static_cast<uint16_t>((v[i] != v[i] ? bits[i] | 0x400000u : rounded[i]) >> 16);
  }
};

#include "line_kernels_inc.h"

}  // namespace

const LineKernels& line_kernels_scalar() {
  static const LineKernels table = make_table();
  return table;
}

}  // namespace sparsebilevel
