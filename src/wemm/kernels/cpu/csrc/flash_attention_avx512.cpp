// Flash attention on AVX-512 with BF16, 64 queries at a time.
//
// Queries lie across the vector lanes, keys and values are broadcast: maxima and sums are per lane, a head_dim of 72
// wastes nothing, and keys are used in the order they lie. Scores never leave the registers in float32: they become
// bfloat16 weights at once.

#include "flash_attention.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <cmath>
#include <cstring>

// One instruction set, written in its own words: not a case for foreach_isa.h.
#define WEMM_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

namespace wemm {
namespace {

constexpr int kQueryBlock = 64;
constexpr int kVectors = kQueryBlock / 16;
constexpr int kRows = 6;       // keys, or elements of a value, per register tile: 24 accumulators
constexpr int kKeyBlock = 192;  // their weights stay in the first-level cache
constexpr int kPacked = 64;     // positions packed at once

// What is packed of one head.
struct PackedHead {
  const bfloat16* keys;      // [num_keys, head_dim]
  const bfloat16* values_t;  // [head_dim, padded], zero behind num_keys
  std::int64_t num_keys;
  std::int64_t padded;
  int head_dim;
};

// Whole cache lines, and an odd number of them: rows that lie a power of two apart would share few places of the cache.
std::int64_t padded(std::int64_t num_keys) { return ((num_keys + 31) / 32 | 1) * 32; }

std::int64_t packed_size(const FlashShape& shape) {
  return (shape.num_keys + padded(shape.num_keys)) * shape.head_dim;
}

void pack(const FlashShape& shape, const KeyValue* rows, std::int64_t first, int count, bfloat16* packed) {
  const std::int64_t stride = padded(shape.num_keys);
  const int head_dim = shape.head_dim;
  bfloat16* values_t = packed + shape.num_keys * head_dim + first;
  for (int i = 0; i < count; ++i) {
    std::memcpy(packed + (first + i) * head_dim, rows[i].key, sizeof(bfloat16) * head_dim);
  }
  for (int d = 0; d < head_dim; ++d) {
    for (int i = 0; i < count; ++i) values_t[d * stride + i] = rows[i].value[d];
    if (first + count < shape.num_keys) continue;
    std::fill(values_t + d * stride + count, values_t + d * stride + stride - first, bfloat16{0});
  }
}

struct Scratch {
  std::uint32_t* query;    // [head_dim / 2, 64]: pairs of elements
  float* out;              // [head_dim, 64]
  std::uint32_t* weights;  // [kKeyBlock / 2, 64]: pairs of keys
};

struct Lanes {
  __m512 maximum[kVectors];
  __m512 sum[kVectors];
  __m512i visible[kVectors];
};

WEMM_AVX512_BF16 WEMM_INLINE __m512i broadcast_pair(const bfloat16* pair) {
  std::int32_t bits;
  std::memcpy(&bits, pair, sizeof bits);
  return _mm512_set1_epi32(bits);
}

// tile[r][v] += pairs of row r times pairs of the lanes
template <int R>
WEMM_AVX512_BF16 WEMM_INLINE void multiply(const bfloat16* rows, std::int64_t stride, const std::uint32_t* lanes,
                                           std::int64_t pairs, __m512 (&tile)[kRows][kVectors]) {
  for (std::int64_t j = 0; j < pairs; ++j) {
    __m512i lane[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) lane[v] = _mm512_load_si512(lanes + j * kQueryBlock + 16 * v);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m512i row = broadcast_pair(rows + r * stride + 2 * j);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) tile[r][v] = _mm512_dpbf16_ps(tile[r][v], (__m512bh)lane[v], (__m512bh)row);
    }
  }
}

// 2^x, relative error 7.5e-5: far below the bfloat16 that it becomes.
WEMM_AVX512_BF16 WEMM_INLINE __m512 exp2(__m512 x) {
  const __m512 fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 y = _mm512_fmadd_ps(fraction, _mm512_set1_ps(0.07802451f), _mm512_set1_ps(0.2260672f));
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(0.6958335f));
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(0.99992526f));
  return _mm512_scalef_ps(y, x);
}

// out[d] += weights of `num_rows` keys (from key `first` on) times their values
template <int R>
WEMM_AVX512_BF16 WEMM_INLINE void add_values(const bfloat16* values, std::int64_t padded, const Scratch& scratch,
                                             int d, std::int64_t pairs) {
  __m512 tile[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) tile[r][v] = _mm512_load_ps(scratch.out + (d + r) * kQueryBlock + 16 * v);
  multiply<R>(values + d * padded, padded, scratch.weights, pairs, tile);
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm512_store_ps(scratch.out + (d + r) * kQueryBlock + 16 * v, tile[r][v]);
}

