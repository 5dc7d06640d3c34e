// Flash attention on matrix tiles, 32 queries against 128 keys at a time.
//
// Scores leave the tiles in float32 and come back as weights, in the cache that is nearest. Their 2^x is made of
// integers, 32 at a time: it has to be no better than the bfloat16 that it becomes.

#include "amx.h"
#include "flash_attention.h"

#if defined(WEMM_AMX)

#include <atomic>
#include <cmath>
#include <utility>

#define WEMM_AMX_VBMI                                                                                             \
  __attribute__((target("amx-tile,amx-int8,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,"    \
                        "avx512vbmi")))

namespace wemm {
namespace {

constexpr int kQueryBlock = 256;  // share what is read of keys and values
constexpr int kQueries = 32;      // share the tiles
constexpr int kStep = 32;         // keys, or elements, of a product of tiles
constexpr int kSteps = 4;         // of keys, from scores to weights to values
constexpr int kKeys = kSteps * kStep;
constexpr int kNear = 512;  // keys that stay in the second-level cache while all queries meet them
constexpr int kTile = 512;  // bfloat16 elements

// Rows are filled up with zeros: of queries and keys to whole steps, of values to whole tiles.
constexpr int key_width(int head_dim) { return (head_dim + kStep - 1) / kStep * kStep; }
constexpr int value_width(int head_dim) { return (head_dim + 15) / 16 * 16; }

// Keys: for each 16 of them, for each step of elements a tile of [16 pairs of elements, 16 keys, 2].
// Values: for each step of keys, for each 16 elements a tile of [16 pairs of keys, 16 elements, 2].
std::int64_t padded(std::int64_t num_keys) { return (num_keys + kStep - 1) / kStep * kStep; }

std::int64_t packed_size(const FlashShape& shape) {
  return padded(shape.num_keys) * (key_width(shape.head_dim) + value_width(shape.head_dim));
}

// Which of 32 keys is the first of pair j of their weights: _mm512_packus_epi32 puts 4 of the first 16 next to 4 of
// the second.
constexpr int first_of_pair(int j) { return j / 4 * 4 + j % 2 * 2 + (j % 4 >= 2 ? 16 : 0); }

WEMM_AMX_VBMI bool is_finite(const bfloat16* row, int head_dim) {
  const __m512i exponent = _mm512_set1_epi16(0x7F80);
  __mmask32 special = 0;
  for (int d = 0; d < head_dim; d += 32) {
    const __mmask32 there = head_dim - d >= 32 ? ~__mmask32{0} : (__mmask32{1} << (head_dim - d)) - 1;
    const __m512i words = _mm512_maskz_loadu_epi16(there, row + d);
    special |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(words, exponent), exponent);
  }
  return special == 0;
}

WEMM_AMX_VBMI void pack(const FlashShape& shape, const KeyValue* rows, std::int64_t first, int count,
                        bfloat16* packed) {
  alignas(64) static constexpr std::uint16_t kZeros[kMaxHeadDim] = {};
  const int head_dim = shape.head_dim, key_tiles = key_width(head_dim) / kStep;
  const int value_tiles = value_width(head_dim) / 16;
  bfloat16* keys = packed + first * key_width(head_dim);
  bfloat16* values = packed + padded(shape.num_keys) * key_width(head_dim) + first * value_width(head_dim);
  const auto* zeros = reinterpret_cast<const bfloat16*>(kZeros);
  for (int at = 0; at < count; at += kStep) {
    KeyValue row[kStep];
    for (int i = 0; i < kStep; ++i) row[i] = at + i < count ? rows[at + i] : KeyValue{zeros, zeros};

    for (int half = 0; half < 2; ++half, keys += key_tiles * kTile) {
      const KeyValue* sixteen = row + 16 * half;
      for (int pair = 0; pair < key_tiles * 16; ++pair) {
        alignas(64) std::uint32_t lanes[16] = {};
        if (2 * pair < head_dim) {
          for (int i = 0; i < 16; ++i) std::memcpy(lanes + i, sixteen[i].key + 2 * pair, sizeof(std::uint32_t));
        }
        _mm512_storeu_si512(keys + pair * 32, _mm512_load_si512(lanes));
      }
    }

    // A score that is not finite would become some weight, so the value says it.
    __mmask32 finite = 0;
    for (int i = 0; i < kStep; ++i) finite |= __mmask32{is_finite(row[i].key, head_dim)} << i;
    for (int tile = 0; tile < value_tiles; ++tile) {
      const int left = head_dim - 16 * tile;
      const __mmask16 there = left >= 16 ? 0xFFFF : (1 << left) - 1;
      for (int j = 0; j < 16; ++j, values += 32) {
        __m512i words[2];
        for (int i = 0; i < 2; ++i) {
          const int key = first_of_pair(j) + i;
          words[i] = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, row[key].value + 16 * tile));
          if (!(finite >> key & 1)) words[i] = _mm512_set1_epi32(0x7FC0);
        }
        _mm512_storeu_si512(values, _mm512_or_si512(words[0], _mm512_slli_epi32(words[1], 16)));
      }
    }
  }
}

