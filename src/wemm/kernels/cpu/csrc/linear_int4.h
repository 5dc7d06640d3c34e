// The paths of linear_int4.cpp. Activations are int8 by then, a token's row filled up with zeros to whole groups.
#pragma once

#include <cstdint>

#include "isa.h"
#include "types.h"

namespace wemm {

constexpr std::int64_t kInt4Group = 128;  // inputs that share a scale, in 64 bytes: quantization.py, Int4
constexpr std::int64_t kInt4Bytes = kInt4Group / 2;
constexpr std::int64_t kMaxInt4GemvTokens = 4;

struct Int4Weight {
  const std::uint8_t* packed;  // [outputs, groups * 64]
  const bfloat16* scale;       // [outputs, groups]
  std::int64_t outputs, groups;
};

// A job: up to this many rows of the weight, from `first` on.
constexpr std::int64_t kInt4JobRows = 128;

// Sums of a job for up to kMaxInt4GemvTokens: [tokens, kInt4JobRows]. x: [tokens, groups * 128]; start: what the sum of
// a group begins with, as every half byte is 8 too large, [tokens, groups].
void int4_rows_vnni(const Int4Weight& weight, std::int64_t first, std::int64_t rows, const std::int8_t* x,
                    const std::int32_t* start, std::int64_t tokens, float* sums);

// More tokens. x: [tokens, width]. Both paths add up the same numbers in the same order.
template <typename T>
void linear_int4_amx(const Int4Weight& weight, const T* x, std::int64_t tokens, std::int64_t width, const float* bias,
                     T* out);
template <typename T>
void linear_int4_vnni(const Int4Weight& weight, const T* x, std::int64_t tokens, std::int64_t width, const float* bias,
                      T* out);

}  // namespace wemm
