// linear_int4 on matrix tiles of int8: every group's sums of integers are exact, and added up as float32.

#include <algorithm>
#include <cstring>

#include "amx.h"
#include "linear_int4.h"
#include "vnni.h"

namespace wemm {

#ifdef WEMM_AMX
namespace {

constexpr int kRows = 32;    // two tiles
constexpr int kGroups = 4;   // unpacked at a time: with as many of two tiles of tokens they fill the first-level cache

struct Panel {
  std::int8_t weight[kGroups][2][2][16][64];  // per group, tile of rows and half of the group: a tile
  float scale[kGroups][kRows];
};

// Rows behind the last keep what they have: their sums are not read.
WEMM_AMX void unpack(const Int4Weight& weight, std::int64_t first, std::int64_t rows, std::int64_t group,
                     std::int64_t count, Panel& panel) {
  const __m512i mask = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t at = (first + r) * weight.groups + group;
    for (std::int64_t g = 0; g < count; ++g) {
      const std::uint8_t* bytes = weight.packed + (at + g) * kInt4Bytes;
      __builtin_prefetch(bytes + kGroups * kInt4Bytes);
      const __m512i packed = _mm512_loadu_si512(bytes), high = _mm512_srli_epi16(packed, 4);
      std::int8_t* row = panel.weight[g][r / 16][0][r % 16];
      _mm512_store_si512(row, _mm512_sub_epi8(_mm512_and_si512(packed, mask), eight));
      _mm512_store_si512(row + sizeof panel.weight[0][0][0], _mm512_sub_epi8(_mm512_and_si512(high, mask), eight));
      panel.scale[g][r] = to_float(weight.scale[at + g]);
    }
  }
  asm volatile("" ::: "memory");  // the intrinsics of tiles do not say what they read
}

// Tiles 0 to 3 become the integers of a group: two tiles of rows times T tiles of tokens that lie `apart`.
template <int T>
WEMM_AMX WEMM_INLINE void multiply(const std::int8_t (&weight)[2][2][16][64], const std::int8_t* x,
                                   std::int64_t apart) {
  _tile_zero(0);
  _tile_zero(1);
  if (T == 2) _tile_zero(2);
  if (T == 2) _tile_zero(3);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    _tile_loadd(4, weight[0][half], 64);
    _tile_loadd(5, weight[1][half], 64);
    _tile_loadd(6, x + half * 1024, 64);
    if (T == 2) _tile_loadd(7, x + apart + half * 1024, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 5, 6);
    if (T == 2) _tile_dpbssd(2, 4, 7);
    if (T == 2) _tile_dpbssd(3, 5, 7);
  }
}

template <int T>
WEMM_AMX WEMM_INLINE void store(std::int32_t (&products)[kRows][T][16]) {
  constexpr int kStride = sizeof products[0];
  _tile_stored(0, products[0][0], kStride);
  _tile_stored(1, products[16][0], kStride);
  if (T == 2) _tile_stored(2, products[0][T - 1], kStride);
  if (T == 2) _tile_stored(3, products[16][T - 1], kStride);
}

// sums [kRows, 32] += scale * integers. Meanwhile the tokens of the group after next are fetched.
template <int T>
WEMM_AMX WEMM_INLINE void accumulate(const std::int32_t (&products)[kRows][T][16], const float (&scale)[kRows],
                                     const std::int8_t* ahead, std::int64_t apart, float* sums) {
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    __builtin_prefetch(ahead + r * 64);
    if (T == 2) __builtin_prefetch(ahead + apart + r * 64);
    const __m512 factor = _mm512_set1_ps(scale[r]);
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) {
      float* at = sums + r * 32 + t * 16;
      const __m512 integers = _mm512_cvtepi32_ps(_mm512_load_si512(products[r][t]));
      _mm512_storeu_ps(at, _mm512_fmadd_ps(integers, factor, _mm512_loadu_ps(at)));
    }
  }
}

