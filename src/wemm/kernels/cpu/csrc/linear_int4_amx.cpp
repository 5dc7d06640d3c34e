// linear_int4 on matrix tiles of int8: every group's sums of integers are exact, and added up as float32.

#include <algorithm>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "amx.h"
#include "linear_amx.h"
#include "linear_int4.h"
#include "lines.h"
#include "quantize_rows.h"
#include "vnni.h"

namespace wemm {

#ifdef WEMM_AMX
namespace {

constexpr int kRows = 32;    // two tiles
constexpr int kGroups = 4;   // unpacked at a time: with as many of two tiles of tokens they fill the first-level cache

constexpr std::int64_t kTileBytes = 16 * kInt4Group;  // 16 tokens of a group: two tiles
constexpr std::int64_t kTilesPerJob = 32;  // 512 tokens: sums of a job stay in the second-level cache

// Tokens as tiles want them: of every four inputs, those of 16 tokens side by side.
struct PackedTokens {
  const std::int8_t* x;  // [count, groups, 32, 16, 4]
  std::int64_t count;
};

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
    multiply<T>(panel.weight[g], x + g * kTileBytes, apart);
    const std::int8_t* ahead = g + 1 < count ? x + (g + 1) * kTileBytes : x + T * apart;
    accumulate<T>(products, panel.scale[g - 1], ahead, apart, sums);
    store<T>(products);
  }
  accumulate<T>(products, panel.scale[count - 1], x + T * apart + kTileBytes, apart, sums);
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

// Sums of a job: [count / 2, kInt4JobRows, 32].
WEMM_AMX void multiply_many(const Int4Weight& weight, std::int64_t first, std::int64_t rows,
                            const PackedTokens& tokens, float* sums) {
  const std::int64_t apart = weight.groups * kTileBytes;
  alignas(64) Panel panel = {};
  std::memset(sums, 0, (tokens.count + 1) / 2 * kInt4JobRows * 32 * sizeof(float));
  for (std::int64_t group = 0; group < weight.groups; group += kGroups) {
    const std::int64_t count = std::min<std::int64_t>(kGroups, weight.groups - group);
    for (std::int64_t row = 0; row < rows; row += kRows) {
      unpack(weight, first + row, std::min<std::int64_t>(kRows, rows - row), group, count, panel);
      const std::int8_t* x = tokens.x + group * kTileBytes;
      float* to = sums + row * 32;
      for (std::int64_t tile = 0; tile < tokens.count; tile += 2, x += 2 * apart, to += kInt4JobRows * 32) {
        (tile + 1 < tokens.count ? add_groups<2> : add_groups<1>)(panel, count, x, apart, to);
      }
    }
  }
}

// Few tokens: one pass over the weight, in streams. Row i of every stream of a job is multiplied at once; the rows of a
// stream lie one behind the other, so that what is fetched ahead at the end of one is the beginning of the next.
constexpr int kStreams = kRows;
constexpr std::int64_t kStreamRows = 5;  // odd: streams a power of two apart share pages and sets of the cache
constexpr std::int64_t kAhead = 256;     // bytes of a stream
constexpr std::int64_t kScales = 16;     // groups whose scales are widened at a time

std::int64_t rows_of_streams(std::int64_t outputs) {
#ifdef _OPENMP
  const std::int64_t threads = omp_get_max_threads();
#else
  const std::int64_t threads = 1;
#endif
  return kStreams * std::clamp<std::int64_t>(outputs / (threads * kStreams), 1, kStreamRows);
}

template <int T>
class Streams {
 public:
  // Row i of streams of `apart` rows. Behind the last row, it stands in, and its sums are not read.
  WEMM_AMX Streams(const Int4Weight& weight, std::int64_t first, std::int64_t rows, std::int64_t apart, std::int64_t i,
                   const std::int8_t* x)
      : groups_(weight.groups), x_(x), jump_(i + 1 == apart ? (kStreams - 1) * apart * groups_ * kInt4Bytes : 0) {
    for (std::int64_t r = 0; r < kStreams; ++r) {
      const std::int64_t row = first + std::min(r * apart + i, rows - 1);
      row_[r] = weight.packed + row * groups_ * kInt4Bytes;
      row_scale_[r] = weight.scale + row * groups_;
    }
  }

