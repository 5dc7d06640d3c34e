// ops/rms_norm.py: x / sqrt(mean(x^2) + eps) * weight, accumulated in float32.

#ifndef WEMM_COMPILING_FOR_ISA

#define WEMM_THIS_FILE "rms_norm.cpp"
#include "foreach_isa.h"
#include "kernels.h"

namespace wemm {

void rms_norm(const TensorArgument& x_argument, const TensorArgument& weight_argument, float eps,
              const TensorArgument& out_argument) {
  const Tensor x(x_argument), weight(weight_argument), out(out_argument);
  Contract contract("rms_norm");
  contract.expect("x", x, {"rows", "hidden_size"})
      .expect("weight", weight, {"hidden_size"})
      .expect("out", out, {"rows", "hidden_size"})
      .same_dtype({&x, &weight, &out});
  const std::int64_t rows = contract["rows"], n = contract["hidden_size"];
  with_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    const auto normalize = WEMM_BEST(rms_norm_row<T>);
#pragma omp parallel for schedule(static) if (rows > 1)
    for (std::int64_t r = 0; r < rows; ++r) {
      normalize(x.data<T>() + r * n, weight.data<T>(), n, eps, out.data<T>() + r * n);
    }
  });
}

}  // namespace wemm

#else

template <typename T>
void rms_norm_row(const T* x, const T* weight, std::int64_t n, float eps, T* out) {
  Floats squares = {};
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const Floats value = load(x + i, n - i);
    squares += value * value;
  }
  const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(n) + eps);
  for (std::int64_t i = 0; i < n; i += kLanes) {
    store(load(x + i, n - i) * scale * load(weight + i, n - i), out + i, n - i);
  }
}

#endif
