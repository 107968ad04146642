// Floats side by side in a register, for each instruction set: ScalarVector, Avx2Vector and Avx512Vector. Inner loops are
// written once (*_inc.h) and included for each of them inside a namespace of its own, where `Vector` is one of these.
//
// All have: Type; kWidth, the number of lanes (4, 8 or 16); zero, broadcast; add, sub, mul, div, sqrt; fma, a * b + c; max,
// the second argument if one is NaN; max_or_nan, NaN if either is.
// load, store, of float32 and of bfloat16, rounded to the nearest and to the even one of two; load_first and store_first
// touch the first n elements only; load_lanes those whose bit is set.
// keep_first, with zero in all lanes but the first n (any n); where_passing(x, v), zero where x <= 0, else v, as in torch's
// ReLU; where_equal and where_different(x, y, v) likewise.
// On each group of four lanes unpack_lo/hi (32 bits) and unpack_lo/hi_pair (64 bits); of kWidth / 4 vectors, fold, which
// adds up their groups into one, and transpose_groups.
// rounded, the value as it is stored: no product before it becomes part of a fused multiply-add after it.
#pragma once

#include <cstdint>

#include "bfloat16.h"
#include "isa.h"
#ifdef SPARSEBILEVEL_X86
#include <immintrin.h>
#endif