// Of a block of queries. Rows of scores and weights are those of the 32 queries at work.
struct Scratch {
  float* scores;      // [2, 32, kKeys]: of these keys and of the next
  bfloat16* weights;  // [32, kKeys]
  bfloat16* query;    // [kQueryBlock, key_width]
  float* out;         // [kQueryBlock, value_width]
  float* sums;        // [kQueryBlock, 16]: of weights, lane by lane
  float* maximum;     // [kQueryBlock], of scores before they are scaled
};

std::int64_t scratch_size(int head_dim) {
  return 16 + kQueries * kKeys * 5 / 2 + kQueryBlock * (key_width(head_dim) / 2 + value_width(head_dim) + 16 + 1);
}

Scratch divide(float* memory, int head_dim) {
  Scratch s;
  s.scores = reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(memory) + 63) / 64 * 64);
  s.weights = reinterpret_cast<bfloat16*>(s.scores + 2 * kQueries * kKeys);
  s.query = s.weights + kQueries * kKeys;
  s.out = reinterpret_cast<float*>(s.query + kQueryBlock * key_width(head_dim));
  s.sums = s.out + kQueryBlock * value_width(head_dim);
  s.maximum = s.sums + kQueryBlock * 16;
  return s;
}

// Scores count 1 / 256 from here on, so that an integer holds the exponent and eight bits behind it.
constexpr float kUnits = 256.0f;
constexpr float kExponentBias = 127.0f;

// 2^f - 1 is less than f, by this many units; f: six bits.
struct Correction {
  alignas(64) std::uint8_t units[64];
  Correction() {
    for (int i = 0; i < 64; ++i) {
      const float f = (4 * i + 1.5f) / kUnits;
      units[i] = static_cast<std::uint8_t>(std::lround((1 + f - std::exp2(f)) * kUnits));
    }
  }
};
const Correction kCorrection;

// bfloat16 of 2^x, 32 times; fixed: 256 * (x + 127).
WEMM_AMX_VBMI WEMM_INLINE __m512i exp2_of(__m512i fixed, __m512i correction) {
  const __m512i less = _mm512_maskz_permutexvar_epi8(0x5555555555555555, _mm512_srli_epi16(fixed, 2), correction);
  return _mm512_srli_epi16(_mm512_sub_epi16(fixed, less), 1);
}

// scale: in units.
WEMM_AMX_VBMI WEMM_INLINE __m512i fixed_of(__m512 score, __m512 scale) {
  return _mm512_cvtps_epi32(_mm512_fmadd_ps(score, scale, _mm512_set1_ps(kExponentBias * kUnits)));
}

// Tiles are read and written behind the compiler's back.
WEMM_INLINE void settle() { std::atomic_signal_fence(std::memory_order_seq_cst); }

// scores[32, 32] = query keys^T
WEMM_AMX_VBMI WEMM_INLINE void multiply_keys(const bfloat16* query, const bfloat16* keys, int width, float* scores) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const std::int64_t row = sizeof(bfloat16) * width;
  for (int d = 0; d < width; d += kStep) {
    _tile_loadd(4, query + d, row);
    _tile_loadd(6, keys + d * 16, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, keys + (width + d) * 16, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, query + 16 * width + d, row);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  constexpr std::int64_t kRow = sizeof(float) * kKeys;
  _tile_stored(0, scores, kRow);
  _tile_stored(1, scores + 16, kRow);
  _tile_stored(2, scores + 16 * kKeys, kRow);
  _tile_stored(3, scores + 16 * kKeys + 16, kRow);
}

