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

// Every weight is read once, at the speed of memory. x: [tokens, groups * 128].
template <typename T>
void few_tokens(const Int4Weight& weight, const std::int8_t* x, const float* x_scale, std::int64_t tokens,
                const float* bias, T* out) {
  std::vector<std::int32_t> excess(tokens * weight.groups);
  for (std::int64_t i = 0; i < tokens * weight.groups; ++i) excess[i] = excess_of(x + i * kInt4Group);
  std::vector<float> sums(tokens * weight.outputs);
  const auto add_rows = has_avx512_vnni() ? int4_rows_vnni : WEMM_BEST(int4_rows);
  const std::int64_t jobs = (weight.outputs + kRowsPerJob - 1) / kRowsPerJob;
#pragma omp parallel for schedule(static) if (jobs > 1)
  for (std::int64_t job = 0; job < jobs; ++job) {
    const std::int64_t first = job * kRowsPerJob, last = std::min(first + kRowsPerJob, weight.outputs);
    add_rows(weight, first, last, x, excess.data(), tokens, sums.data());
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

// Sums of the rows first..last: int4_rows_vnni without its instructions.
void int4_rows(const Int4Weight& weight, std::int64_t first, std::int64_t last, const std::int8_t* x,
               const std::int32_t* excess, std::int64_t tokens, float* sums) {
  for (std::int64_t row = first; row < last; ++row) {
    const std::uint8_t* bytes = weight.packed + row * weight.groups * kInt4Bytes;
    const bfloat16* scale = weight.scale + row * weight.groups;
    for (std::int64_t m = 0; m < tokens; ++m) {
      float total = 0.0f;
      for (std::int64_t g = 0; g < weight.groups; ++g) {
        const std::uint8_t* group = bytes + g * kInt4Bytes;
        const std::int8_t* inputs = x + (m * weight.groups + g) * kInt4Group;
        std::int32_t sum = -excess[m * weight.groups + g];
#pragma omp simd reduction(+ : sum)
        for (std::int64_t j = 0; j < kInt4Bytes; ++j) {
          sum += (group[j] & 15) * inputs[j] + (group[j] >> 4) * inputs[kInt4Bytes + j];
        }
        total += to_float(scale[g]) * static_cast<float>(sum);
      }
      sums[m * weight.outputs + row] = total;
    }
  }
}

#endif
