// ops/linear_int8.py, ops/linear_int8_gelu.py. Sums of integers are exact, so every path has the same; what is made of
// them is compiled without fused multiply-add (CMakeLists.txt), so the results are the same to the last bit.

#ifndef WEMM_COMPILING_FOR_ISA

#include "linear_int8.h"

#include <algorithm>
#include <utility>
#include <vector>

#define WEMM_THIS_FILE "linear_int8.cpp"
#include "foreach_isa.h"
#include "kernels.h"
#include "quantize_rows.h"
#include "vnni.h"

namespace wemm {
namespace {

// Sums of tokens and rows of the weight, [tokens, kRowsPerJob], of which the first last - first are written.
using Dot = void (*)(const std::int8_t* weight, std::int64_t width, std::int64_t first, std::int64_t last,
                     const std::int8_t* x, std::int32_t* sums);

#ifdef WEMM_AVX512_VNNI

// Rows first, first + apart, … of the weight, R of them, times M tokens. Weights become unsigned by 128 more, which
// `excess` takes off again.
template <int R, int M>
WEMM_AVX512_VNNI WEMM_INLINE void some_rows(const std::int8_t* rows, std::int64_t apart, std::int64_t width,
                                            const std::int8_t* x, const std::int32_t* excess, std::int32_t* sums) {
  constexpr std::int64_t kAhead = 2048;  // bytes before they are needed
  const __m512i flip = _mm512_set1_epi8(-128);
  const std::int64_t stride = apart * width;
  __m512i totals[R][M];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) totals[r][m] = _mm512_setzero_si512();
  std::int64_t k = 0;
  for (; k + 64 <= width; k += 64) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const std::int8_t* line = rows + r * stride + k;
      __builtin_prefetch(line + kAhead);
      const __m512i weight = _mm512_xor_si512(_mm512_loadu_si512(line), flip);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
        totals[r][m] = _mm512_dpbusd_epi32(totals[r][m], weight, _mm512_loadu_si512(x + m * width + k));
    }
  }
  const __mmask64 rest = (1ull << (width - k)) - 1;
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const __m512i weight = _mm512_xor_si512(_mm512_maskz_loadu_epi8(rest, rows + r * stride + k), flip);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const __m512i last = _mm512_maskz_loadu_epi8(rest, x + m * width + k);
      const __m512i total = _mm512_dpbusd_epi32(totals[r][m], weight, last);
      sums[m * kRowsPerJob + r * apart] = _mm512_reduce_add_epi32(total) - excess[m];
    }
  }
}

// In several streams, as in linear.cpp.
template <int M>
WEMM_AVX512_VNNI void dot_vnni(const std::int8_t* weight, std::int64_t width, std::int64_t first, std::int64_t last,
                               const std::int8_t* x, std::int32_t* sums) {
  constexpr int R = M <= 4 ? 4 : 2;  // R * M sums stay in registers
  std::int32_t excess[M] = {};
  for (int m = 0; m < M; ++m) {
    for (std::int64_t k = 0; k < width; ++k) excess[m] += 128 * x[m * width + k];
  }
  const std::int64_t apart = (last - first) / R;
  const std::int8_t* rows = weight + first * width;
  for (std::int64_t i = 0; i < apart; ++i) some_rows<R, M>(rows + i * width, apart, width, x, excess, sums + i);
  for (std::int64_t i = R * apart; i < last - first; ++i)
    some_rows<1, M>(rows + i * width, 0, width, x, excess, sums + i);
}
#define WEMM_DOT(tokens) (has_avx512_vnni() ? dot_vnni<tokens> : WEMM_BEST(dot_rows<tokens>))
#else
#define WEMM_DOT(tokens) WEMM_BEST(dot_rows<tokens>)
#endif

Dot dot_of(std::int64_t tokens) {
  switch (tokens) {
    case 1: return WEMM_DOT(1);
    case 2: return WEMM_DOT(2);
    case 3: return WEMM_DOT(3);
    case 4: return WEMM_DOT(4);
    case 5: return WEMM_DOT(5);
    case 6: return WEMM_DOT(6);
    case 7: return WEMM_DOT(7);
    default: return WEMM_DOT(8);
  }
}

// Every weight is read once, at the speed of memory.
template <typename T>
void few_tokens(const T* x, std::int64_t tokens, const Int8Weight& weight, Finish<T> finish, T* out) {
  std::vector<std::int8_t> integers(tokens * weight.width);
  float x_scale[kMaxInt8GemvTokens];
  quantize_rows(x, tokens, weight.width, weight.width, integers.data(), x_scale);
  const Dot dot = dot_of(tokens);
  const std::int64_t jobs = (weight.outputs + kRowsPerJob - 1) / kRowsPerJob;
#pragma omp parallel for schedule(static) if (jobs > 1)
  for (std::int64_t job = 0; job < jobs; ++job) {
    const std::int64_t first = job * kRowsPerJob, last = std::min(first + kRowsPerJob, weight.outputs);
    std::int32_t sums[kMaxInt8GemvTokens * kRowsPerJob];
    dot(weight.integers, weight.width, first, last, integers.data(), sums);
    for (std::int64_t m = 0; m < tokens; ++m) {
      finish(sums + m * kRowsPerJob, x_scale[m], weight.scale + first, weight.bias + first, last - first,
             out + m * weight.outputs + first);
    }
  }
}

