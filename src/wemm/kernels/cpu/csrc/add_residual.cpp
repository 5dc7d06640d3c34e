// ops/add_residual.py: y += x.

#ifndef WEMM_COMPILING_FOR_ISA

#include <algorithm>

#define WEMM_THIS_FILE "add_residual.cpp"
#include "foreach_isa.h"
#include "kernels.h"

namespace wemm {
namespace {

constexpr std::int64_t kPiece = 8192;  // elements: a share worth a thread's while

}  // namespace

void add_residual(const TensorArgument& y_argument, const TensorArgument& x_argument) {
  const Tensor y(y_argument), x(x_argument);
  Contract contract("add_residual");
  contract.expect("y", y, {"rows", "hidden_size"}).expect("x", x, {"rows", "hidden_size"}).same_dtype({&y, &x});
  const std::int64_t size = contract["rows"] * contract["hidden_size"], pieces = (size + kPiece - 1) / kPiece;
  with_dtype(y.dtype, [&](auto element) {
    using T = decltype(element);
    const auto add = WEMM_BEST(add_piece<T>);
#pragma omp parallel for schedule(static) if (pieces > 1)
    for (std::int64_t p = 0; p < pieces; ++p) {
      const std::int64_t start = p * kPiece;
      add(x.data<T>() + start, std::min(kPiece, size - start), y.data<T>() + start);
    }
  });
}

}  // namespace wemm

#else

template <typename T>
void add_piece(const T* x, std::int64_t n, T* y) {
  for (std::int64_t i = 0; i < n; i += kLanes) store(load(y + i, n - i) + load(x + i, n - i), y + i, n - i);
}

#endif
