// Up to 32 tokens on matrix tiles, for linear_int8_amx.cpp and linear_amx.cpp: every weight is read once, at the speed
// of memory.
//
// Rows of a weight are used as they lie, tokens are packed: of every four bytes, those of 16 tokens side by side. 32 rows
// are read side by side: processors see that many streams, and fetch what follows; only not across the end of a row, where
// the next 32 begin.
#pragma once

#include "amx.h"

#ifdef WEMM_AMX

#include <algorithm>

#include "lines.h"
#include "types.h"
#include "vnni.h"

namespace wemm::few {

constexpr std::int64_t kTokens = 32, kRows = 32;
constexpr std::int64_t kLine = 64, kTile = 16 * kLine;  // bytes
constexpr std::int64_t kAhead = 256;  // bytes of a row: farther ahead is slower

template <typename T>
struct Product;

#define WEMM_PRODUCT(type, sum, instruction)                          \
  template <>                                                         \
  struct Product<type> {                                              \
    using Sum = sum;                                                  \
    /* Tiles 0 to 3 += two tiles of rows times T tiles of tokens. */  \
    template <int T>                                                  \
    WEMM_AMX WEMM_INLINE static void add() {                          \
      instruction(0, 4, 6);                                           \
      instruction(1, 5, 6);                                           \
      if (T == 2) instruction(2, 4, 7);                               \
      if (T == 2) instruction(3, 5, 7);                               \
    }                                                                 \
  };
WEMM_PRODUCT(std::int8_t, std::int32_t, _tile_dpbssd)
WEMM_PRODUCT(bfloat16, float, _tile_dpbf16ps)
#undef WEMM_PRODUCT

// A line of up to 16 rows that lie `stride` bytes apart. What does not exist is 0.
WEMM_AMX WEMM_INLINE void load_lines(const std::uint8_t* rows, std::int64_t count, std::int64_t stride,
                                     std::int64_t bytes, __m512i (&lines)[16]) {
  const __mmask64 inside = bytes >= kLine ? ~0ull : (1ull << bytes) - 1;
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) {
    lines[r] = _mm512_maskz_loadu_epi8(r < count ? inside : 0, r < count ? rows + r * stride : rows);
  }
}

// `bytes`, up to 64, of up to 16 tokens: a tile.
WEMM_AMX inline void pack(const std::uint8_t* x, std::int64_t tokens, std::int64_t stride, std::int64_t bytes,
                          std::uint8_t* tile) {
  __m512i lines[16];
  load_lines(x, tokens, stride, bytes, lines);
  transpose(lines);
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) _mm512_store_si512(tile + r * kLine, lines[r]);
}

// Up to 32 rows of `bytes` each, times T tiles of tokens: sums [16 * T, 32]. x: [T, groups, kTile].
template <int T, typename Element>
WEMM_AMX void multiply(const std::uint8_t* weight, std::int64_t rows, std::int64_t bytes, const std::uint8_t* x,
                       typename Product<Element>::Sum* sums) {
  const std::int64_t groups = (bytes + kLine - 1) / kLine, whole = rows < kRows ? 0 : bytes / kLine;
  _tile_zero(0);
  _tile_zero(1);
  if (T == 2) _tile_zero(2);
  if (T == 2) _tile_zero(3);
  for (std::int64_t g = 0; g < whole; ++g) {
    const std::uint8_t* const lines = weight + g * kLine;
    const std::uint8_t* const ahead = lines + kAhead + (g * kLine + kAhead < bytes ? 0 : (kRows - 1) * bytes);
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(ahead + r * bytes, 0, 2);
    _tile_loadd(4, lines, bytes);
    _tile_loadd(5, lines + 16 * bytes, bytes);
    _tile_loadd(6, x + g * kTile, kLine);
    if (T == 2) _tile_loadd(7, x + (groups + g) * kTile, kLine);
    Product<Element>::template add<T>();
  }
  for (std::int64_t g = whole; g < groups; ++g) {
    alignas(64) std::uint8_t tiles[2][kTile];
    for (int half = 0; half < 2; ++half) {
      __m512i lines[16];
      const std::int64_t at = half * 16 < rows ? half * 16 : 0;
      load_lines(weight + at * bytes + g * kLine, rows - half * 16, bytes, bytes - g * kLine, lines);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) _mm512_store_si512(tiles[half] + r * kLine, lines[r]);
    }
    asm volatile("" ::: "memory");  // the intrinsics of tiles do not say what they read
    _tile_loadd(4, tiles[0], kLine);
    _tile_loadd(5, tiles[1], kLine);
    _tile_loadd(6, x + g * kTile, kLine);
    if (T == 2) _tile_loadd(7, x + (groups + g) * kTile, kLine);
    Product<Element>::template add<T>();
  }
  alignas(64) std::uint8_t products[T][2][kTile];
  _tile_stored(0, products[0][0], kLine);
  _tile_stored(1, products[0][1], kLine);
  if (T == 2) _tile_stored(2, products[T - 1][0], kLine);
  if (T == 2) _tile_stored(3, products[T - 1][1], kLine);
  for (int t = 0; t < T; ++t) {
    for (int half = 0; half < 2; ++half) {
      __m512i tile[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) tile[r] = _mm512_load_si512(products[t][half] + r * kLine);
      transpose(tile);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) _mm512_store_si512(sums + (t * 16 + r) * kRows + half * 16, tile[r]);
    }
  }
}

// x: [tokens, width], rows `stride` elements apart; weight: [outputs, width]. finish(sums of a token, token, first
// output, n) for every token and n outputs at a time.
template <typename Element, typename Finish>
void linear(const Element* x, std::int64_t tokens, std::int64_t stride, const Element* weight, std::int64_t outputs,
            std::int64_t width, const Finish& finish) {
  using Sum = typename Product<Element>::Sum;
  constexpr std::int64_t kSize = sizeof(Element);
  const auto *token_bytes = reinterpret_cast<const std::uint8_t*>(x),
             *weight_bytes = reinterpret_cast<const std::uint8_t*>(weight);
  const std::int64_t bytes = width * kSize, groups = (bytes + kLine - 1) / kLine, tiles = (tokens + 15) / 16;
  const std::int64_t blocks = (outputs + kRows - 1) / kRows;
  const auto multiply_rows = tiles == 1 ? multiply<1, Element> : multiply<2, Element>;
  Lines<std::uint8_t> packed(tiles * groups * kTile);
#pragma omp parallel if (blocks > 1)
  {
#pragma omp for schedule(static)
    for (std::int64_t i = 0; i < tiles * groups; ++i) {
      const std::int64_t first = i / groups * 16, k = i % groups * kLine;
      pack(token_bytes + first * stride * kSize + k, tokens - first, stride * kSize, bytes - k, packed.data() + i * kTile);
    }
    const Tiles shape;
    alignas(64) Sum sums[kTokens * kRows];
#pragma omp for schedule(static)
    for (std::int64_t block = 0; block < blocks; ++block) {
      const std::int64_t first = block * kRows, rows = std::min(kRows, outputs - first);
      multiply_rows(weight_bytes + first * bytes, rows, bytes, packed.data(), sums);
      for (std::int64_t t = 0; t < tokens; ++t) finish(sums + t * kRows, t, first, rows);
    }
  }
}

}  // namespace wemm::few

#endif
