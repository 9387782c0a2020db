// The virtual vector as two 256-bit registers, and the kernels built on it. Needs AVX2, FMA and F16C.
#include <immintrin.h>

#include <cstdint>

#define OPTLM_ISA avx2
#define OPTLM_ISA_NAME "avx2"

namespace optlm::avx2 {

struct Float { __m256 lo, hi; };
struct Bytes { __m256i lo, hi; };  // 64 bytes, or 16 int32

#define OPTLM_INLINE inline __attribute__((always_inline))
#define OPTLM_BOTH(op, ...) {op(a.lo __VA_OPT__(, ) __VA_ARGS__), op(a.hi __VA_OPT__(, ) __VA_ARGS__)}
#define OPTLM_PAIR(op) {op(a.lo, b.lo), op(a.hi, b.hi)}

OPTLM_INLINE Float load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
OPTLM_INLINE void store(float* p, Float a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
OPTLM_INLINE Float splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
OPTLM_INLINE Float add(Float a, Float b) { return OPTLM_PAIR(_mm256_add_ps); }
OPTLM_INLINE Float sub(Float a, Float b) { return OPTLM_PAIR(_mm256_sub_ps); }
OPTLM_INLINE Float mul(Float a, Float b) { return OPTLM_PAIR(_mm256_mul_ps); }
OPTLM_INLINE Float fma(Float a, Float b, Float c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
OPTLM_INLINE Float max(Float a, Float b) { return OPTLM_PAIR(_mm256_max_ps); }
OPTLM_INLINE Float min(Float a, Float b) { return OPTLM_PAIR(_mm256_min_ps); }
OPTLM_INLINE Float div(Float a, Float b) { return OPTLM_PAIR(_mm256_div_ps); }
OPTLM_INLINE __m256 where_positive_half(__m256 x, __m256 then, __m256 otherwise) {
  return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ));
}
OPTLM_INLINE Float where_positive(Float x, Float then, Float otherwise) {
  return {where_positive_half(x.lo, then.lo, otherwise.lo), where_positive_half(x.hi, then.hi, otherwise.hi)};
}
OPTLM_INLINE Float abs(Float a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
OPTLM_INLINE Float round(Float a) {
  return OPTLM_BOTH(_mm256_round_ps, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
OPTLM_INLINE __m256 power_of_two_half(__m256 n) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
OPTLM_INLINE Float power_of_two(Float a) { return OPTLM_BOTH(power_of_two_half); }

// Lanes fold 8, 4, 2, 1.
OPTLM_INLINE float fold_sum(Float a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
OPTLM_INLINE float largest_of(Float a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

OPTLM_INLINE __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
OPTLM_INLINE __m256 widen_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(p)), 16));
}
OPTLM_INLINE Float load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
OPTLM_INLINE Float load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(load_128(p)), _mm256_cvtph_ps(load_128(p + 8))};
}
OPTLM_INLINE void store_half(uint16_t* p, Float a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}

OPTLM_INLINE Bytes load_bytes(const void* p) {
  const auto* source = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(source), _mm256_loadu_si256(source + 1)};
}
OPTLM_INLINE void store_bytes(void* p, Bytes a) {
  auto* target = static_cast<__m256i*>(p);
  _mm256_storeu_si256(target, a.lo);
  _mm256_storeu_si256(target + 1, a.hi);
}
OPTLM_INLINE Bytes splat_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
OPTLM_INLINE Bytes add_int(Bytes a, Bytes b) { return OPTLM_PAIR(_mm256_add_epi32); }
OPTLM_INLINE Float to_float(Bytes a) { return OPTLM_BOTH(_mm256_cvtepi32_ps); }
OPTLM_INLINE Bytes to_int(Float a) { return OPTLM_BOTH(_mm256_cvtps_epi32); }
OPTLM_INLINE void store_low_bytes(void* p, Bytes a) {  // the low byte of each of 16 int32
  int32_t wide[16];
  store_bytes(wide, a);
  for (int i = 0; i < 16; ++i) static_cast<uint8_t*>(p)[i] = static_cast<uint8_t>(wide[i]);
}
OPTLM_INLINE __m256 widen_int8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
OPTLM_INLINE Float load_int8(const int8_t* p) { return {widen_int8(p), widen_int8(p + 8)}; }
OPTLM_INLINE int32_t sum_of(Bytes a) {
  const __m256i eight = _mm256_add_epi32(a.lo, a.hi);
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
OPTLM_INLINE uint64_t nonzero_mask(Bytes a) {
  const __m256i zero = _mm256_setzero_si256();
  const auto lo = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(a.lo, zero)));
  const auto hi = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(a.hi, zero)));
  return ~(uint64_t{hi} << 32 | lo);
}
// vpmaddubsw would saturate at 16 bits, so even and odd bytes are widened and multiplied apart: exact.
OPTLM_INLINE __m256i dot4_half(__m256i c, __m256i a, __m256i b) {
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(0xff)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
  return _mm256_add_epi32(c, _mm256_add_epi32(even, odd));
}
OPTLM_INLINE Bytes dot4(Bytes c, Bytes a, Bytes b) {
  return {dot4_half(c.lo, a.lo, b.lo), dot4_half(c.hi, a.hi, b.hi)};
}
OPTLM_INLINE Bytes unpack_low8(Bytes a, Bytes b) { return OPTLM_PAIR(_mm256_unpacklo_epi8); }
OPTLM_INLINE Bytes unpack_high8(Bytes a, Bytes b) { return OPTLM_PAIR(_mm256_unpackhi_epi8); }
OPTLM_INLINE Bytes unpack_low16(Bytes a, Bytes b) { return OPTLM_PAIR(_mm256_unpacklo_epi16); }
OPTLM_INLINE Bytes unpack_high16(Bytes a, Bytes b) { return OPTLM_PAIR(_mm256_unpackhi_epi16); }

// 16 registers: one token's 8 accumulators leave room for weights and the widened input.
inline constexpr int kTileTokens = 1;

}  // namespace optlm::avx2

#include "kernels_simd.inl"

namespace optlm {
const Kernels& avx2_kernels() { return avx2::table(); }
}  // namespace optlm
