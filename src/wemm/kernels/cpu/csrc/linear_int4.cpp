// ops/linear_int4.py: every weight is read once for a few tokens; for many, in blocks that stay in the caches.

#ifndef WEMM_COMPILING_FOR_ISA

#include <algorithm>
#include <vector>

#include "linear_int4.h"
#include "quantize_rows.h"

#define WEMM_THIS_FILE "linear_int4.cpp"
#include "foreach_isa.h"
#include "kernels.h"

namespace wemm {
namespace {

// What the sum of a group begins with: each of its half bytes is 8 too large.
std::int32_t start_of(const std::int8_t* group) {
  std::int32_t sum = 0;
  for (std::int64_t i = 0; i < kInt4Group; ++i) sum += group[i];
  return -8 * sum;
}

// As int4_rows wants them, which takes bytes apart in pairs: of each half of a group, even elements before odd ones.
std::vector<std::int16_t> take_apart(const std::vector<std::int8_t>& x) {
  std::vector<std::int16_t> apart(x.size());
  for (std::size_t run = 0; run < x.size() / 32; ++run) {
    for (std::size_t i = 0; i < 32; ++i) apart[run * 32 + i] = x[run / 2 * 64 + 2 * i + run % 2];
  }
  return apart;
}

auto rows_of(std::int64_t tokens) {
  switch (tokens) {
    case 1: return WEMM_BEST(int4_rows<1>);
    case 2: return WEMM_BEST(int4_rows<2>);
    case 3: return WEMM_BEST(int4_rows<3>);
    default: return WEMM_BEST(int4_rows<4>);
  }
}

// Every weight is read once, at the speed of memory.
template <typename T>
void few_tokens(const Int4Weight& weight, const T* x, std::int64_t tokens, std::int64_t width, const float* bias,
                T* out) {
  std::vector<std::int8_t> integers(tokens * weight.groups * kInt4Group);
  float x_scale[kMaxInt4GemvTokens];
  quantize_rows(x, tokens, width, weight.groups * kInt4Group, integers.data(), x_scale);
  const bool vnni = has_avx512_vnni();
  std::vector<std::int32_t> start(vnni ? tokens * weight.groups : 0);
  for (std::size_t i = 0; i < start.size(); ++i) start[i] = start_of(integers.data() + i * kInt4Group);
  const std::vector<std::int16_t> apart = vnni ? std::vector<std::int16_t>() : take_apart(integers);
  const auto add_rows = rows_of(tokens);
  const std::int64_t jobs = (weight.outputs + kInt4JobRows - 1) / kInt4JobRows;
#pragma omp parallel for schedule(static) if (jobs > 1)
  for (std::int64_t job = 0; job < jobs; ++job) {
    const std::int64_t first = job * kInt4JobRows, rows = std::min(kInt4JobRows, weight.outputs - first);
    float sums[kMaxInt4GemvTokens * kInt4JobRows];
    if (vnni) {
      int4_rows_vnni(weight, first, rows, integers.data(), start.data(), tokens, sums);
    } else {
      add_rows(weight, first, rows, apart.data(), sums);
    }
    for (std::int64_t m = 0; m < tokens; ++m) {
      for (std::int64_t r = 0; r < rows; ++r) {
        out[m * weight.outputs + first + r] = from_float<T>(sums[m * kInt4JobRows + r] * x_scale[m] + bias[first + r]);
      }
    }
  }
}

}  // namespace

void linear_int4(const TensorArgument& x_argument, const TensorArgument& weight_argument,
                 const TensorArgument& scale_argument, const std::optional<TensorArgument>& bias_argument,
                 const TensorArgument& out_argument) {
  const Tensor x(x_argument), packed(weight_argument), scale(scale_argument), out(out_argument);
  Contract contract("linear_int4");
  contract.expect("x", x, {"num_tokens", "in"})
      .expect("weight", packed, {"out", "bytes"}, DType::uint8)
      .expect("scale", scale, {"out", "groups"}, DType::bfloat16)
      .expect("out", out, {"num_tokens", "out"})
      .same_dtype({&x, &out});
  const std::int64_t tokens = contract["num_tokens"], width = contract["in"], groups = contract["groups"];
  contract.require(groups == (width + kInt4Group - 1) / kInt4Group, "needs a scale per 128 inputs");
  contract.require(contract["bytes"] == groups * kInt4Bytes, "needs 64 bytes per group");
  contract.require(tokens <= kMaxInt4GemvTokens || has_avx512_vnni(), "takes at most 4 tokens without AVX-512 VNNI");
  const Int4Weight weight{packed.data<std::uint8_t>(), scale.data<bfloat16>(), contract["out"], groups};
  std::vector<float> offset(weight.outputs);
  with_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    if (bias_argument) {
      const Tensor bias(*bias_argument);
      contract.expect("bias", bias, {"out"}).same_dtype({&x, &bias});
      for (std::int64_t o = 0; o < weight.outputs; ++o) offset[o] = to_float(bias.data<T>()[o]);
    }
    if (out.is_empty()) return;
    const auto many_tokens = isa() == Isa::amx ? linear_int4_amx<T> : linear_int4_vnni<T>;
    const auto path = tokens <= kMaxInt4GemvTokens ? few_tokens<T> : many_tokens;
    path(weight, x.data<T>(), tokens, width, offset.data(), out.data<T>());
  });
}

}  // namespace wemm

#else

typedef std::uint16_t Pairs __attribute__((vector_size(4 * kLanes)));  // of bytes, or products of 16 bits
typedef std::int32_t Ints __attribute__((vector_size(4 * kLanes)));

template <typename T>
WEMM_INLINE Pairs load_pairs(const T* x) {
  Pairs value;
  std::memcpy(&value, x, sizeof value);
  return value;
}

// int4_rows_vnni without products of four int8: in 16 bits, which eight products of at most 8 * 127 do not overflow.
// x: [M, groups, 2, 2, 32], even and odd elements of each half of a group.
template <int M>
void int4_rows(const Int4Weight& weight, std::int64_t first, std::int64_t rows, const std::int16_t* x, float* sums) {
  constexpr int kParts = 16 / kLanes;  // vectors of a group's bytes
  constexpr std::int64_t kAhead = 1024;  // bytes
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t row = first + r;
    Floats totals[M] = {};
    for (std::int64_t g = 0; g < weight.groups; ++g) {
      const std::uint8_t* packed = weight.packed + (row * weight.groups + g) * kInt4Bytes;
      __builtin_prefetch(packed + kAhead);
      Pairs runs[4][kParts];  // as x
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) {
        const Pairs pairs = load_pairs(packed + part * 4 * kLanes);
        runs[0][part] = (pairs & 15) - 8;
        runs[1][part] = (pairs >> 8 & 15) - 8;
        runs[2][part] = (pairs >> 4 & 15) - 8;
        runs[3][part] = (pairs >> 12) - 8;
      }
      const float scale = to_float(weight.scale[row * weight.groups + g]);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const std::int16_t* inputs = x + (m * weight.groups + g) * kInt4Group;
        Pairs products = {};
#pragma GCC unroll 4
        for (int run = 0; run < 4; ++run)
#pragma GCC unroll 2
          for (int part = 0; part < kParts; ++part)
            products += runs[run][part] * load_pairs(inputs + run * 32 + part * 2 * kLanes);
        const Ints both = (Ints)products, wide = (both << 16 >> 16) + (both >> 16);
        totals[m] += __builtin_convertvector(wide, Floats) * scale;
      }
    }
    for (int m = 0; m < M; ++m) sums[m * kInt4JobRows + r] = sum(totals[m]);
  }
}

#endif