namespace sparsebilevel {

// Four lanes of the compiler's own vector type: as much as every 64-bit processor has.
struct ScalarVector {
  using Type = float __attribute__((vector_size(16)));
  using Bits = uint32_t __attribute__((vector_size(16)));
  static constexpr int kWidth = 4;
  static Type zero() { return Type{}; }
  static Type broadcast(float x) { return Type{x, x, x, x}; }
  static Type add(Type a, Type b) { return a + b; }
  static Type sub(Type a, Type b) { return a - b; }
  static Type mul(Type a, Type b) { return a * b; }
  static Type div(Type a, Type b) { return a / b; }
  static Type sqrt(Type a) {
    return Type{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
  }
  static Type fma(Type a, Type b, Type c) { return a * b + c; }
  static Type max(Type a, Type b) { return a > b ? a : b; }
  static Type max_or_nan(Type a, Type b) { return (a > b) | (a != a) ? a : b; }
  static Type rounded(Type a) { return a; }

  static Type load(const float* p) {
    Type v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, Type v) { __builtin_memcpy(p, &v, sizeof v); }
  static Type load_first(const float* p, int n) {
    Type v{};
    for (int i = 0; i < n; ++i) v[i] = p[i];
    return v;
  }
  static void store_first(float* p, Type v, int n) {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
  static Type load_lanes(const float* p, uint32_t bits) {
    const Bits wanted = Bits{1, 2, 4, 8} & bits;
    return wanted != Bits{} ? load(p) : Type{};
  }

  static Type load(const Bfloat16* p) { return load_first(p, kWidth); }
  static void store(Bfloat16* p, Type v) { store_first(p, v, kWidth); }
  static Type load_first(const Bfloat16* p, int n) {
    Bits bits{};
    for (int i = 0; i < n; ++i) bits[i] = static_cast<uint32_t>(p[i].bits) << 16;
    return reinterpret_cast<Type>(bits);
  }
  static void store_first(Bfloat16* p, Type v, int n) {
    const Bits bits = reinterpret_cast<Bits>(v), nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
    for (int i = 0; i < n; ++i) p[i].bits = static_cast<uint16_t>((v[i] != v[i] ? bits[i] | 0x400000u : nearest[i]) >> 16);
  }

  static Type keep_first(Type v, int n) {
    for (int i = n < 0 ? 0 : n; i < kWidth; ++i) v[i] = 0;
    return v;
  }
  static Type where_passing(Type x, Type v) { return x <= zero() ? zero() : v; }
  static Type where_equal(Type x, Type y, Type v) { return x == y ? v : zero(); }
  static Type where_different(Type x, Type y, Type v) { return x == y ? zero() : v; }

  static Type unpack_lo(Type a, Type b) { return Type{a[0], b[0], a[1], b[1]}; }
  static Type unpack_hi(Type a, Type b) { return Type{a[2], b[2], a[3], b[3]}; }
  static Type unpack_lo_pair(Type a, Type b) { return Type{a[0], a[1], b[0], b[1]}; }
  static Type unpack_hi_pair(Type a, Type b) { return Type{a[2], a[3], b[2], b[3]}; }
  static Type fold(const Type* v) { return v[0]; }
  static void transpose_groups(Type*) {}
};

#ifdef SPARSEBILEVEL_X86
SPARSEBILEVEL_BEGIN_AVX2
struct Avx2Vector {
  using Type = __m256;
  static constexpr int kWidth = 8;
  static Type zero() { return _mm256_setzero_ps(); }
  static Type broadcast(float x) { return _mm256_set1_ps(x); }
  static Type add(Type a, Type b) { return _mm256_add_ps(a, b); }
  static Type sub(Type a, Type b) { return _mm256_sub_ps(a, b); }
  static Type mul(Type a, Type b) { return _mm256_mul_ps(a, b); }
  static Type div(Type a, Type b) { return _mm256_div_ps(a, b); }
  static Type sqrt(Type a) { return _mm256_sqrt_ps(a); }
  static Type fma(Type a, Type b, Type c) { return _mm256_fmadd_ps(a, b, c); }
  static Type max(Type a, Type b) { return _mm256_max_ps(a, b); }
  static Type max_or_nan(Type a, Type b) {
    return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  }
  static Type rounded(Type a) {
    asm("" : "+x"(a));
    return a;
  }

  static Type load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Type v) { _mm256_storeu_ps(p, v); }
  static Type load_first(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static void store_first(float* p, Type v, int n) { _mm256_maskstore_ps(p, first(n), v); }
  static Type load_lanes(const float* p, uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i wanted = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
    return _mm256_and_ps(load(p), _mm256_castsi256_ps(_mm256_cmpeq_epi32(wanted, lane)));
  }

  static Type load(const Bfloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static void store(Bfloat16* p, Type v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(nearest, quiet, nan), 16);
    const __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow);
  }
  static Type load_first(const Bfloat16* p, int n) {
    Bfloat16 whole[kWidth] = {};
    for (int i = 0; i < n; ++i) whole[i] = p[i];
    return load(whole);
  }
  static void store_first(Bfloat16* p, Type v, int n) {
    Bfloat16 whole[kWidth];
    store(whole, v);
    for (int i = 0; i < n; ++i) p[i] = whole[i];
  }

  static Type keep_first(Type v, int n) { return _mm256_and_ps(v, _mm256_castsi256_ps(first(n))); }
  static Type where_passing(Type x, Type v) { return _mm256_and_ps(v, _mm256_cmp_ps(x, zero(), _CMP_NLE_UQ)); }
  static Type where_equal(Type x, Type y, Type v) { return _mm256_and_ps(v, _mm256_cmp_ps(x, y, _CMP_EQ_OQ)); }
  static Type where_different(Type x, Type y, Type v) { return _mm256_and_ps(v, _mm256_cmp_ps(x, y, _CMP_NEQ_UQ)); }

  static Type unpack_lo(Type a, Type b) { return _mm256_unpacklo_ps(a, b); }
  static Type unpack_hi(Type a, Type b) { return _mm256_unpackhi_ps(a, b); }
  static Type unpack_lo_pair(Type a, Type b) {
    return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
  }
  static Type unpack_hi_pair(Type a, Type b) {
    return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
  }
  static Type fold(const Type* v) {
    return add(_mm256_permute2f128_ps(v[0], v[1], 0x20), _mm256_permute2f128_ps(v[0], v[1], 0x31));
  }
  static void transpose_groups(Type* v) {
    const Type low = _mm256_permute2f128_ps(v[0], v[1], 0x20);
    v[1] = _mm256_permute2f128_ps(v[0], v[1], 0x31);
    v[0] = low;
  }

 private:
  static __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};
SPARSEBILEVEL_END_ISA

SPARSEBILEVEL_BEGIN_AVX512
// Where a mask of all lanes is given, GCC 12 would take the form without one for the use of something uninitialised.
struct Avx512Vector {
  using Type = __m512;
  static constexpr int kWidth = 16;
  static Type zero() { return _mm512_setzero_ps(); }
  static Type broadcast(float x) { return _mm512_set1_ps(x); }
  static Type add(Type a, Type b) { return _mm512_add_ps(a, b); }
  static Type sub(Type a, Type b) { return _mm512_sub_ps(a, b); }
  static Type mul(Type a, Type b) { return _mm512_mul_ps(a, b); }
  static Type div(Type a, Type b) { return _mm512_div_ps(a, b); }
  static Type sqrt(Type a) { return _mm512_maskz_sqrt_ps(kAll, a); }
  static Type fma(Type a, Type b, Type c) { return _mm512_fmadd_ps(a, b, c); }
  static Type max(Type a, Type b) { return _mm512_maskz_max_ps(kAll, a, b); }
  static Type max_or_nan(Type a, Type b) {
    return _mm512_mask_mov_ps(max(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
  }
  static Type rounded(Type a) {
    asm("" : "+v"(a));
    return a;
  }

  static Type load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Type v) { _mm512_storeu_ps(p, v); }
  static Type load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store_first(float* p, Type v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
  static Type load_lanes(const float* p, uint32_t bits) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(bits), p);
  }