// out[32, width] += weights values
WEMM_AMX_VBMI WEMM_INLINE void add_values(const bfloat16* weights, const bfloat16* values, int width, int steps,
                                          float* out) {
  constexpr std::int64_t kWeights = sizeof(bfloat16) * kKeys;
  const std::int64_t row = sizeof(float) * width;
  int d = 0;
  for (; d + 32 <= width; d += 32) {
    _tile_loadd(0, out + d, row);
    _tile_loadd(1, out + d + 16, row);
    _tile_loadd(2, out + 16 * width + d, row);
    _tile_loadd(3, out + 16 * width + d + 16, row);
    for (int step = 0; step < steps; ++step) {
      const bfloat16* value = values + step * width * kStep + d * 32;
      _tile_loadd(4, weights + step * kStep, kWeights);
      _tile_loadd(6, value, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, value + kTile, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, weights + 16 * kKeys + step * kStep, kWeights);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out + d, row);
    _tile_stored(1, out + d + 16, row);
    _tile_stored(2, out + 16 * width + d, row);
    _tile_stored(3, out + 16 * width + d + 16, row);
  }
  if (d == width) return;
  _tile_loadd(0, out + d, row);
  _tile_loadd(2, out + 16 * width + d, row);
  for (int step = 0; step < steps; ++step) {
    _tile_loadd(4, weights + step * kStep, kWeights);
    _tile_loadd(6, values + step * width * kStep + d * 32, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, weights + 16 * kKeys + step * kStep, kWeights);
    _tile_dpbf16ps(2, 5, 6);
  }
  _tile_stored(0, out + d, row);
  _tile_stored(2, out + 16 * width + d, row);
}

// The highest score of a query becomes its maximum, and what was summed is scaled to it.
WEMM_AMX_VBMI __attribute__((noinline)) void raise(__m512 highest, float scale, int width, float& maximum, float* sums,
                                                   float* out) {
  const float before = maximum;
  maximum = _mm512_reduce_max_ps(highest);
  const __m512 factor = _mm512_set1_ps(before == -INFINITY ? 0.0f : std::exp2((before - maximum) * scale));
  _mm512_store_ps(sums, _mm512_mul_ps(_mm512_load_ps(sums), factor));
  for (int d = 0; d < width; d += 16) _mm512_store_ps(out + d, _mm512_mul_ps(_mm512_load_ps(out + d), factor));
}

// Scores of queries from..to of the 32 become weights, those of keys behind what a query sees 0.
template <bool kMasked>
WEMM_AMX_VBMI void weigh(const Scratch& s, const float* scores, int first, int from, int to, const Query* queries,
                         std::int64_t key, float scale, int width) {
  constexpr int kVectors = kKeys / 16;
  const __m512i correction = _mm512_load_si512(kCorrection.units);
  const __m512i ones = _mm512_set1_epi16(0x3F80);
  const __m512 units = _mm512_set1_ps(scale * kUnits);
  const float lazy = kLazy / scale;
  for (int q = from; q < to; ++q) {
    __m512 score[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      score[v] = _mm512_load_ps(scores + q * kKeys + 16 * v);
      if (kMasked) {
        const std::int64_t seen = queries[first + q].visible - key - 16 * v;
        const __mmask16 mask = seen >= 16 ? 0xFFFF : seen <= 0 ? 0 : (1 << seen) - 1;
        score[v] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask, score[v]);
      }
    }
    __m512 highest = score[0];
    for (int v = 1; v < kVectors; ++v) highest = _mm512_max_ps(highest, score[v]);
    float& maximum = s.maximum[first + q];
    float* sums = s.sums + (first + q) * 16;
    // Of a scale of 0, `lazy` is infinite: the first score must raise the maximum all the same.
    const __m512 limit = _mm512_set1_ps(maximum == -INFINITY ? -INFINITY : maximum + lazy);
    if (__builtin_expect(_mm512_cmp_ps_mask(highest, limit, _CMP_GT_OQ) != 0, 0)) {
      raise(highest, scale, width, maximum, sums, s.out + (first + q) * width);
    }
    const __m512 highest_yet = _mm512_set1_ps(maximum);
    __m512 sum = _mm512_load_ps(sums);
    for (int step = 0; step < kSteps; ++step) {
      const __m512i left = fixed_of(_mm512_sub_ps(score[2 * step], highest_yet), units);
      const __m512i right = fixed_of(_mm512_sub_ps(score[2 * step + 1], highest_yet), units);
      // What is below 2^-127, or no number, becomes 0 on the way.
      const __m512i weights = exp2_of(_mm512_packus_epi32(left, right), correction);
      sum = _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)ones);
      _mm512_store_si512(s.weights + q * kKeys + step * kStep, weights);
    }
    _mm512_store_ps(sums, sum);
  }
}

