// ops/silu_and_mul.py: gate / (1 + e^-gate) * up, in float32.

#ifndef WEMM_COMPILING_FOR_ISA

#include <algorithm>

#define WEMM_THIS_FILE "silu_and_mul.cpp"
#include "foreach_isa.h"
#include "kernels.h"

namespace wemm {
namespace {

constexpr std::int64_t kPiece = 4096;  // elements: a share worth a thread's while

}  // namespace

void silu_and_mul(const TensorArgument& gate_argument, const TensorArgument& up_argument,
                  const TensorArgument& out_argument) {
  const Tensor gate(gate_argument), up(up_argument), out(out_argument);
  Contract contract("silu_and_mul");
  contract.expect("gate", gate, {"num_tokens", "intermediate_size"})
      .expect("up", up, {"num_tokens", "intermediate_size"})
      .expect("out", out, {"num_tokens", "intermediate_size"})
      .same_dtype({&gate, &up, &out});
  const std::int64_t size = contract["num_tokens"] * contract["intermediate_size"];
  const std::int64_t pieces = (size + kPiece - 1) / kPiece;
  with_dtype(gate.dtype, [&](auto element) {
    using T = decltype(element);
    const auto multiply = WEMM_BEST(silu_and_mul_piece<T>);
#pragma omp parallel for schedule(static) if (pieces > 1)
    for (std::int64_t p = 0; p < pieces; ++p) {
      const std::int64_t start = p * kPiece;
      multiply(gate.data<T>() + start, up.data<T>() + start, std::min(kPiece, size - start), out.data<T>() + start);
    }
  });
}

}  // namespace wemm

#else

template <typename T>
void silu_and_mul_piece(const T* gate, const T* up, std::int64_t n, T* out) {
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const Floats g = load(gate + i, n - i);
    store(g / (1.0f + exp_approx(-g)) * load(up + i, n - i), out + i, n - i);
  }
}

#endif
