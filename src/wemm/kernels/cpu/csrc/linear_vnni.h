// Quantised weights times many tokens on AVX-512 VNNI, for linear_int8_vnni.cpp and linear_int4_vnni.cpp.
//
// 8 tokens times 48 outputs stay in registers: for 24 products of four inputs, three vectors of weights and eight numbers
// of tokens are loaded. Both operands lie as they are read: of every four inputs, those of the 48 outputs side by side,
// as unsigned bytes, or those of the 8 tokens. What makes weights unsigned is taken off where a sum starts.
#pragma once

#include "vnni.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <algorithm>
#include <cstring>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "lines.h"
#include "quantize_rows.h"

namespace wemm::vnni {

constexpr std::int64_t kTokens = 8, kOutputs = 48;  // of a register tile
constexpr std::int64_t kPanels = 5;                 // of 48 outputs, packed at a time,
constexpr std::int64_t kChunk = 2048;               // and their inputs: 480 KiB, half a second-level cache
constexpr std::int64_t kBlock = 64;                 // tokens that meet a panel while its part is in the first-level cache
constexpr std::int64_t kAtOnce = 1024;              // tokens rounded at a time
constexpr std::int64_t kRow = kPanels * kOutputs;   // sums of a token

using Sums = __m512i[kTokens][3];

// x: [inputs / 4, 8, 4], weight: [inputs / 4, 48, 4], start: [8]; inputs: a multiple of 8.
WEMM_AVX512_VNNI WEMM_INLINE void multiply(const std::int8_t* x, const std::uint8_t* weight, std::int64_t inputs,
                                           const std::int32_t* start, Sums& sums) {
  __m512i totals[kTokens][3];  // in registers, as those of a caller would not be
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 3
    for (int v = 0; v < 3; ++v) totals[t][v] = _mm512_set1_epi32(start[t]);
  for (std::int64_t k = 0; k < inputs; k += 8) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half, x += 4 * kTokens, weight += 4 * kOutputs) {
      __m512i outputs[3];
#pragma GCC unroll 3
      for (int v = 0; v < 3; ++v) outputs[v] = _mm512_load_si512(weight + 64 * v);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        std::int32_t four;
        std::memcpy(&four, x + 4 * t, sizeof four);
        const __m512i token = _mm512_set1_epi32(four);
#pragma GCC unroll 3
        for (int v = 0; v < 3; ++v) add_products(totals[t][v], outputs[v], token);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 3
    for (int v = 0; v < 3; ++v) sums[t][v] = totals[t][v];
}

// `inputs` of 8 tokens that lie `stride` apart, a multiple of 64, become [inputs / 4, 8, 4]; start: what the sums of
// these inputs begin with.
WEMM_AVX512_VNNI inline void pack_tokens(const std::int8_t* rows, std::int64_t stride, std::int64_t inputs,
                                         std::int32_t excess, std::int8_t* packed, std::int32_t* start) {
  for (std::int64_t t = 0; t < kTokens; ++t) {
    std::int32_t sum = 0;
    for (std::int64_t k = 0; k < inputs; ++k) sum += rows[t * stride + k];
    start[t] = -excess * sum;
  }
  for (std::int64_t k = 0; k < inputs; k += 64) {
    __m512i tile[16] = {};
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) tile[t] = _mm512_loadu_si512(rows + t * stride + k);
    transpose(tile);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(packed + (k + 4 * i) * kTokens), _mm512_castsi512_si256(tile[i]));
    }
  }
}

inline std::int64_t num_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

inline std::int64_t ceil_div(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }

