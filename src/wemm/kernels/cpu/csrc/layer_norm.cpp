// ops/layer_norm.py: (x - mean) / sqrt(var + eps) * weight + bias, accumulated in float32.

#ifndef WEMM_COMPILING_FOR_ISA

#define WEMM_THIS_FILE "layer_norm.cpp"
#include "foreach_isa.h"
#include "kernels.h"

namespace wemm {

void layer_norm(const TensorArgument& x_argument, const TensorArgument& weight_argument,
                const TensorArgument& bias_argument, float eps, const TensorArgument& out_argument) {
  const Tensor x(x_argument), weight(weight_argument), bias(bias_argument), out(out_argument);
  Contract contract("layer_norm");
  contract.expect("x", x, {"rows", "hidden_size"})
      .expect("weight", weight, {"hidden_size"})
      .expect("bias", bias, {"hidden_size"})
      .expect("out", out, {"rows", "hidden_size"})
      .same_dtype({&x, &weight, &bias, &out});
  const std::int64_t rows = contract["rows"], n = contract["hidden_size"];
  with_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    const auto normalize = WEMM_BEST(layer_norm_row<T>);
#pragma omp parallel for schedule(static) if (rows > 1)
    for (std::int64_t r = 0; r < rows; ++r) {
      normalize(x.data<T>() + r * n, weight.data<T>(), bias.data<T>(), n, eps, out.data<T>() + r * n);
    }
  });
}

}  // namespace wemm

#else

template <typename T>
void layer_norm_row(const T* x, const T* weight, const T* bias, std::int64_t n, float eps, T* out) {
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (std::int64_t i = 0; i < n; ++i) total += to_float(x[i]);
  const float mean = total / static_cast<float>(n);
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (std::int64_t i = 0; i < n; ++i) {
    const float value = to_float(x[i]) - mean;
    squares += value * value;
  }
  const float scale = 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    out[i] = from_float<T>((to_float(x[i]) - mean) * scale * to_float(weight[i]) + to_float(bias[i]));
  }
}

#endif
