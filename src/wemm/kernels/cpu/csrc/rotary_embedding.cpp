// ops/rotary_embedding.py: the pairs (i, i + head_dim/2) of every head turned by the token's angles, in float32.

#ifndef WEMM_COMPILING_FOR_ISA

#define WEMM_THIS_FILE "rotary_embedding.cpp"
#include "foreach_isa.h"
#include "kernels.h"

namespace wemm {

void rotary_embedding(const TensorArgument& x_argument, const TensorArgument& cos_argument,
                      const TensorArgument& sin_argument, const TensorArgument& out_argument) {
  const Tensor x(x_argument), cos(cos_argument), sin(sin_argument), out(out_argument);
  Contract contract("rotary_embedding");
  contract.expect_rows("x", x, {"num_tokens", "num_heads", "head_dim"})
      .expect("cos", cos, {"num_tokens", "half"})
      .expect("sin", sin, {"num_tokens", "half"})
      .expect("out", out, {"num_tokens", "num_heads", "head_dim"})
      .same_dtype({&x, &out});
  contract.require(cos.dtype == DType::float32 && sin.dtype == DType::float32, "needs float32 angles");
  contract.require(contract["head_dim"] == 2 * contract["half"], "needs an angle per pair of a head");
  const std::int64_t tokens = contract["num_tokens"], heads = contract["num_heads"], half = contract["half"];
  with_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    const auto rotate = WEMM_BEST(rotate_head<T>);
#pragma omp parallel for schedule(static) if (tokens > 1)
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (std::int64_t h = 0; h < heads; ++h) {
        rotate(x.data<T>() + t * x.strides[0] + h * x.strides[1], cos.data<float>() + t * half,
               sin.data<float>() + t * half, half, out.data<T>() + (t * heads + h) * 2 * half);
      }
    }
  });
}

}  // namespace wemm

#else

template <typename T>
void rotate_head(const T* x, const float* cos, const float* sin, std::int64_t half, T* out) {
  for (std::int64_t i = 0; i < half; i += kLanes) {
    const std::int64_t count = half - i;
    const Floats first = load(x + i, count), second = load(x + half + i, count);
    const Floats c = load(cos + i, count), s = load(sin + i, count);
    store(first * c - second * s, out + i, count);
    store(second * c + first * s, out + half + i, count);
  }
}

#endif
