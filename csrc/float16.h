// Conversions of single numbers between float, IEEE half and bfloat16. Rounding is to nearest, ties to even.
#pragma once

#include <bit>
#include <cstdint>

namespace optlm {

inline float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16;
  const uint32_t exponent = bits >> 10 & 0x1f;
  const uint32_t fraction = bits & 0x3ff;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000 | fraction << 13);
  if (exponent > 0) return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
  const float subnormal = static_cast<float>(fraction) * 0x1p-24f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(subnormal));
}

// Values beyond the range of a half become its largest number, so that a cache never holds infinity.
inline uint16_t float_to_half(float value) {
  const uint16_t sign = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16 & 0x8000);
  float magnitude = value < 0.0f ? -value : value;
  if (!(magnitude <= 65504.0f)) magnitude = 65504.0f;
  if (magnitude < 0x1p-14f) {
    // Adding 0.5 * 2^-13... places the last kept bit at 2^-24 and lets the adder round.
    const float shifted = magnitude + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0.5f)));
  }
  const uint32_t bits = std::bit_cast<uint32_t>(magnitude);
  const uint32_t rounded = bits + 0xfff + (bits >> 13 & 1);
  const uint32_t half = (rounded >> 13) - (112u << 10);
  return static_cast<uint16_t>(sign | (half > 0x7bff ? 0x7bff : half));
}

}  // namespace optlm
