// linear_int4 on AVX-512 VNNI: unsigned nibbles times signed activations, four products a lane.

#include <algorithm>
#include <cstring>

#include "linear_int4.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
// One instruction set, written in its own words: not a case for foreach_isa.h.
#define WEMM_AVX512_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

namespace wemm {
namespace {

constexpr int kScales = 16;  // a vector of them is widened at a time

// The intrinsic makes g++ 12 move accumulators to memory and back.
WEMM_AVX512_VNNI WEMM_INLINE void add_products(__m512i& sums, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(signed_bytes));
}

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

constexpr int kRows = 6;  // of a register tile: with four vectors of tokens 24 accumulators

// Sums of kRows rows from `first` on and V tiles of tokens from `tile` on. Rows behind the last repeat it.
template <int V>
WEMM_AVX512_VNNI WEMM_INLINE void register_tile(const Int4Weight& weight, std::int64_t first, std::int64_t rows,
                                                const Int4Tiles& tokens, std::int64_t tile,
                                                float (&totals)[kRows][V][16]) {
  const std::int64_t groups = weight.groups, apart = groups * kInt4TileBytes;
  const std::uint8_t* packed[kRows];
  const bfloat16* scale[kRows];
  for (int r = 0; r < kRows; ++r) {
    const std::int64_t row = first + std::min<std::int64_t>(r, rows - 1);
    packed[r] = weight.packed + row * groups * kInt4Bytes;
    scale[r] = weight.scale + row * groups;
  }
  std::memset(totals, 0, sizeof totals);
  alignas(64) std::uint8_t bytes[kRows][kInt4Group];
  for (std::int64_t group = 0; group < groups; ++group) {
    for (int r = 0; r < kRows; ++r) {
      const __m512i halves = _mm512_loadu_si512(packed[r] + group * kInt4Bytes);
      _mm512_store_si512(bytes[r], low_halves(halves));
      _mm512_store_si512(bytes[r] + kInt4Bytes, high_halves(halves));
    }
    asm volatile("" ::: "memory");  // totals stay in memory: the accumulators need the registers
    const std::int8_t* x = tokens.x + (tile * groups + group) * kInt4TileBytes;
    __m512i products[kRows][V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m512i start = _mm512_loadu_si512(tokens.start + ((tile + v) * groups + group) * 16);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) products[r][v] = start;
    }
    for (int k = 0; k < kInt4Group; k += 4) {
      __m512i inputs[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) inputs[v] = _mm512_loadu_si512(x + v * apart + k * 16);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        std::int32_t four;
        std::memcpy(&four, bytes[r] + k, sizeof four);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) add_products(products[r][v], _mm512_set1_epi32(four), inputs[v]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m512 factor = _mm512_set1_ps(to_float(scale[r][group]));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const __m512 total = _mm512_load_ps(totals[r][v]);
        _mm512_store_ps(totals[r][v], _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[r][v]), factor, total));
      }
    }
  }
}

template <int V>
WEMM_AVX512_VNNI void all_rows_of_tiles(const Int4Weight& weight, std::int64_t first, std::int64_t rows,
                                        const Int4Tiles& tokens, std::int64_t tile, float* sums) {
  alignas(64) float totals[kRows][V][16];
  for (std::int64_t row = 0; row < rows; row += kRows) {
    register_tile<V>(weight, first + row, rows - row, tokens, tile, totals);
    for (std::int64_t r = 0; r < std::min<std::int64_t>(kRows, rows - row); ++r) {
      for (int v = 0; v < V; ++v) {
        float* to = sums + ((tile + v) / 2 * kInt4JobRows + row + r) * 32 + v % 2 * 16;
        _mm512_storeu_ps(to, _mm512_load_ps(totals[r][v]));
      }
    }
  }
}

// Rows become columns: where a bit of the row's number differs from the column's, they change places.
WEMM_AVX512_VNNI WEMM_INLINE void transpose(__m512 (&rows)[16]) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
  for (int bit = 1; bit < 16; bit *= 2) {
    const __mmask16 set = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(bit));
    const __m512i step = _mm512_set1_epi32(bit), second = _mm512_set1_epi32(16);
    const __m512i upper = _mm512_mask_add_epi32(lane, set, _mm512_sub_epi32(lane, step), second);
    const __m512i lower = _mm512_mask_add_epi32(_mm512_add_epi32(lane, step), set, lane, second);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      if (r & bit) continue;
      const __m512 a = rows[r], b = rows[r + bit];
      rows[r] = _mm512_permutex2var_ps(a, upper, b);
      rows[r + bit] = _mm512_permutex2var_ps(a, lower, b);
    }
  }
}

