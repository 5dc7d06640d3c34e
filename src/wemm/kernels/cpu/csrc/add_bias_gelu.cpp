// Behind the product of ops/linear_gelu.py: x + bias, and its GELU (tanh form), in place.

#ifndef WEMM_COMPILING_FOR_ISA

#define WEMM_THIS_FILE "add_bias_gelu.cpp"
#include "foreach_isa.h"
#include "kernels.h"

namespace wemm {

void add_bias_gelu(const TensorArgument& x_argument, const TensorArgument& bias_argument) {
  const Tensor x(x_argument), bias(bias_argument);
  Contract contract("add_bias_gelu");
  contract.expect("x", x, {"rows", "width"}).expect("bias", bias, {"width"}).same_dtype({&x, &bias});
  const std::int64_t rows = contract["rows"], width = contract["width"];
  with_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    const auto activate = WEMM_BEST(add_bias_gelu_row<T>);
#pragma omp parallel for schedule(static) if (rows > 1)
    for (std::int64_t r = 0; r < rows; ++r) activate(bias.data<T>(), width, x.data<T>() + r * width);
  });
}

}  // namespace wemm

#else

template <typename T>
void add_bias_gelu_row(const T* bias, std::int64_t width, T* x) {
  for (std::int64_t i = 0; i < width; i += kLanes) {
    store(gelu(load(x + i, width - i) + load(bias + i, width - i)), x + i, width - i);
  }
}

#endif
