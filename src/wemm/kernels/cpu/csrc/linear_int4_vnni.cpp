// linear_int4 on AVX-512 VNNI: unsigned nibbles times signed activations, four products a lane.

#include <algorithm>
#include <cstring>

#include "linear_int4.h"
#include "linear_vnni.h"

namespace wemm {

#ifdef WEMM_AVX512_VNNI
namespace {

constexpr int kScales = 16;  // a vector of them is widened at a time

WEMM_AVX512_VNNI WEMM_INLINE __m512i low_halves(__m512i bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
WEMM_AVX512_VNNI WEMM_INLINE __m512i high_halves(__m512i bytes) { return low_halves(_mm512_srli_epi16(bytes, 4)); }

// Scales of up to 16 groups of a row, as float.
WEMM_AVX512_VNNI WEMM_INLINE void widen(const bfloat16* scale, std::int64_t count, float* wide) {
  const __mmask16 some = static_cast<__mmask16>((1u << count) - 1);
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, scale));
  _mm512_store_si512(wide, _mm512_slli_epi32(words, 16));
}

// Rows first, first + apart, … of the weight, R of them, times M tokens.
template <int R, int M>
WEMM_AVX512_VNNI WEMM_INLINE void some_rows(const Int4Weight& weight, std::int64_t first, std::int64_t apart,
                                            const std::int8_t* x, const std::int32_t* start, float* sums) {
  constexpr std::int64_t kAhead = 2048;  // bytes
  const std::int64_t groups = weight.groups;
  __m512 totals[R][M];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) totals[r][m] = _mm512_setzero_ps();
  for (std::int64_t block = 0; block < groups; block += kScales) {
    const std::int64_t count = std::min<std::int64_t>(kScales, groups - block);
    alignas(64) float scale[R][kScales];
    for (int r = 0; r < R; ++r) {
      const bfloat16* given = weight.scale + (first + r * apart) * groups + block;
      __builtin_prefetch(given + 64);
      widen(given, count, scale[r]);
    }
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t group = block + i;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const std::uint8_t* bytes = weight.packed + ((first + r * apart) * groups + group) * kInt4Bytes;
        __builtin_prefetch(bytes + kAhead);
        const __m512i packed = _mm512_loadu_si512(bytes), low = low_halves(packed), high = high_halves(packed);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const std::int8_t* inputs = x + (m * groups + group) * kInt4Group;
          // In one lane: they are added up in the end.
          __m512i products = _mm512_zextsi128_si512(_mm_cvtsi32_si128(start[m * groups + group]));
          add_products(products, low, _mm512_loadu_si512(inputs));
          add_products(products, high, _mm512_loadu_si512(inputs + kInt4Bytes));
          totals[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), _mm512_set1_ps(scale[r][i]), totals[r][m]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) sums[m * kInt4JobRows + r * apart] = _mm512_reduce_add_ps(totals[r][m]);
  }
}

// In several streams, as in linear.cpp.
template <int M>
WEMM_AVX512_VNNI void all_rows(const Int4Weight& weight, std::int64_t first, std::int64_t rows, const std::int8_t* x,
                               const std::int32_t* start, float* sums) {
  constexpr int R = 4;
  const std::int64_t apart = rows / R;
  for (std::int64_t i = 0; i < apart; ++i) some_rows<R, M>(weight, first + i, apart, x, start, sums + i);
  for (std::int64_t i = R * apart; i < rows; ++i) some_rows<1, M>(weight, first + i, 0, x, start, sums + i);
}

template <typename T>
WEMM_AVX512_VNNI void finish_row(const float* sums, float x_scale, const float* bias, std::int64_t n, T* out) {
  const __m512 factor = _mm512_set1_ps(x_scale);
  for (std::int64_t i = 0; i < n; i += 16) {
    const __mmask16 some = n - i < 16 ? static_cast<__mmask16>((1u << (n - i)) - 1) : 0xFFFF;
    const __m512 offset = _mm512_maskz_loadu_ps(some, bias + i);
    store_some(_mm512_fmadd_ps(_mm512_maskz_loadu_ps(some, sums + i), factor, offset), some, out + i);
  }
}

struct PanelScales {
  float of_output[vnni::kOutputs];
};