WEMM_AVX512_VNNI WEMM_INLINE void store(__m512 values, __mmask16 some, float* out) {
  _mm512_mask_storeu_ps(out, some, values);
}

// Round to nearest even; NaN stays NaN.
WEMM_AVX512_VNNI WEMM_INLINE void store(__m512 values, __mmask16 some, bfloat16* out) {
  const __m512i bits = (__m512i)values, odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i words = _mm512_mask_blend_epi32(nan, _mm512_srli_epi32(rounded, 16), _mm512_set1_epi32(0x7FC0));
  _mm256_mask_storeu_epi16(out, some, _mm512_cvtepi32_epi16(words));
}

WEMM_AVX512_VNNI WEMM_INLINE void store(__m512 values, __mmask16 some, float16* out) {
  _mm256_mask_storeu_epi16(out, some, _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

template <typename T>
WEMM_AVX512_VNNI void finish(const float* sums, const float* x_scale, const float* bias, std::int64_t rows,
                             std::int64_t tokens, std::int64_t outputs, T* out) {
  for (std::int64_t token = 0; token < tokens; token += 16) {
    for (std::int64_t row = 0; row < rows; row += 16) {
      __m512 tile[16];
      const float* from = sums + (token / 32 * kInt4JobRows + row) * 32 + token % 32;
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) tile[r] = _mm512_loadu_ps(from + r * 32);
      transpose(tile);
      const __mmask16 some = rows - row < 16 ? static_cast<__mmask16>((1u << (rows - row)) - 1) : 0xFFFF;
      const __m512 offset = _mm512_maskz_loadu_ps(some, bias + row);
      alignas(64) float columns[16][16];
#pragma GCC unroll 16
      for (int t = 0; t < 16; ++t) _mm512_store_ps(columns[t], tile[t]);
      for (std::int64_t t = 0; t < std::min<std::int64_t>(16, tokens - token); ++t) {
        const __m512 scale = _mm512_set1_ps(x_scale[token + t]);
        store(_mm512_fmadd_ps(_mm512_load_ps(columns[t]), scale, offset), some, out + (token + t) * outputs + row);
      }
    }
  }
}

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

void int4_tiles_vnni(const Int4Weight& weight, std::int64_t first, std::int64_t rows, const Int4Tiles& tokens,
                     float* sums) {
  std::int64_t tile = 0;
  for (; tile + 4 <= tokens.count; tile += 4) all_rows_of_tiles<4>(weight, first, rows, tokens, tile, sums);
  switch (tokens.count - tile) {
    case 3: all_rows_of_tiles<3>(weight, first, rows, tokens, tile, sums); break;
    case 2: all_rows_of_tiles<2>(weight, first, rows, tokens, tile, sums); break;
    case 1: all_rows_of_tiles<1>(weight, first, rows, tokens, tile, sums); break;
    default: break;
  }
}

void int4_finish(const float* sums, const float* x_scale, const float* bias, std::int64_t rows, std::int64_t tokens,
                 std::int64_t outputs, float* out) {
  finish(sums, x_scale, bias, rows, tokens, outputs, out);
}

void int4_finish(const float* sums, const float* x_scale, const float* bias, std::int64_t rows, std::int64_t tokens,
                 std::int64_t outputs, bfloat16* out) {
  finish(sums, x_scale, bias, rows, tokens, outputs, out);
}

void int4_finish(const float* sums, const float* x_scale, const float* bias, std::int64_t rows, std::int64_t tokens,
                 std::int64_t outputs, float16* out) {
  finish(sums, x_scale, bias, rows, tokens, outputs, out);
}

}  // namespace wemm

#else

namespace wemm {
void int4_rows_vnni(const Int4Weight&, std::int64_t, std::int64_t, const std::int8_t*, const std::int32_t*,
                    std::int64_t, float*) {}
void int4_tiles_vnni(const Int4Weight&, std::int64_t, std::int64_t, const Int4Tiles&, float*) {}
void int4_finish(const float*, const float*, const float*, std::int64_t, std::int64_t, std::int64_t, float*) {}
void int4_finish(const float*, const float*, const float*, std::int64_t, std::int64_t, std::int64_t, bfloat16*) {}
void int4_finish(const float*, const float*, const float*, std::int64_t, std::int64_t, std::int64_t, float16*) {}
}  // namespace wemm

#endif
