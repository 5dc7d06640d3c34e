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

constexpr std::int64_t kRowsPerJob = 128;
constexpr std::int64_t kTilesPerJob = 32;  // 512 tokens: sums of a job stay in the second-level cache

// What the 8 in every half byte adds to the product with a group.
std::int32_t excess_of(const std::int8_t* group) {
  std::int32_t sum = 0;
  for (std::int64_t i = 0; i < kInt4Group; ++i) sum += group[i];
  return 8 * sum;
}

auto rows_of(std::int64_t tokens) {
  switch (tokens) {
    case 1: return WEMM_BEST(int4_rows<1>);
    case 2: return WEMM_BEST(int4_rows<2>);
    case 3: return WEMM_BEST(int4_rows<3>);
    default: return WEMM_BEST(int4_rows<4>);
  }
}

// As int4_rows wants them, which masks and shifts pairs of bytes: of each half of a group, even elements before odd ones.
std::vector<std::int16_t> take_apart(const std::int8_t* x, std::int64_t groups) {
  std::vector<std::int16_t> apart(groups * kInt4Group);
  for (std::int64_t run = 0; run < groups * 4; ++run) {
    for (std::int64_t i = 0; i < 32; ++i) apart[run * 32 + i] = x[run / 2 * 64 + 2 * i + run % 2];
  }
  return apart;
}

// Every weight is read once, at the speed of memory. x: [tokens, groups * 128].
template <typename T>
void few_tokens(const Int4Weight& weight, const std::int8_t* x, const float* x_scale, std::int64_t tokens,
                const float* bias, T* out) {
  const bool vnni = has_avx512_vnni();
  std::vector<std::int32_t> excess(vnni ? tokens * weight.groups : 0);
  for (std::size_t i = 0; i < excess.size(); ++i) excess[i] = excess_of(x + i * kInt4Group);
  const std::vector<std::int16_t> apart = vnni ? std::vector<std::int16_t>() : take_apart(x, tokens * weight.groups);
  const auto rows = rows_of(tokens);
  std::vector<float> sums(tokens * weight.outputs);
  const std::int64_t jobs = (weight.outputs + kRowsPerJob - 1) / kRowsPerJob;
#pragma omp parallel for schedule(static) if (jobs > 1)
  for (std::int64_t job = 0; job < jobs; ++job) {
    const std::int64_t first = job * kRowsPerJob, last = std::min(first + kRowsPerJob, weight.outputs);
    if (vnni) {
      int4_rows_vnni(weight, first, last, x, excess.data(), tokens, sums.data());
    } else {
      rows(weight, first, last, apart.data(), sums.data());
    }
    for (std::int64_t m = 0; m < tokens; ++m) {
      for (std::int64_t row = first; row < last; ++row) {
        const std::int64_t at = m * weight.outputs + row;
        out[at] = from_float<T>(sums[at] * x_scale[m] + bias[row]);
      }
    }
  }
}

struct PackedTokens {
  std::vector<std::int8_t> x;
  std::vector<std::int32_t> excess;
};

// As Int4Tiles wants them.
PackedTokens pack(const std::int8_t* x, std::int64_t tokens, std::int64_t groups) {
  const std::int64_t tiles = (tokens + 15) / 16, width = groups * kInt4Group;
  PackedTokens packed{std::vector<std::int8_t>(tiles * groups * kInt4TileBytes),
                      std::vector<std::int32_t>(tiles * groups * 16)};
#pragma omp parallel for schedule(static) if (tiles > 1)
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const std::int64_t some = std::min<std::int64_t>(16, tokens - tile * 16);
    const std::int8_t* from = x + tile * 16 * width;
    std::int8_t* to = packed.x.data() + tile * 16 * width;
    std::int32_t* excess = packed.excess.data() + tile * groups * 16;
    for (std::int64_t k = 0; k < width; k += 4) {
      for (std::int64_t t = 0; t < some; ++t) std::memcpy(to + k * 16 + t * 4, from + t * width + k, 4);
    }
    for (std::int64_t g = 0; g < groups; ++g) {
      for (std::int64_t t = 0; t < some; ++t) excess[g * 16 + t] = excess_of(from + t * width + g * kInt4Group);
    }
  }
  return packed;
}

template <typename T>
void many_tokens(const Int4Weight& weight, const std::int8_t* x, const float* x_scale, std::int64_t tokens,
                 const float* bias, T* out) {
  const PackedTokens packed = pack(x, tokens, weight.groups);
  const auto multiply = isa() == Isa::amx ? int4_tiles_amx : int4_tiles_vnni;
  const std::int64_t tiles = (tokens + 15) / 16, tiles_per_job = std::min(tiles, kTilesPerJob);
  // With few tiles a job's time is the reading of its rows, best done one behind the other.
  const std::int64_t rows_per_job = tiles <= 4 ? 32 : kInt4JobRows;
  const std::int64_t columns = (tiles + tiles_per_job - 1) / tiles_per_job;
  const std::int64_t jobs = (weight.outputs + rows_per_job - 1) / rows_per_job * columns;
#pragma omp parallel if (jobs > 1)
  {
    std::vector<float> sums((tiles_per_job + 1) / 2 * kInt4JobRows * 32);
#pragma omp for schedule(dynamic)
    for (std::int64_t job = 0; job < jobs; ++job) {
      const std::int64_t first = job / columns * rows_per_job, rows = std::min(rows_per_job, weight.outputs - first);
      const std::int64_t tile = job % columns * tiles_per_job, count = std::min(tiles_per_job, tiles - tile);
      const std::int64_t at = tile * weight.groups;
      multiply(weight, first, rows, {packed.x.data() + at * kInt4TileBytes, packed.excess.data() + at * 16, count},
               sums.data());
      int4_finish(sums.data(), x_scale + tile * 16, bias + first, rows, std::min(count * 16, tokens - tile * 16),
                  weight.outputs, out + tile * 16 * weight.outputs + first);
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
    std::vector<std::int8_t> integers(tokens * groups * kInt4Group);
    std::vector<float> x_scale(tokens);
    quantize_rows(x.data<T>(), tokens, width, groups * kInt4Group, integers.data(), x_scale.data());
    const auto path = tokens <= kMaxInt4GemvTokens ? few_tokens<T> : many_tokens<T>;
    path(weight, integers.data(), x_scale.data(), tokens, offset.data(), out.data<T>());
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

// Sums of the rows first..last without products of four int8: in 16 bits, which eight products of at most 8 * 127
// do not overflow. x: [M, groups, 2, 2, 32], even and odd elements of each half of a group.
template <int M>
void int4_rows(const Int4Weight& weight, std::int64_t first, std::int64_t last, const std::int16_t* x, float* sums) {
  constexpr int kParts = 16 / kLanes;  // vectors of a group's bytes
  constexpr std::int64_t kAhead = 1024;  // bytes
  for (std::int64_t row = first; row < last; ++row) {
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
    for (int m = 0; m < M; ++m) sums[m * weight.outputs + row] = sum(totals[m]);
  }
}

#endif
