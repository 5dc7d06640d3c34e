// ops/rms_norm.py: x / sqrt(mean(x^2) + eps) * weight, accumulated in float32.

#include "kernels.h"

#include <cmath>

#include "vec.h"

namespace wemm {
namespace {

template <typename T>
inline __attribute__((always_inline)) void normalize_row(const T* x, const T* weight, std::int64_t n, float eps,
                                                         T* out) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) {
    const float value = to_float(x[i]);
    sum += value * value;
  }
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(n) + eps);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    out[i] = from_float<T>(to_float(x[i]) * scale * to_float(weight[i]));
  }
}

WEMM_MULTIVERSION void normalize_row_f32(const float* x, const float* weight, std::int64_t n, float eps, float* out) {
  normalize_row(x, weight, n, eps, out);
}

WEMM_MULTIVERSION void normalize_row_bf16(const bfloat16* x, const bfloat16* weight, std::int64_t n, float eps,
                                          bfloat16* out) {
  normalize_row(x, weight, n, eps, out);
}

template <typename T, typename Row>
void normalize(const Tensor& x, const Tensor& weight, float eps, const Tensor& out, std::int64_t rows, std::int64_t n,
               Row row) {
  const T* in = x.data<const T>();
  const T* w = weight.data<const T>();
  T* result = out.data<T>();
#pragma omp parallel for schedule(static) if (rows > 1)
  for (std::int64_t r = 0; r < rows; ++r) row(in + r * n, w, n, eps, result + r * n);
}

}  // namespace

void rms_norm(const TensorArgument& x_argument, const TensorArgument& weight_argument, float eps,
              const TensorArgument& out_argument) {
  const Tensor x(x_argument), weight(weight_argument), out(out_argument);
  Contract contract("rms_norm");
  contract.expect("x", x, {"rows", "hidden_size"})
      .expect("weight", weight, {"hidden_size"})
      .expect("out", out, {"rows", "hidden_size"})
      .same_dtype({&x, &weight, &out});
  const std::int64_t rows = contract["rows"], n = contract["hidden_size"];
  if (x.dtype == DType::float32) {
    normalize<float>(x, weight, eps, out, rows, n, normalize_row_f32);
  } else {
    normalize<bfloat16>(x, weight, eps, out, rows, n, normalize_row_bf16);
  }
}

}  // namespace wemm