// Groups begin..end of 48 outputs side by side, and their scales. Behind the last output, it stands in.
WEMM_AVX512_VNNI void pack_outputs(const Int4Weight& weight, std::int64_t first, std::int64_t begin, std::int64_t end,
                                   std::uint8_t* packed, PanelScales* scales) {
  for (std::int64_t g = begin; g < end; ++g, packed += kInt4Group * vnni::kOutputs, ++scales) {
#pragma GCC unroll 1
    for (std::int64_t v = 0; v < 3; ++v) {
      __m512i tile[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        const std::int64_t at = std::min(first + 16 * v + r, weight.outputs - 1) * weight.groups + g;
        tile[r] = _mm512_loadu_si512(weight.packed + at * kInt4Bytes);
        scales->of_output[16 * v + r] = to_float(weight.scale[at]);
      }
      transpose(tile);
      std::uint8_t* const low = packed + 64 * v;
      std::uint8_t* const high = low + kInt4Bytes * vnni::kOutputs;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        _mm512_store_si512(low + i * 4 * vnni::kOutputs, low_halves(tile[i]));
        _mm512_store_si512(high + i * 4 * vnni::kOutputs, high_halves(tile[i]));
      }
    }
  }
}

// As linear_vnni.h wants it: a part is a group.
struct Weight : Int4Weight {
  static constexpr std::int64_t kPart = kInt4Group, kAlign = kInt4Group;
  static constexpr std::int32_t kExcess = 8;
  using Sum = float;
  using Scales = PanelScales;

  std::int64_t width;
  const float* bias;

  void pack(std::int64_t first, std::int64_t begin, std::int64_t end, std::uint8_t* packed, Scales* scales) const {
    pack_outputs(*this, first, begin / kInt4Group, end / kInt4Group, packed, scales);
  }

  WEMM_AVX512_VNNI static void add_part(const std::int8_t* x, const std::uint8_t* weight, std::int64_t inputs,
                                        const std::int32_t* start, const Scales& scales, Sum* sums) {
    vnni::Sums products;
    vnni::multiply(x, weight, inputs, start, products);
#pragma GCC unroll 3
    for (int v = 0; v < 3; ++v) {
      const __m512 scale = _mm512_loadu_ps(scales.of_output + 16 * v);
#pragma GCC unroll 8
      for (int t = 0; t < vnni::kTokens; ++t) {
        float* const at = sums + t * vnni::kRow + 16 * v;
        _mm512_store_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[t][v]), scale, _mm512_load_ps(at)));
      }
    }
  }

  template <typename T>
  void finish(const Sum* sums, float x_scale, std::int64_t first, std::int64_t n, T* out) const {
    finish_row(sums, x_scale, bias + first, n, out);
  }
};

}  // namespace

void int4_rows_vnni(const Int4Weight& weight, std::int64_t first, std::int64_t rows, const std::int8_t* x,
                    const std::int32_t* start, std::int64_t tokens, float* sums) {
  switch (tokens) {
    case 1: return all_rows<1>(weight, first, rows, x, start, sums);
    case 2: return all_rows<2>(weight, first, rows, x, start, sums);
    case 3: return all_rows<3>(weight, first, rows, x, start, sums);
    default: return all_rows<4>(weight, first, rows, x, start, sums);
  }
}

template <typename T>
void linear_int4_vnni(const Int4Weight& weight, const T* x, std::int64_t tokens, std::int64_t width, const float* bias,
                      T* out) {
  vnni::linear(Weight{weight, width, bias}, x, tokens, out);
}

#else

void int4_rows_vnni(const Int4Weight&, std::int64_t, std::int64_t, const std::int8_t*, const std::int32_t*,
                    std::int64_t, float*) {}

template <typename T>
void linear_int4_vnni(const Int4Weight&, const T*, std::int64_t, std::int64_t, const float*, T*) {}

#endif

template void linear_int4_vnni(const Int4Weight&, const float*, std::int64_t, std::int64_t, const float*, float*);
template void linear_int4_vnni(const Int4Weight&, const bfloat16*, std::int64_t, std::int64_t, const float*, bfloat16*);
template void linear_int4_vnni(const Int4Weight&, const float16*, std::int64_t, std::int64_t, const float*, float16*);

}  // namespace wemm
