// Element types, and the attribute that compiles a function once per instruction set; the loader
// picks the best one the machine has.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define WEMM_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WEMM_MULTIVERSION
#endif

namespace wemm {

struct bfloat16 {
  std::uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(bfloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

// Round to nearest even; NaN stays NaN.
template <>
inline bfloat16 from_float<bfloat16>(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t rounded = bits + 0x7FFF + ((bits >> 16) & 1);
  return {static_cast<std::uint16_t>(x != x ? 0x7FC0 : rounded >> 16)};
}

}  // namespace wemm