WEMM_AVX512_BF16 void flush(const PackedHead& head, const Scratch& scratch, std::int64_t first, int num_keys) {
  const bfloat16* values = head.values_t + first;
  const std::int64_t pairs = (num_keys + 1) / 2;
  int d = 0;
  for (; d + kRows <= head.head_dim; d += kRows) add_values<kRows>(values, head.padded, scratch, d, pairs);
  switch (head.head_dim - d) {
    case 4: add_values<4>(values, head.padded, scratch, d, pairs); break;
    case 2: add_values<2>(values, head.padded, scratch, d, pairs); break;
    default: break;
  }
}

// Where a score is far above its lane's maximum, that becomes the maximum, and what was summed is scaled to it.
WEMM_AVX512_BF16 void raise(const __m512 (&highest)[kVectors], Lanes& lanes, const Scratch& scratch, int head_dim) {
  for (int v = 0; v < kVectors; ++v) {
    const __m512 limit = _mm512_add_ps(lanes.maximum[v], _mm512_set1_ps(kLazy));
    const __mmask16 above = _mm512_cmp_ps_mask(highest[v], limit, _CMP_GT_OQ);
    // Exactly 1 where nothing changes: an error here would add up.
    const __m512 factor = _mm512_mask_blend_ps(
        above, _mm512_set1_ps(1.0f), exp2(_mm512_sub_ps(lanes.maximum[v], highest[v])));
    lanes.maximum[v] = _mm512_mask_blend_ps(above, lanes.maximum[v], highest[v]);
    lanes.sum[v] = _mm512_mul_ps(lanes.sum[v], factor);
    for (int d = 0; d < head_dim; ++d) {
      float* out = scratch.out + d * kQueryBlock + 16 * v;
      _mm512_store_ps(out, _mm512_mul_ps(_mm512_load_ps(out), factor));
    }
  }
}

WEMM_AVX512_BF16 WEMM_INLINE __m512i pair_of(__m512 even, __m512 odd) {
  const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(interleaved, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// Scores of R keys from `key` on become weights `in_block` rows into the block. `block_start` is where the
// block begins; raising the maximum flushes it and moves that.
template <int R, bool kMasked>
WEMM_AVX512_BF16 WEMM_INLINE void weigh(const PackedHead& head, std::int64_t key, float scale, Lanes& lanes,
                                        const Scratch& scratch, std::int64_t& block_start) {
  __m512 tile[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) tile[r][v] = _mm512_setzero_ps();
  multiply<R>(head.keys + key * head.head_dim, head.head_dim, scratch.query, head.head_dim / 2, tile);

  __m512 highest[kVectors];
  __mmask16 far_above = 0;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    highest[v] = _mm512_set1_ps(-INFINITY);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      tile[r][v] = _mm512_mul_ps(tile[r][v], _mm512_set1_ps(scale));
      if (kMasked) {
        const __mmask16 seen = _mm512_cmpgt_epi32_mask(lanes.visible[v], _mm512_set1_epi32(static_cast<int>(key) + r));
        tile[r][v] = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-INFINITY), tile[r][v]);
      }
      highest[v] = _mm512_max_ps(highest[v], tile[r][v]);
    }
    far_above |= _mm512_cmp_ps_mask(highest[v], _mm512_add_ps(lanes.maximum[v], _mm512_set1_ps(kLazy)), _CMP_GT_OQ);
  }
  if (far_above) {
    if (key > block_start) flush(head, scratch, block_start, static_cast<int>(key - block_start));
    block_start = key;
    raise(highest, lanes, scratch, head.head_dim);
  }
  std::uint32_t* weights = scratch.weights + (key - block_start) / 2 * kQueryBlock;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m512 weight = exp2(_mm512_sub_ps(tile[r][v], lanes.maximum[v]));
      // A lane that has seen no key yet has no maximum: minus infinity less itself is no number.
      tile[r][v] = kMasked ? _mm512_maskz_mov_ps(
                                 _mm512_cmpgt_epi32_mask(lanes.visible[v], _mm512_set1_epi32(static_cast<int>(key) + r)),
                                 weight)
                           : weight;
      lanes.sum[v] = _mm512_add_ps(lanes.sum[v], tile[r][v]);
    }
#pragma GCC unroll 3
    for (int r = 0; r < R; r += 2) {
      const __m512 odd = r + 1 < R ? tile[r + 1 < R ? r + 1 : r][v] : _mm512_setzero_ps();
      _mm512_store_si512(weights + r / 2 * kQueryBlock + 16 * v, pair_of(tile[r][v], odd));
    }
  }
}

