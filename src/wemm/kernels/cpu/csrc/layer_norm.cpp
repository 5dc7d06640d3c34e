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
  Floats total = {};
  for (std::int64_t i = 0; i < n; i += kLanes) total += load(x + i, n - i);
  const float mean = sum(total) / static_cast<float>(n);
  Floats lanes = {};
  std::int64_t whole = 0;
  for (; whole + kLanes <= n; whole += kLanes) {
    const Floats value = load(x + whole) - mean;
    lanes += value * value;
  }
  float squares = sum(lanes);
  for (std::int64_t i = whole; i < n; ++i) squares += (to_float(x[i]) - mean) * (to_float(x[i]) - mean);
  const float scale = 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const Floats value = (load(x + i, n - i) - mean) * scale;
    store(value * load(weight + i, n - i) + load(bias + i, n - i), out + i, n - i);
  }
}

#endif
