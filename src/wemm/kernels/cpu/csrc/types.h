// Element types.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace wemm {

struct bfloat16 {
  std::uint16_t bits;
};

struct float16 {
  std::uint16_t bits;
};

WEMM_INLINE float to_float(float x) { return x; }

WEMM_INLINE float to_float(std::int8_t x) { return x; }

WEMM_INLINE float to_float(bfloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Exact. In every case all three are computed and one is taken, which compilers turn into vectors.
WEMM_INLINE float to_float(float16 x) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7FFF) << 13;
  const std::uint32_t normal = magnitude + (112u << 23);        // exponents count from -127, not from -15
  const std::uint32_t not_finite = magnitude + (224u << 23);    // the largest stays the largest
  const std::uint32_t shifted = magnitude + (113u << 23), smallest_normal = 113u << 23;
  float value, offset;
  std::memcpy(&value, &shifted, sizeof value);
  std::memcpy(&offset, &smallest_normal, sizeof offset);
  value -= offset;
  std::uint32_t subnormal;
  std::memcpy(&subnormal, &value, sizeof subnormal);
  std::uint32_t bits = magnitude < (1u << 23) ? subnormal : normal;
  bits = magnitude < (31u << 23) ? bits : not_finite;
  bits |= static_cast<std::uint32_t>(x.bits & 0x8000) << 16;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
T from_float(float x);

template <>
WEMM_INLINE float from_float<float>(float x) {
  return x;
}

// Round to nearest even; NaN stays NaN.
template <>
WEMM_INLINE bfloat16 from_float<bfloat16>(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t rounded = bits + 0x7FFF + ((bits >> 16) & 1);
  return {static_cast<std::uint16_t>(x != x ? 0x7FC0 : rounded >> 16)};
}

// The same; from 65520 on, infinity.
template <>
WEMM_INLINE float16 from_float<float16>(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t sign = bits & 0x80000000u, magnitude = bits ^ sign;
  const std::uint32_t normal = (magnitude + 0xFFF + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  float value;
  std::memcpy(&value, &magnitude, sizeof value);
  value += 0.5f;  // its last bit is worth what a subnormal's is: the sum is rounded where it should be
  std::uint32_t subnormal;
  std::memcpy(&subnormal, &value, sizeof subnormal);
  subnormal -= 126u << 23;
  std::uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude < 0x477FF000u ? half : 0x7C00u;
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  return {static_cast<std::uint16_t>(half | sign >> 16)};
}

}  // namespace wemm