  static Type load(const Bfloat16* p) { return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void store(Bfloat16* p, Type v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrowed(v)); }
  static Type load_first(const Bfloat16* p, int n) { return widened(_mm256_maskz_loadu_epi16(first(n), p)); }
  static void store_first(Bfloat16* p, Type v, int n) { _mm256_mask_storeu_epi16(p, first(n), narrowed(v)); }

  static Type keep_first(Type v, int n) { return n >= kWidth ? v : _mm512_maskz_mov_ps(n > 0 ? first(n) : 0, v); }
  static Type where_passing(Type x, Type v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, zero(), _CMP_NLE_UQ), v);
  }
  static Type where_equal(Type x, Type y, Type v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, y, _CMP_EQ_OQ), v);
  }
  static Type where_different(Type x, Type y, Type v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, y, _CMP_NEQ_UQ), v);
  }

  static Type unpack_lo(Type a, Type b) { return _mm512_unpacklo_ps(a, b); }
  static Type unpack_hi(Type a, Type b) { return _mm512_unpackhi_ps(a, b); }
  static Type unpack_lo_pair(Type a, Type b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static Type unpack_hi_pair(Type a, Type b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static Type fold(const Type* v) { return fold_two(fold_two(v[0], v[1]), fold_two(v[2], v[3])); }
  static void transpose_groups(Type* v) {
    const Type ab_even = _mm512_shuffle_f32x4(v[0], v[1], 0x88), ab_odd = _mm512_shuffle_f32x4(v[0], v[1], 0xdd);
    const Type cd_even = _mm512_shuffle_f32x4(v[2], v[3], 0x88), cd_odd = _mm512_shuffle_f32x4(v[2], v[3], 0xdd);
    v[0] = _mm512_shuffle_f32x4(ab_even, cd_even, 0x88);
    v[1] = _mm512_shuffle_f32x4(ab_odd, cd_odd, 0x88);
    v[2] = _mm512_shuffle_f32x4(ab_even, cd_even, 0xdd);
    v[3] = _mm512_shuffle_f32x4(ab_odd, cd_odd, 0xdd);
  }

 private:
  static constexpr __mmask16 kAll = 0xffff;
  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Type fold_two(Type a, Type b) {
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  static Type widened(__m256i v) {
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAll, _mm512_maskz_cvtepu16_epi32(kAll, v), 16));
  }
  static __m256i narrowed(Type v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(kAll, bits, 16), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i chosen = _mm512_mask_mov_epi32(nearest, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
    return _mm512_maskz_cvtepi32_epi16(kAll, _mm512_maskz_srli_epi32(kAll, chosen, 16));
  }
};
SPARSEBILEVEL_END_ISA
#endif

}  // namespace sparsebilevel
