// quantization.py: quantize_rows, the activations' side of products with quantised weights.
#pragma once

#include <cstdint>

#include "types.h"

namespace wemm {

// x [rows, width] becomes integers [rows, stride], stride >= width, zeros behind the width, and scale [rows]: the same
// integers as the definition's, bit by bit. A row that holds Inf or NaN (or is so small that the reciprocal of its scale is Inf) gets
// zeros and the scale NaN: whatever is multiplied by it shows. T: float or bfloat16. Threads share the rows where they
// are many; within a parallel region the caller's thread does them all.
template <typename T>
void quantize_rows(const T* x, std::int64_t rows, std::int64_t width, std::int64_t stride, std::int8_t* integers,
                   float* scale);

}  // namespace wemm
