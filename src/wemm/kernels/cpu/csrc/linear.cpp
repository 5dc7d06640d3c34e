// ops/linear.py for few tokens: every weight is read once, at the speed of memory, and stays in the cache while four
// tokens after four pass over it.

#ifndef WEMM_COMPILING_FOR_ISA

#include <algorithm>
#include <vector>

#define WEMM_THIS_FILE "linear.cpp"
#include "foreach_isa.h"
#include "kernels.h"
#include "linear.h"

namespace wemm {
namespace {

constexpr std::int64_t kRowsPerJob = 128;
constexpr std::int64_t kCached = 1 << 17;  // elements

template <typename T>
auto rows_of(std::int64_t tokens) {
  switch (tokens) {
    case 1: return WEMM_BEST(linear_rows<1, T>);
    case 2: return WEMM_BEST(linear_rows<2, T>);
    case 3: return WEMM_BEST(linear_rows<3, T>);
    default: return WEMM_BEST(linear_rows<4, T>);
  }
}

template <typename T>
void multiply(const Tensor& x, const Tensor& weight, const T* bias, const Tensor& out) {
  const std::int64_t tokens = x.shape[0], width = x.shape[1], outputs = weight.shape[0];
  std::vector<float> wide(tokens * width);
  const auto widen = WEMM_BEST(widen_row<T>);
#pragma omp parallel for schedule(static) if (tokens > kMaxGemvTokens)
  for (std::int64_t m = 0; m < tokens; ++m) widen(x.data<T>() + m * width, width, wide.data() + m * width);
  const std::int64_t whole = tokens / kMaxGemvTokens * kMaxGemvTokens;
  const auto together = rows_of<T>(kMaxGemvTokens), others = rows_of<T>(tokens - whole);
  const std::int64_t cached = std::clamp<std::int64_t>(kCached / std::max<std::int64_t>(width, 1), 4, kRowsPerJob);
  const std::int64_t rows_per_job = tokens > kMaxGemvTokens ? cached : kRowsPerJob;
  const std::int64_t jobs = (outputs + rows_per_job - 1) / rows_per_job;
#pragma omp parallel for schedule(static) if (jobs > 1)
  for (std::int64_t job = 0; job < jobs; ++job) {
    const std::int64_t first = job * rows_per_job, last = std::min(first + rows_per_job, outputs);
    for (std::int64_t m = 0; m < tokens; m += kMaxGemvTokens) {
      const auto rows = m < whole ? together : others;
      rows(weight.data<T>(), bias, wide.data() + m * width, width, first, last, outputs, out.data<T>() + m * outputs);
    }
  }
}

}  // namespace

void linear(const TensorArgument& x_argument, const TensorArgument& weight_argument,
            const std::optional<TensorArgument>& bias_argument, const TensorArgument& out_argument) {
  const Tensor x(x_argument), weight(weight_argument), out(out_argument);
  Contract contract("linear");
  contract.expect("x", x, {"num_tokens", "in"})
      .expect("weight", weight, {"out", "in"})
      .expect("out", out, {"num_tokens", "out"})
      .same_dtype({&x, &weight, &out});
  std::uintptr_t bias = 0;
  if (bias_argument) {
    const Tensor given(*bias_argument);
    contract.expect("bias", given, {"out"}).same_dtype({&x, &given});
    bias = given.address;
  }
  contract.require(x.dtype == DType::bfloat16 || x.dtype == DType::float16, "takes bfloat16 or float16");
  const std::int64_t tokens = contract["num_tokens"];
  if (tokens == 0) return;
  if (x.dtype == DType::float16) {
    multiply(x, weight, reinterpret_cast<const float16*>(bias), out);
  } else if (tokens > kMaxGemvTokens && tokens <= kMaxTileTokens && isa() == Isa::amx) {
    linear_amx(x.data<bfloat16>(), tokens, weight.data<bfloat16>(), reinterpret_cast<const bfloat16*>(bias),
               contract["out"], contract["in"], out.data<bfloat16>());
  } else {
    multiply(x, weight, reinterpret_cast<const bfloat16*>(bias), out);
  }
}

}  // namespace wemm

#else

template <typename T>
void widen_row(const T* x, std::int64_t width, float* out) {
  for (std::int64_t i = 0; i < width; i += kLanes) store(load(x + i, width - i), out + i, width - i);
}

// Rows first, first + apart, … of the weight, R of them, times M tokens. x: float32 [M, width].
template <int R, int M, typename T>
WEMM_INLINE void some_rows(const T* weight, const T* bias, const float* x, std::int64_t width, std::int64_t first,
                           std::int64_t apart, std::int64_t outputs, T* out) {
  constexpr std::int64_t kAhead = 1024;  // elements: 2 KiB before they are needed
  const T* rows = weight + first * width;
  const std::int64_t stride = apart * width;
  Floats sums[R][M] = {};
  std::int64_t k = 0;
  for (; k + 2 * kLanes <= width; k += 2 * kLanes) {  // with AVX-512, a cache line of each row
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const T* line = rows + r * stride + k;
      __builtin_prefetch(line + kAhead);
      const Floats first = load(line), second = load(line + kLanes);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        sums[r][m] += first * load(x + m * width + k);
        sums[r][m] += second * load(x + m * width + k + kLanes);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    const std::int64_t row = first + r * apart;
    const float offset = bias == nullptr ? 0.0f : to_float(bias[row]);
    for (int m = 0; m < M; ++m) {
      float total = sum(sums[r][m]);
      for (std::int64_t i = k; i < width; ++i) total += to_float(rows[r * stride + i]) * x[m * width + i];
      out[m * outputs + row] = from_float<T>(total + offset);
    }
  }
}

// Rows first..last, in several streams: more of memory is under way, and they share the loads of the tokens. The rows of
// a stream lie one behind the other, so that what is fetched ahead at the end of one is the beginning of the next.
template <int M, typename T>
void linear_rows(const T* weight, const T* bias, const float* x, std::int64_t width, std::int64_t first,
                 std::int64_t last, std::int64_t outputs, T* out) {
  constexpr int R = kManyRegisters || M <= 2 ? 4 : 2;  // R * M sums stay in registers
  const std::int64_t apart = (last - first) / R;
  for (std::int64_t i = 0; i < apart; ++i) some_rows<R, M>(weight, bias, x, width, first + i, apart, outputs, out);
  for (std::int64_t i = first + R * apart; i < last; ++i) some_rows<1, M>(weight, bias, x, width, i, 0, outputs, out);
}

#endif
