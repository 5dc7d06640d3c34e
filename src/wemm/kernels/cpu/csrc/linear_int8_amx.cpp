// linear_int8 on matrix tiles: up to 32 tokens by linear_amx.h, more in blocks of 32 tokens x 32 outputs.
//
// Of many, tokens are rounded to int8 and used as they lie. Weights are transposed as they are used, up to 256 outputs at a time: in a
// tile, four inputs of 16 outputs lie side by side. So sums come out as the result is written, outputs side by side.

#include "linear_int8.h"

#include <algorithm>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "amx.h"
#include "linear_amx.h"
#include "lines.h"
#include "quantize_rows.h"
#include "vnni.h"

namespace wemm {

#ifdef WEMM_AMX

namespace {

constexpr std::int64_t kBlock = 32;          // tokens, and outputs, multiplied at once
constexpr std::int64_t kGroup = 64;          // inputs of a tile
constexpr std::int64_t kTile = 16 * kGroup;  // bytes
constexpr std::int64_t kTokens = 1024;       // rounded at a time
constexpr std::int64_t kGroups = 72;         // of a packed weight: at most 1.2 MB, of the second-level cache
constexpr std::int64_t kOutputs = 256;       // of a packed weight, at most

int num_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// A block of tokens, `stride` bytes apart, times a block of packed outputs: sums [32, kOutputs], 0 or, in a later chunk,
// what lies there already, and all products more.
WEMM_AMX void multiply(const std::int8_t* x, std::int64_t stride, const std::int8_t* tiles, std::int64_t between,
                       std::int64_t groups, bool first, std::int32_t* sums) {
  constexpr std::int64_t kRow = kOutputs * sizeof(std::int32_t);
  std::int32_t* const below = sums + 16 * kOutputs;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kRow);
    _tile_loadd(1, sums + 16, kRow);
    _tile_loadd(2, below, kRow);
    _tile_loadd(3, below + 16, kRow);
  }
  for (std::int64_t g = 0; g < groups; ++g) {
    _tile_loadd(4, x + g * kGroup, stride);
    _tile_loadd(6, tiles + g * kTile, kGroup);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, tiles + between + g * kTile, kGroup);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, x + 16 * stride + g * kGroup, stride);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, sums, kRow);
  _tile_stored(1, sums + 16, kRow);
  _tile_stored(2, below, kRow);
  _tile_stored(3, below + 16, kRow);
}

// Groups first..last of 16 rows of a weight, of which `rows` exist, as tiles. What lies behind the width is read as
// zeros; behind the rows, the first stands in, and its sums are not looked at.
WEMM_AMX void pack(const std::int8_t* weight, std::int64_t rows, std::int64_t width, std::int64_t first,
                   std::int64_t last, std::int8_t* tiles) {
  for (std::int64_t g = first; g < last; ++g, tiles += kTile) {
    const std::int64_t left = width - g * kGroup;
    const __mmask64 inside = left >= kGroup ? ~0ull : (1ull << left) - 1;
    __m512i tile[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      tile[r] = _mm512_maskz_loadu_epi8(inside, weight + (r < rows ? r : 0) * width + g * kGroup);
    }
    transpose(tile);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) _mm512_store_si512(tiles + r * kGroup, tile[r]);
  }
}

template <typename T>
void few_tokens(const T* x, std::int64_t tokens, const Int8Weight& weight, Finish<T> finish, T* out) {
  Lines<std::int8_t> integers(tokens * weight.width);
  float x_scale[few::kTokens];
  quantize_rows(x, tokens, weight.width, weight.width, integers.data(), x_scale);
  few::linear(integers.data(), tokens, weight.width, weight.integers, weight.outputs, weight.width,
              [&](const std::int32_t* sums, std::int64_t token, std::int64_t first, std::int64_t n) {
                finish(sums, x_scale[token], weight.scale + first, weight.bias + first, n,
                       out + token * weight.outputs + first);
              });
}

}  // namespace

template <typename T>
void linear_int8_amx(const T* x, std::int64_t tokens, const Int8Weight& weight, Finish<T> finish, T* out) {
  if (tokens <= few::kTokens) return few_tokens(x, tokens, weight, finish, out);
  const std::int64_t width = weight.width, groups = round_up(width, kGroup) / kGroup;
  // An odd number of cache lines: rows begin in different sets of a cache.
  const std::int64_t stride = (groups | 1) * kGroup;
  const std::int64_t chunks = (groups + kGroups - 1) / kGroups, chunk = (groups + chunks - 1) / chunks;
  const std::int64_t at_once = std::min(kTokens, round_up(tokens, kBlock));
  // The sums of all tokens are kept from one chunk to the next.
  const std::int64_t kept = chunks > 1 ? at_once : kBlock;
  const std::int64_t threads = num_threads(), share = (weight.outputs + threads - 1) / threads;
  // As many for every thread, as wide as fits.
  const std::int64_t per_job = round_up(share / ((share + kOutputs - 1) / kOutputs), kBlock);
  const std::int64_t jobs = (weight.outputs + per_job - 1) / per_job;
  Lines<std::int8_t> integers(at_once * stride);
  std::vector<float> x_scale(at_once);

#pragma omp parallel
  {
    Lines<std::int8_t> tiles(kOutputs * chunk * kGroup);
    Lines<std::int32_t> sums(kept * kOutputs);
    const Tiles shape;
    for (std::int64_t from = 0; from < tokens; from += at_once) {
      const std::int64_t count = std::min(at_once, tokens - from);
#pragma omp for schedule(static)
      for (std::int64_t t = 0; t < count; ++t) {
        std::int8_t* const row = integers.data() + t * stride;
        quantize_rows(x + (from + t) * width, 1, width, stride, row, &x_scale[t]);
      }
#pragma omp for schedule(dynamic)
      for (std::int64_t job = 0; job < jobs; ++job) {
        const std::int64_t first = job * per_job, outputs = std::min(per_job, weight.outputs - first);
        for (std::int64_t c = 0; c < chunks; ++c) {
          const std::int64_t begin = c * chunk, end = std::min(begin + chunk, groups), between = (end - begin) * kTile;
          for (std::int64_t o = 0; o < outputs; o += 16) {
            pack(weight.integers + (first + o) * width, outputs - o, width, begin, end,
                 tiles.data() + o / 16 * between);
          }
          for (std::int64_t t = 0; t < count; t += kBlock) {
            std::int32_t* const block = sums.data() + (chunks > 1 ? t * kOutputs : 0);
            for (std::int64_t o = 0; o < outputs; o += kBlock) {
              multiply(integers.data() + t * stride + begin * kGroup, stride, tiles.data() + o / 16 * between, between,
                       end - begin, c == 0, block + o);
            }
            if (c + 1 < chunks) continue;
            for (std::int64_t i = 0; i < std::min(kBlock, count - t); ++i) {
              finish(block + i * kOutputs, x_scale[t + i], weight.scale + first, weight.bias + first, outputs,
                     out + (from + t + i) * weight.outputs + first);
            }
          }
        }
      }
    }
  }
}

#else

template <typename T>
void linear_int8_amx(const T*, std::int64_t, const Int8Weight&, Finish<T>, T*) {}

#endif

template void linear_int8_amx(const float*, std::int64_t, const Int8Weight&, Finish<float>, float*);
template void linear_int8_amx(const bfloat16*, std::int64_t, const Int8Weight&, Finish<bfloat16>, bfloat16*);
template void linear_int8_amx(const float16*, std::int64_t, const Int8Weight&, Finish<float16>, float16*);

}  // namespace wemm