// Weight: outputs and width; kPart, inputs whose products are added up as integers; kExcess, what makes integers unsigned;
// Sum; Scales, of a panel.
//   pack(first, begin, end, packed, scales): outputs `first` to first + 48, of which the last may not exist, and inputs
//   add(sums of int32, scales, sums of Sum): those of a part;
//   finish(sums of a token, x_scale, first, n, out).
template <typename Weight, typename T>
void linear(const Weight& weight, const T* x, std::int64_t tokens, T* out) {
  using Sum = typename Weight::Sum;
  constexpr std::int64_t kPart = Weight::kPart;
  const std::int64_t width = ceil_div(weight.width, Weight::kAlign) * Weight::kAlign, stride = width + 64;
  const std::int64_t parts = ceil_div(width, kPart), at_once = std::min(kAtOnce, ceil_div(tokens, kTokens) * kTokens);
  const std::int64_t panels = ceil_div(weight.outputs, kOutputs), share = ceil_div(panels, num_threads());
  const std::int64_t per_job = ceil_div(share, ceil_div(share, kPanels)), jobs = ceil_div(panels, per_job);
  Lines<std::int8_t> integers(at_once * width);
  std::vector<std::int32_t> start(at_once * parts);
  std::vector<float> x_scale(at_once);

#pragma omp parallel
  {
    Lines<std::int8_t> rows(kTokens * stride);
    Lines<std::uint8_t> packed(kRow * std::min(kChunk, width));
    std::vector<typename Weight::Scales> scales(kPanels * ceil_div(kChunk, kPart));
    Lines<Sum> sums(at_once * kRow);
    for (std::int64_t from = 0; from < tokens; from += at_once) {
      const std::int64_t count = std::min(at_once, tokens - from), tiles = ceil_div(count, kTokens);
#pragma omp for schedule(static)
      for (std::int64_t tile = 0; tile < tiles; ++tile) {
        const std::int64_t first = tile * kTokens, some = std::min(kTokens, count - first);
        quantize_rows(x + (from + first) * weight.width, some, weight.width, stride, rows.data(), &x_scale[first]);
        std::fill(rows.data() + some * stride, rows.data() + kTokens * stride, std::int8_t{0});
        for (std::int64_t part = 0; part < parts; ++part) {
          const std::int64_t k = part * kPart;
          const std::int64_t inputs = std::min(kPart, width - k);
          pack_tokens(rows.data() + k, stride, inputs, Weight::kExcess, integers.data() + k * at_once + first * inputs,
                      &start[(tile * parts + part) * kTokens]);
        }
      }
#pragma omp for schedule(dynamic)
      for (std::int64_t job = 0; job < jobs; ++job) {
        const std::int64_t first = job * per_job * kOutputs, outputs = std::min(per_job * kOutputs, weight.outputs - first);
        T* const tokens_out = out + from * weight.outputs + first;
        std::fill(sums.data(), sums.data() + tiles * kTokens * kRow, Sum{0});
        for (std::int64_t begin = 0; begin < width; begin += kChunk) {
          const std::int64_t end = std::min(begin + kChunk, width), size = (end - begin) * kOutputs;
          for (std::int64_t o = 0, p = 0; o < outputs; o += kOutputs, ++p) {
            weight.pack(first + o, begin, end, packed.data() + p * size, &scales[p * (kChunk / kPart)]);
          }
          for (std::int64_t block = 0; block < tiles; block += kBlock / kTokens) {
            const std::int64_t last = std::min(block + kBlock / kTokens, tiles);
            for (std::int64_t o = 0, p = 0; o < outputs; o += kOutputs, ++p) {
              for (std::int64_t k = begin; k < end; k += kPart) {
                const std::int64_t inputs = std::min(kPart, end - k);
                const std::uint8_t* const panel = packed.data() + p * size + (k - begin) * kOutputs;
                for (std::int64_t tile = block; tile < last; ++tile) {
                  Weight::add_part(integers.data() + k * at_once + tile * kTokens * inputs, panel, inputs,
                                   &start[(tile * parts + k / kPart) * kTokens],
                                   scales[p * (kChunk / kPart) + (k - begin) / kPart],
                                   sums.data() + tile * kTokens * kRow + o);
                }
              }
            }
            if (end < width) continue;
            for (std::int64_t t = block * kTokens; t < std::min(last * kTokens, count); ++t) {
              weight.finish(sums.data() + t * kRow, x_scale[t], first, outputs, tokens_out + t * weight.outputs);
            }
          }
        }
      }
    }
  }
}

}  // namespace wemm::vnni

#endif