template <bool kMasked>
WEMM_AVX512_BF16 void attend(const PackedHead& head, std::int64_t from, std::int64_t to, float scale, Lanes& lanes,
                             const Scratch& scratch) {
  std::int64_t block_start = from;
  std::int64_t key = from;
  const auto make_room = [&] {
    if (key - block_start + kRows <= kKeyBlock) return;
    flush(head, scratch, block_start, static_cast<int>(key - block_start));
    block_start = key;
  };
  for (; key + kRows <= to; key += kRows) {
    make_room();
    weigh<kRows, kMasked>(head, key, scale, lanes, scratch, block_start);
  }
  make_room();
  switch (to - key) {
    case 5: weigh<5, kMasked>(head, key, scale, lanes, scratch, block_start); break;
    case 4: weigh<4, kMasked>(head, key, scale, lanes, scratch, block_start); break;
    case 3: weigh<3, kMasked>(head, key, scale, lanes, scratch, block_start); break;
    case 2: weigh<2, kMasked>(head, key, scale, lanes, scratch, block_start); break;
    case 1: weigh<1, kMasked>(head, key, scale, lanes, scratch, block_start); break;
    default: break;
  }
  if (to > block_start) flush(head, scratch, block_start, static_cast<int>(to - block_start));
}

void pack_queries(const Query* queries, int num_queries, int head_dim, std::uint32_t* packed) {
  std::memset(packed, 0, sizeof(std::uint32_t) * kQueryBlock * head_dim / 2);
  for (int q = 0; q < num_queries; ++q) {
    for (int j = 0; j < head_dim / 2; ++j) {
      std::memcpy(packed + j * kQueryBlock + q, queries[q].query + 2 * j, sizeof(std::uint32_t));
    }
  }
}

std::int64_t scratch_size(int head_dim) {
  return kQueryBlock * (head_dim / 2 + head_dim + kKeyBlock / 2) + 16;
}

WEMM_AVX512_BF16 void attend_block(const FlashShape& shape, const bfloat16* packed, const Query* queries,
                                   int num_queries, float scale, float* memory) {
  const PackedHead head{packed, packed + shape.num_keys * shape.head_dim, shape.num_keys, padded(shape.num_keys),
                        shape.head_dim};
  const std::uintptr_t aligned = (reinterpret_cast<std::uintptr_t>(memory) + 63) / 64 * 64;
  Scratch scratch;
  scratch.out = reinterpret_cast<float*>(aligned);
  scratch.query = reinterpret_cast<std::uint32_t*>(scratch.out + kQueryBlock * head.head_dim);
  scratch.weights = scratch.query + kQueryBlock * (head.head_dim / 2);
  pack_queries(queries, num_queries, head.head_dim, scratch.query);
  std::fill(scratch.out, scratch.out + kQueryBlock * head.head_dim, 0.0f);

  alignas(64) std::int32_t visible[kQueryBlock];
  std::int64_t seen_by_all = head.num_keys, seen_by_any = 0;
  for (int q = 0; q < kQueryBlock; ++q) {
    const std::int64_t keys = q < num_queries ? queries[q].visible : queries[num_queries - 1].visible;
    visible[q] = static_cast<std::int32_t>(keys);
    seen_by_all = std::min(seen_by_all, keys);
    seen_by_any = std::max(seen_by_any, keys);
  }
  Lanes lanes;
  for (int v = 0; v < kVectors; ++v) {
    lanes.maximum[v] = _mm512_set1_ps(-INFINITY);
    lanes.sum[v] = _mm512_setzero_ps();
    lanes.visible[v] = _mm512_load_si512(visible + 16 * v);
  }
  // Pairs of keys must stay pairs where the two parts meet.
  seen_by_all -= seen_by_all % 2;
  attend<false>(head, 0, seen_by_all, scale * 1.44269504f, lanes, scratch);
  attend<true>(head, seen_by_all, seen_by_any, scale * 1.44269504f, lanes, scratch);

  alignas(64) float sums[kQueryBlock];
  for (int v = 0; v < kVectors; ++v) _mm512_store_ps(sums + 16 * v, lanes.sum[v]);
  for (int q = 0; q < num_queries; ++q) {
    const float inverse = 1.0f / sums[q];
    for (int d = 0; d < head.head_dim; ++d) {
      queries[q].out[d] = from_float<bfloat16>(scratch.out[d * kQueryBlock + q] * inverse);
    }
  }
}

}  // namespace

const FlashFamily kFlashAvx512{kQueryBlock, kPacked, packed_size, pack, scratch_size, attend_block};

}  // namespace wemm

#endif
