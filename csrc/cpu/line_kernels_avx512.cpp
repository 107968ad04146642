// Line kernels for AVX-512: a line is a register.
#include "line_kernels.h"

#ifdef SPARSEBILEVEL_X86
#include <immintrin.h>

SPARSEBILEVEL_BEGIN_AVX512
namespace sparsebilevel {
namespace {

struct Vector {
  using Type = __m512;
  static constexpr int kWidth = 16, kMaxTile = 28;
  static Type load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Type v) { _mm512_storeu_ps(p, v); }
  static Type zero() { return _mm512_setzero_ps(); }
  static Type broadcast(float x) { return _mm512_set1_ps(x); }
  static Type fma(Type a, Type b, Type c) { return _mm512_fmadd_ps(a, b, c); }
  static Type add(Type a, Type b) { return _mm512_add_ps(a, b); }
  static Type unpack_lo(Type a, Type b) { return _mm512_unpacklo_ps(a, b); }
  static Type unpack_hi(Type a, Type b) { return _mm512_unpackhi_ps(a, b); }
  static Type unpack_lo_pair(Type a, Type b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static Type unpack_hi_pair(Type a, Type b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static Type fold_two(Type a, Type b) {
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
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
  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Type max(Type a, Type b) { return _mm512_max_ps(a, b); }
  static Type keep_first(Type v, int n) {
    return n >= kWidth ? v : _mm512_maskz_mov_ps(n > 0 ? first(n) : 0, v);
  }
  static Type where_positive(Type x, Type v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, zero(), _CMP_GT_OQ), v);
  }
  static Type where_equal(Type x, Type y, Type v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, y, _CMP_EQ_OQ), v);
  }
  static Type where_different(Type x, Type y, Type v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, y, _CMP_NEQ_UQ), v);
  }
  static Type max_or_nan(Type a, Type b) {
    return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
  }
  static Type load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store_first(float* p, Type v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }

  static Type widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
  static __m256i narrow(Type v) {  // to the nearest, to even of two
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(
        _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet), 16));
  }
  static Type load(const Bfloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void store(Bfloat16* p, Type v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
  static Type load_first(const Bfloat16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
  static void store_first(Bfloat16* p, Type v, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(v)); }
};

#include "line_kernels_inc.h"

}  // namespace

const LineKernels& line_kernels_avx512() {
  static const LineKernels table = make_table();
  return table;
}

}  // namespace sparsebilevel
SPARSEBILEVEL_END_ISA
#endif