  // A group's integers are multiplied while the next one's are unpacked and the one's before are added up.
  WEMM_AMX void multiply() {
    unpack(0);
    for (std::int64_t g = 0; g < groups_; ++g) {
      asm volatile("" ::: "memory");  // the intrinsics of tiles do not say what they read
      wemm::multiply<T>(unpacked_, x_ + g * kTileBytes, groups_ * kTileBytes);
      asm volatile("" ::: "memory");
      if (g + 1 < groups_) unpack(g + 1);
      if (g > 0) accumulate(g - 1);
      store<T>(products_);
    }
    accumulate(groups_ - 1);
  }

  // [rows, 32], the streams' `apart` rows apart.
  WEMM_AMX void store_sums(std::int64_t apart, float* sums) const {
    for (std::int64_t r = 0; r < kStreams; ++r) std::memcpy(sums + r * apart * 32, sums_[r], sizeof sums_[r]);
  }

 private:
  // Bytes from the beginning of a row to what is fetched with a group: behind the last row, the next job's stream.
  std::int64_t ahead(std::int64_t group) const {
    const std::int64_t at = group * kInt4Bytes + kAhead;
    return at < groups_ * kInt4Bytes ? at : at + jump_;
  }

  // Half of the rows are fetched ahead here, half while sums are added up.
  WEMM_AMX WEMM_INLINE void unpack(std::int64_t group) {
    const __m512i mask = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
    const std::int64_t at = group * kInt4Bytes, far = ahead(group);
#pragma GCC unroll 32
    for (int r = 0; r < kStreams; ++r) {
      if (r % 2 == 0) __builtin_prefetch(row_[r] + far, 0, 2);
      const __m512i packed = _mm512_loadu_si512(row_[r] + at), high = _mm512_srli_epi16(packed, 4);
      _mm512_store_si512(unpacked_[r / 16][0][r % 16], _mm512_sub_epi8(_mm512_and_si512(packed, mask), eight));
      _mm512_store_si512(unpacked_[r / 16][1][r % 16], _mm512_sub_epi8(_mm512_and_si512(high, mask), eight));
    }
  }

  WEMM_AMX WEMM_INLINE void accumulate(std::int64_t group) {
    if (group % kScales == 0) widen(group);
    const std::int64_t far = ahead(group + 1);
    const float* const scale = scale_[0] + group % kScales;
#pragma GCC unroll 32
    for (int r = 0; r < kStreams; ++r) {
      if (r % 2 == 1) __builtin_prefetch(row_[r] + far, 0, 2);
      const __m512 factor = _mm512_set1_ps(scale[r * kScales]);
#pragma GCC unroll 2
      for (int t = 0; t < T; ++t) {
        const __m512 integers = _mm512_cvtepi32_ps(_mm512_load_si512(products_[r][t]));
        _mm512_store_ps(sums_[r][t], _mm512_fmadd_ps(integers, factor, _mm512_load_ps(sums_[r][t])));
      }
    }
  }

  WEMM_AMX void widen(std::int64_t group) {
    const __mmask16 some = static_cast<__mmask16>((1u << std::min(kScales, groups_ - group)) - 1);
    for (int r = 0; r < kStreams; ++r) {
      __builtin_prefetch(row_scale_[r] + group + 64);
      const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, row_scale_[r] + group));
      _mm512_store_si512(scale_[r], _mm512_slli_epi32(words, 16));
    }
  }

  const std::int64_t groups_;
  const std::int8_t* const x_;
  const std::int64_t jump_;
  const std::uint8_t* row_[kStreams];
  const bfloat16* row_scale_[kStreams];
  alignas(64) std::int8_t unpacked_[2][2][16][64];  // per tile of rows and half of a group: a tile
  alignas(64) std::int32_t products_[kStreams][T][16];
  alignas(64) float scale_[kStreams][kScales];
  alignas(64) float sums_[kStreams][T][16] = {};
};