// 32 queries from `first` on meet keys begin..end.
WEMM_AMX_VBMI void attend_near(const Scratch& s, int first, const Query* queries, const bfloat16* keys,
                               const bfloat16* values, std::int64_t begin, std::int64_t end, std::int64_t seen_by_all,
                               float scale, int head_dim) {
  const int width = key_width(head_dim), out_width = value_width(head_dim);
  const bfloat16* query = s.query + first * width;
  float *now = s.scores, *next = s.scores + kQueries * kKeys;
  settle();
  for (int step = 0; step < kSteps && begin + step * kStep < end; ++step) {
    multiply_keys(query, keys + (begin + step * kStep) * width, width, now + step * kStep);
  }
  for (std::int64_t key = begin; key < end; key += kKeys, std::swap(now, next)) {
    settle();
    // Tiles multiply the next keys while vectors weigh these.
    for (int step = 0; step < kSteps; ++step) {
      const std::int64_t ahead = key + kKeys + step * kStep;
      if (ahead < end) multiply_keys(query, keys + ahead * width, width, next + step * kStep);
      constexpr int kRows = kQueries / kSteps;
      if (key + kKeys > seen_by_all) {
        weigh<true>(s, now, first, step * kRows, (step + 1) * kRows, queries, key, scale, out_width);
      } else {
        weigh<false>(s, now, first, step * kRows, (step + 1) * kRows, queries, key, scale, out_width);
      }
    }
    settle();
    const int steps = static_cast<int>(std::min<std::int64_t>(kSteps, (end - key + kStep - 1) / kStep));
    add_values(s.weights, values + key * out_width, out_width, steps, s.out + first * out_width);
  }
  settle();
}

WEMM_AMX_VBMI void attend(const FlashShape& shape, const bfloat16* packed, const Query* given, int num_queries,
                          float scale, float* memory) {
  const int head_dim = shape.head_dim, width = key_width(head_dim), out_width = value_width(head_dim);
  const Scratch s = divide(memory, head_dim);
  const bfloat16* values = packed + padded(shape.num_keys) * width;
  const int rows = (num_queries + kQueries - 1) / kQueries * kQueries;
  Query queries[kQueryBlock];
  std::memset(s.query, 0, sizeof(bfloat16) * rows * width);
  for (int q = 0; q < rows; ++q) {
    queries[q] = given[std::min(q, num_queries - 1)];
    std::memcpy(s.query + q * width, queries[q].query, sizeof(bfloat16) * head_dim);
  }
  std::fill(s.out, s.out + rows * out_width, 0.0f);
  std::fill(s.sums, s.sums + rows * 16, 0.0f);
  std::fill(s.maximum, s.maximum + rows, -INFINITY);

  const Tiles tiles;
  const float log2_scale = scale * 1.44269504f;
  for (std::int64_t near = 0; near < shape.num_keys; near += kNear) {
    for (int first = 0; first < rows; first += kQueries) {
      std::int64_t seen_by_all = shape.num_keys, seen_by_any = 0;
      for (int q = first; q < first + kQueries; ++q) {
        seen_by_all = std::min(seen_by_all, queries[q].visible);
        seen_by_any = std::max(seen_by_any, queries[q].visible);
      }
      attend_near(s, first, queries, packed, values, near, std::min(near + kNear, seen_by_any), seen_by_all, log2_scale,
                  head_dim);
    }
  }

  for (int q = 0; q < num_queries; ++q) {
    const __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_load_ps(s.sums + q * 16)));
    for (int d = 0; d < head_dim; d += 16) {
      const __mmask16 there = head_dim - d >= 16 ? 0xFFFF : (1 << (head_dim - d)) - 1;
      const __m512 out = _mm512_mul_ps(_mm512_load_ps(s.out + q * out_width + d), inverse);
      _mm256_mask_storeu_epi16(queries[q].out + d, there, (__m256i)_mm512_cvtneps_pbh(out));
    }
  }
}

}  // namespace

const FlashFamily kFlashAmx{kQueryBlock, kKeys, packed_size, pack, scratch_size, attend};

}  // namespace wemm

#endif
