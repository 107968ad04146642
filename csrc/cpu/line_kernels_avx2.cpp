// Line kernels for AVX2 with FMA: half a line in a register.
#include "line_kernels.h"

#ifdef SPARSEBILEVEL_X86
#include <immintrin.h>

SPARSEBILEVEL_BEGIN_AVX2
namespace sparsebilevel {
namespace {

struct Vector {
  using Type = __m256;
  static constexpr int kWidth = 8, kMaxTile = 14;
  static Type load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Type v) { _mm256_storeu_ps(p, v); }
  static Type zero() { return _mm256_setzero_ps(); }
  static Type broadcast(float x) { return _mm256_set1_ps(x); }
  static Type fma(Type a, Type b, Type c) { return _mm256_fmadd_ps(a, b, c); }
  static Type add(Type a, Type b) { return _mm256_add_ps(a, b); }
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
  static __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Type max(Type a, Type b) { return _mm256_max_ps(a, b); }
  static Type keep_first(Type v, int n) { return _mm256_and_ps(v, _mm256_castsi256_ps(first(n))); }
  static Type where_positive(Type x, Type v) { return _mm256_and_ps(v, _mm256_cmp_ps(x, zero(), _CMP_GT_OQ)); }
  static Type where_equal(Type x, Type y, Type v) { return _mm256_and_ps(v, _mm256_cmp_ps(x, y, _CMP_EQ_OQ)); }
  static Type where_different(Type x, Type y, Type v) { return _mm256_and_ps(v, _mm256_cmp_ps(x, y, _CMP_NEQ_UQ)); }
  static Type max_or_nan(Type a, Type b) {
    return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  }
  static Type load_first(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static void store_first(float* p, Type v, int n) { _mm256_maskstore_ps(p, first(n), v); }

  static Type load(const Bfloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static void store(Bfloat16* p, Type v) {  // rounds to the nearest, to even of two
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
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
};

#include "line_kernels_inc.h"

}  // namespace

const LineKernels& line_kernels_avx2() {
  static const LineKernels table = make_table();
  return table;
}

}  // namespace sparsebilevel
SPARSEBILEVEL_END_ISA
#endif
