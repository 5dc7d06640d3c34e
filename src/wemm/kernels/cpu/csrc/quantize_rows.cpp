#ifndef WEMM_COMPILING_FOR_ISA

#include "quantize_rows.h"

#define WEMM_THIS_FILE "quantize_rows.cpp"
#include "foreach_isa.h"

namespace wemm {
namespace {

constexpr std::int64_t kPiece = 65536;  // elements: a share worth a thread's while

}  // namespace

template <typename T>
void quantize_rows(const T* x, std::int64_t rows, std::int64_t width, std::int64_t stride, std::int8_t* integers,
                   float* scale) {
  const auto quantize = WEMM_BEST(quantize_row<T>);
#pragma omp parallel for schedule(static) if (rows * width > kPiece)
  for (std::int64_t r = 0; r < rows; ++r) {
    std::int8_t* row = integers + r * stride;
    scale[r] = quantize(x + r * width, width, row);
    std::memset(row + width, 0, stride - width);
  }
}

template void quantize_rows(const float*, std::int64_t, std::int64_t, std::int64_t, std::int8_t*, float*);
template void quantize_rows(const bfloat16*, std::int64_t, std::int64_t, std::int64_t, std::int8_t*, float*);

}  // namespace wemm

#else

// Returns the scale. Compiled without fused multiply-add (CMakeLists.txt): x * inverse is rounded before its halves are.
template <typename T>
float quantize_row(const T* x, std::int64_t n, std::int8_t* integers) {
  // Without their sign, numbers are ordered as their bits are, and NaN lies above Inf.
  std::uint32_t bits = 0;
#pragma omp simd reduction(max : bits)
  for (std::int64_t i = 0; i < n; ++i) {
    const float value = to_float(x[i]);
    std::uint32_t magnitude;
    std::memcpy(&magnitude, &value, sizeof magnitude);
    magnitude &= 0x7FFFFFFF;
    bits = magnitude > bits ? magnitude : bits;
  }
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  const float inverse = 1.0f / largest * 127.0f;  // as torch divides a number by a tensor
  if (bits == 0 || !std::isfinite(inverse) || !std::isfinite(largest)) {
    std::memset(integers, 0, n);
    return bits == 0 ? 0.0f : NAN;
  }
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, halves to even
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const float shifted = to_float(x[i]) * inverse + magic;
    std::int32_t integer;
    std::memcpy(&integer, &shifted, sizeof integer);
    integers[i] = static_cast<std::int8_t>(integer);  // the magic number's low byte is zero
  }
  return largest / 127.0f;
}

#endif
