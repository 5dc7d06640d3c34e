// Element types.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace wemm {

struct bfloat16 {
  std::uint16_t bits;
};

WEMM_INLINE float to_float(float x) { return x; }

WEMM_INLINE float to_float(bfloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
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

}  // namespace wemm