void product(const char* name, bool gelu, const TensorArgument& x_argument, const TensorArgument& weight_argument,
             const TensorArgument& scale_argument, const std::optional<TensorArgument>& bias_argument,
             const TensorArgument& out_argument) {
  const Tensor x(x_argument), weight(weight_argument), scale(scale_argument), out(out_argument);
  Contract contract(name);
  contract.expect("x", x, {"num_tokens", "in"})
      .expect("weight", weight, {"out", "in"}, DType::int8)
      .expect("scale", scale, {"out"}, DType::float32)
      .expect("out", out, {"num_tokens", "out"})
      .same_dtype({&x, &out});
  const std::int64_t tokens = contract["num_tokens"], outputs = contract["out"], width = contract["in"];
  contract.require(tokens <= kMaxInt8GemvTokens || has_avx512_vnni(), "takes at most 8 tokens without AVX-512 VNNI");
  contract.require(width <= kMaxInt8Width, "takes at most 131072 inputs");
  std::vector<float> offset(outputs);
  with_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    if (bias_argument) {
      const Tensor bias(*bias_argument);
      contract.expect("bias", bias, {"out"}).same_dtype({&x, &bias});
      for (std::int64_t o = 0; o < outputs; ++o) offset[o] = to_float(bias.data<T>()[o]);
    }
    const Int8Weight given{weight.data<std::int8_t>(), scale.data<float>(), offset.data(), outputs, width};
    const auto many_tokens = isa() == Isa::amx ? linear_int8_amx<T> : linear_int8_vnni<T>;
    const auto path = tokens <= kMaxInt8GemvTokens ? few_tokens<T> : many_tokens;
    if (tokens > 0) path(x.data<T>(), tokens, given, gelu ? WEMM_BEST(finish_gelu<T>) : WEMM_BEST(finish<T>), out.data<T>());
  });
}

}  // namespace

void linear_int8(const TensorArgument& x, const TensorArgument& weight, const TensorArgument& scale,
                 const std::optional<TensorArgument>& bias, const TensorArgument& out) {
  product("linear_int8", false, x, weight, scale, bias, out);
}

void linear_int8_gelu(const TensorArgument& x, const TensorArgument& weight, const TensorArgument& scale,
                      const TensorArgument& bias, const TensorArgument& out) {
  product("linear_int8_gelu", true, x, weight, scale, bias, out);
}

}  // namespace wemm

#else

// Without products of four int8. Pieces of a row are as long as what is fetched ahead of them.
template <int M>
void dot_rows(const std::int8_t* weight, std::int64_t width, std::int64_t first, std::int64_t last,
              const std::int8_t* x, std::int32_t* sums) {
  constexpr std::int64_t kPiece = 512;
  for (std::int64_t i = first; i < last; ++i) {
    const std::int8_t* row = weight + i * width;
    std::int32_t totals[M] = {};
    for (std::int64_t from = 0; from < width; from += kPiece) {
      const std::int64_t to = from + kPiece < width ? from + kPiece : width;
      for (std::int64_t line = 0; line < kPiece; line += 64) __builtin_prefetch(row + from + 4 * kPiece + line);
      for (int m = 0; m < M; ++m) {
        std::int32_t total = 0;
#pragma omp simd reduction(+ : total)
        for (std::int64_t k = from; k < to; ++k) {
          total += static_cast<std::int16_t>(row[k]) * static_cast<std::int16_t>(x[m * width + k]);
        }
        totals[m] += total;
      }
    }
    for (int m = 0; m < M; ++m) sums[m * kRowsPerJob + i - first] = totals[m];
  }
}

WEMM_INLINE Floats scaled(const std::int32_t* sums, float x_scale, const float* scale, const float* bias,
                          std::int64_t n) {
  typedef std::int32_t Ints __attribute__((vector_size(4 * kLanes)));
  Ints integers = {};
  std::memcpy(&integers, sums, n < kLanes ? 4 * n : sizeof integers);
  return __builtin_convertvector(integers, Floats) * x_scale * load(scale, n) + load(bias, n);
}

template <typename T>
void finish(const std::int32_t* sums, float x_scale, const float* scale, const float* bias, std::int64_t n, T* out) {
  for (std::int64_t i = 0; i < n; i += kLanes) {
    store(scaled(sums + i, x_scale, scale + i, bias + i, n - i), out + i, n - i);
  }
}

template <typename T>
void finish_gelu(const std::int32_t* sums, float x_scale, const float* scale, const float* bias, std::int64_t n,
                 T* out) {
  for (std::int64_t i = 0; i < n; i += kLanes) {
    store(gelu(scaled(sums + i, x_scale, scale + i, bias + i, n - i)), out + i, n - i);
  }
}

#endif
