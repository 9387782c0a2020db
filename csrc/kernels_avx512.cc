// The virtual vector as one 512-bit register, and the kernels built on it. Needs AVX-512 F, BW, VL, DQ and VNNI.
#include <immintrin.h>

#include <cstdint>

#define OPTLM_ISA avx512
#define OPTLM_ISA_NAME "avx512"

namespace optlm::avx512 {

using Float = __m512;
using Bytes = __m512i;  // 64 bytes, or 16 int32

#define OPTLM_INLINE inline __attribute__((always_inline))

OPTLM_INLINE Float load(const float* p) { return _mm512_loadu_ps(p); }
OPTLM_INLINE void store(float* p, Float a) { _mm512_storeu_ps(p, a); }
OPTLM_INLINE Float splat(float x) { return _mm512_set1_ps(x); }
OPTLM_INLINE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
OPTLM_INLINE Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
OPTLM_INLINE Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
OPTLM_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
OPTLM_INLINE Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
OPTLM_INLINE Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
OPTLM_INLINE Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
OPTLM_INLINE Float where_positive(Float x, Float then, Float otherwise) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), otherwise, then);
}
OPTLM_INLINE Float abs(Float a) { return _mm512_abs_ps(a); }
OPTLM_INLINE Float round(Float a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
OPTLM_INLINE Float power_of_two(Float n) {  // 2^n for whole n in [-126, 127]
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}

// Lanes fold 8, 4, 2, 1.
OPTLM_INLINE float fold_sum(Float a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
OPTLM_INLINE float largest_of(Float a) { return _mm512_reduce_max_ps(a); }

OPTLM_INLINE Float load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
OPTLM_INLINE Float load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
OPTLM_INLINE void store_half(uint16_t* p, Float a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

OPTLM_INLINE Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
OPTLM_INLINE void store_bytes(void* p, Bytes a) { _mm512_storeu_si512(p, a); }
OPTLM_INLINE Bytes splat_int(int32_t x) { return _mm512_set1_epi32(x); }
OPTLM_INLINE Bytes add_int(Bytes a, Bytes b) { return _mm512_add_epi32(a, b); }
OPTLM_INLINE Float to_float(Bytes a) { return _mm512_cvtepi32_ps(a); }
OPTLM_INLINE Bytes to_int(Float a) { return _mm512_cvtps_epi32(a); }
OPTLM_INLINE void store_low_bytes(void* p, Bytes a) {  // the low byte of each of 16 int32
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
}
OPTLM_INLINE Float load_int8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
OPTLM_INLINE int32_t sum_of(Bytes a) { return _mm512_reduce_add_epi32(a); }
OPTLM_INLINE uint64_t nonzero_mask(Bytes a) { return _mm512_test_epi8_mask(a, a); }
// c + the sum over each four neighbouring bytes of unsigned a times signed b.
// As an instruction, not an intrinsic: GCC 12 copies the accumulator of the intrinsic around every use.
OPTLM_INLINE Bytes dot4(Bytes c, Bytes a, Bytes b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  return c;
}
OPTLM_INLINE Bytes unpack_low8(Bytes a, Bytes b) { return _mm512_unpacklo_epi8(a, b); }
OPTLM_INLINE Bytes unpack_high8(Bytes a, Bytes b) { return _mm512_unpackhi_epi8(a, b); }
OPTLM_INLINE Bytes unpack_low16(Bytes a, Bytes b) { return _mm512_unpacklo_epi16(a, b); }
OPTLM_INLINE Bytes unpack_high16(Bytes a, Bytes b) { return _mm512_unpackhi_epi16(a, b); }

// 32 registers hold 6 x 4 accumulators, 4 vectors of weights and one input.
inline constexpr int kTileTokens = 6;

}  // namespace optlm::avx512

#include "kernels_simd.inl"

namespace optlm {
const Kernels& avx512_kernels() { return avx512::table(); }
}  // namespace optlm
