// What the paths of linear_int8 share: a few tokens (linear_int8.cpp), many (linear_int8_amx.cpp, linear_int8_vnni.cpp).
#pragma once

#include <cstdint>

namespace wemm {

constexpr std::int64_t kMaxInt8GemvTokens = 8;
constexpr std::int64_t kMaxInt8Width = 131072;  // sums of so many products fit into int32
constexpr std::int64_t kRowsPerJob = 128;

// A weight as it lies in its file, and what its sums of integers become.
struct Int8Weight {
  const std::int8_t* integers;  // [outputs, width]
  const float* scale;           // [outputs]
  const float* bias;            // [outputs], zeros where there is none
  std::int64_t outputs;
  std::int64_t width;
};

// Sums of one token and n outputs → out: scaled, biased, activated. The pointers begin at the first of these outputs.
template <typename T>
using Finish = void (*)(const std::int32_t* sums, float x_scale, const float* scale, const float* bias, std::int64_t n,
                        T* out);

// x: [tokens, width] → out: [tokens, outputs]. Need matrix tiles; has_avx512_vnni().
template <typename T>
void linear_int8_amx(const T* x, std::int64_t tokens, const Int8Weight& weight, Finish<T> finish, T* out);
template <typename T>
void linear_int8_vnni(const T* x, std::int64_t tokens, const Int8Weight& weight, Finish<T> finish, T* out);

}  // namespace wemm