template <int T>
WEMM_AMX void add_groups(const Panel& panel, std::int64_t count, const std::int8_t* x, std::int64_t apart,
                         float* sums) {
  alignas(64) std::int32_t products[kRows][T][16];
  multiply<T>(panel.weight[0], x, apart);
  store<T>(products);
  for (std::int64_t g = 1; g < count; ++g) {  // a group's integers are added up while the next one's are multiplied
    multiply<T>(panel.weight[g], x + g * kInt4TileBytes, apart);
    const std::int8_t* ahead = g + 1 < count ? x + (g + 1) * kInt4TileBytes : x + T * apart;
    accumulate<T>(products, panel.scale[g - 1], ahead, apart, sums);
    store<T>(products);
  }
  accumulate<T>(products, panel.scale[count - 1], x + T * apart + kInt4TileBytes, apart, sums);
}

template <typename T>
WEMM_AMX void finish(const float* sums, const float* x_scale, const float* bias, std::int64_t rows,
                     std::int64_t tokens, std::int64_t outputs, T* out) {
  for (std::int64_t token = 0; token < tokens; token += 16) {
    for (std::int64_t row = 0; row < rows; row += 16) {
      __m512i tile[16];
      const float* from = sums + (token / 32 * kInt4JobRows + row) * 32 + token % 32;
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) tile[r] = _mm512_loadu_si512(from + r * 32);
      transpose(tile);
      const __mmask16 some = rows - row < 16 ? static_cast<__mmask16>((1u << (rows - row)) - 1) : 0xFFFF;
      const __m512 offset = _mm512_maskz_loadu_ps(some, bias + row);
      alignas(64) float columns[16][16];
#pragma GCC unroll 16
      for (int t = 0; t < 16; ++t) _mm512_store_si512(columns[t], tile[t]);
      for (std::int64_t t = 0; t < std::min<std::int64_t>(16, tokens - token); ++t) {
        const __m512 scale = _mm512_set1_ps(x_scale[token + t]);
        store_some(_mm512_fmadd_ps(_mm512_load_ps(columns[t]), scale, offset), some, out + (token + t) * outputs + row);
      }
    }
  }
}

}  // namespace

WEMM_AMX void int4_tiles_amx(const Int4Weight& weight, std::int64_t first, std::int64_t rows, const Int4Tiles& tokens,
                             float* sums) {
  const Tiles shape;
  const std::int64_t apart = weight.groups * kInt4TileBytes;
  alignas(64) Panel panel = {};
  std::memset(sums, 0, (tokens.count + 1) / 2 * kInt4JobRows * 32 * sizeof(float));
  for (std::int64_t group = 0; group < weight.groups; group += kGroups) {
    const std::int64_t count = std::min<std::int64_t>(kGroups, weight.groups - group);
    for (std::int64_t row = 0; row < rows; row += kRows) {
      unpack(weight, first + row, std::min<std::int64_t>(kRows, rows - row), group, count, panel);
      const std::int8_t* x = tokens.x + group * kInt4TileBytes;
      float* to = sums + row * 32;
      for (std::int64_t tile = 0; tile < tokens.count; tile += 2, x += 2 * apart, to += kInt4JobRows * 32) {
        (tile + 1 < tokens.count ? add_groups<2> : add_groups<1>)(panel, count, x, apart, to);
      }
    }
  }
}

template <typename T>
void int4_finish_amx(const float* sums, const float* x_scale, const float* bias, std::int64_t rows,
                     std::int64_t tokens, std::int64_t outputs, T* out) {
  finish(sums, x_scale, bias, rows, tokens, outputs, out);
}

#else

void int4_tiles_amx(const Int4Weight&, std::int64_t, std::int64_t, const Int4Tiles&, float*) {}

template <typename T>
void int4_finish_amx(const float*, const float*, const float*, std::int64_t, std::int64_t, std::int64_t, T*) {}

#endif

template void int4_finish_amx(const float*, const float*, const float*, std::int64_t, std::int64_t, std::int64_t,
                              float*);
template void int4_finish_amx(const float*, const float*, const float*, std::int64_t, std::int64_t, std::int64_t,
                              bfloat16*);
template void int4_finish_amx(const float*, const float*, const float*, std::int64_t, std::int64_t, std::int64_t,
                              float16*);

}  // namespace wemm