// Sums of a job: [rows of streams, 32].
template <int T>
WEMM_AMX void multiply_few(const Int4Weight& weight, std::int64_t first, std::int64_t rows, const std::int8_t* x,
                           float* sums) {
  const std::int64_t apart = (rows + kStreams - 1) / kStreams;
  for (std::int64_t i = 0; i < apart; ++i) {
    Streams<T> streams(weight, first, rows, apart, i, x);
    streams.multiply();
    streams.store_sums(apart, sums + i * 32);
  }
}

}  // namespace

template <typename T>
void linear_int4_amx(const Int4Weight& weight, const T* x, std::int64_t tokens, std::int64_t width, const float* bias,
                     T* out) {
  const std::int64_t tiles = (tokens + 15) / 16, lines = 2 * weight.groups, padded = weight.groups * kInt4Group;
  const std::int64_t stride = padded + 64;  // rows a power of two apart would share a set of the cache
  Lines<std::int8_t> integers(tokens * stride), packed(tiles * 16 * padded);
  Lines<float> x_scale(tokens);
  const bool few = tiles <= 2;
  const std::int64_t tiles_per_job = std::min(tiles, kTilesPerJob);
  const std::int64_t columns = (tiles + tiles_per_job - 1) / tiles_per_job;
  const std::int64_t rows_per_job = few ? rows_of_streams(weight.outputs) : tiles <= 4 ? 32 : kInt4JobRows;
  const std::int64_t jobs = (weight.outputs + rows_per_job - 1) / rows_per_job * columns;
#pragma omp parallel if (jobs > 1)
  {
#pragma omp for schedule(static)
    for (std::int64_t t = 0; t < tokens; ++t) {
      quantize_rows(x + t * width, 1, width, stride, integers.data() + t * stride, x_scale.data() + t);
    }
#pragma omp for schedule(static)
    for (std::int64_t i = 0; i < tiles * lines; ++i) {
      const std::int64_t first = i / lines * 16, k = i % lines * few::kLine;
      few::pack(reinterpret_cast<const std::uint8_t*>(integers.data()) + first * stride + k, tokens - first, stride,
                few::kLine, reinterpret_cast<std::uint8_t*>(packed.data()) + i * few::kTile);
    }
    Lines<float> sums((tiles_per_job + 1) / 2 * kInt4JobRows * 32 + kStreams * kStreamRows * 32);
    const Tiles shape;
#pragma omp for schedule(dynamic)
    for (std::int64_t job = 0; job < jobs; ++job) {
      const std::int64_t first = job / columns * rows_per_job, rows = std::min(rows_per_job, weight.outputs - first);
      const std::int64_t tile = job % columns * tiles_per_job, count = std::min(tiles_per_job, tiles - tile);
      const PackedTokens some{packed.data() + tile * weight.groups * kTileBytes, count};
      if (few) {
        (tiles == 1 ? multiply_few<1> : multiply_few<2>)(weight, first, rows, some.x, sums.data());
      } else {
        multiply_many(weight, first, rows, some, sums.data());
      }
      finish(sums.data(), x_scale.data() + tile * 16, bias + first, rows, std::min(count * 16, tokens - tile * 16),
             weight.outputs, out + tile * 16 * weight.outputs + first);
    }
  }
}

#else

template <typename T>
void linear_int4_amx(const Int4Weight&, const T*, std::int64_t, std::int64_t, const float*, T*) {}

#endif

template void linear_int4_amx(const Int4Weight&, const float*, std::int64_t, std::int64_t, const float*, float*);
template void linear_int4_amx(const Int4Weight&, const bfloat16*, std::int64_t, std::int64_t, const float*, bfloat16*);
template void linear_int4_amx(const Int4Weight&, const float16*, std::int64_t, std::int64_t, const float*, float16*);

}  // namespace wemm
