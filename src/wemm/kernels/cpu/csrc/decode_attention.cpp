// ops/decode_attention.py: one query per sequence over the paged cache.
//
// A job is a piece of one sequence, all heads of it: keys and values are read in the order in which they lie, once for
// all the query heads that share them. Pieces are put together by their maxima and sums.

#ifndef WEMM_COMPILING_FOR_ISA

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "decode_attention.h"

namespace wemm {

constexpr int kTogether = 4;  // query heads that share a pass over a key

}  // namespace wemm

#define WEMM_THIS_FILE "decode_attention.cpp"
#include "foreach_isa.h"
#include "kernels.h"

namespace wemm {
namespace {

struct Job {
  std::int64_t seq;
  Span span;
};

#if defined(__x86_64__) && defined(__GNUC__)
#define WEMM_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")))

constexpr int kScored = 4;  // keys that are multiplied together
constexpr int kAdded = 8;   // values

// The sum of each of 16 vectors.
WEMM_AVX512_BF16 WEMM_INLINE __m512 sums_of(const __m512 (&x)[16]) {
  __m512 fours[4];
  for (int i = 0; i < 4; ++i) {
    const __m512* v = x + 4 * i;
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
  }
  const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88),
                                 _mm512_shuffle_f32x4(fours[0], fours[1], 0xDD));
  const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2], fours[3], 0x88),
                                 _mm512_shuffle_f32x4(fours[2], fours[3], 0xDD));
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}

// Scores of four keys, for four query heads; query: [4, head_dim], `at`: where in a row the KV head lies.
WEMM_AVX512_BF16 WEMM_INLINE void score_keys(const bfloat16* const* rows, std::int64_t at, const bfloat16* query,
                                             const Heads& heads, float* scores) {
  __m512 totals[kTogether * kScored];
#pragma GCC unroll 16
  for (__m512& total : totals) total = _mm512_setzero_ps();
  for (std::int64_t d = 0; d < heads.head_dim; d += 32) {
    __m512i key[kScored];
#pragma GCC unroll 4
    for (int i = 0; i < kScored; ++i) {
      key[i] = _mm512_loadu_si512(rows[i] + at + d);
      __builtin_prefetch(rows[kScored + i] + at + d);
    }
#pragma GCC unroll 4
    for (int h = 0; h < kTogether; ++h) {
      const __m512i q = _mm512_loadu_si512(query + h * heads.head_dim + d);
#pragma GCC unroll 4
      for (int i = 0; i < kScored; ++i) {
        __m512& total = totals[h * kScored + i];
        total = _mm512_dpbf16_ps(total, (__m512bh)q, (__m512bh)key[i]);
      }
    }
  }
  alignas(64) float all[kTogether * kScored];
  _mm512_store_ps(all, _mm512_mul_ps(sums_of(totals), _mm512_set1_ps(heads.scale)));
  for (int h = 0; h < kTogether; ++h) std::memcpy(scores + h * kPiece, all + h * kScored, sizeof(float) * kScored);
}

// out[4, head_dim] += weights times eight values. Pairs of values are woven into each other, which leaves the elements
// of 32 in the order that `unweave` undoes.
WEMM_AVX512_BF16 WEMM_INLINE void add_weighted(const bfloat16* const* rows, std::int64_t at, const float* weights,
                                               const Heads& heads, float* out) {
  for (std::int64_t d = 0; d < heads.head_dim; d += 32) {
    __m512 low[kTogether], high[kTogether];
#pragma GCC unroll 4
    for (int h = 0; h < kTogether; ++h) {
      low[h] = _mm512_loadu_ps(out + h * heads.head_dim + d);
      high[h] = _mm512_loadu_ps(out + h * heads.head_dim + d + 16);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kAdded; i += 2) {
      const __m512i even = _mm512_loadu_si512(rows[i] + at + d), odd = _mm512_loadu_si512(rows[i + 1] + at + d);
      __builtin_prefetch(rows[kAdded + i] + at + d);
      __builtin_prefetch(rows[kAdded + i + 1] + at + d);
      const __m512i first = _mm512_unpacklo_epi16(even, odd), second = _mm512_unpackhi_epi16(even, odd);
#pragma GCC unroll 4
      for (int h = 0; h < kTogether; ++h) {
        std::int32_t pair;
        std::memcpy(&pair, reinterpret_cast<const bfloat16*>(weights + h * kPiece) + i, sizeof pair);
        const __m512i weight = _mm512_set1_epi32(pair);
        low[h] = _mm512_dpbf16_ps(low[h], (__m512bh)first, (__m512bh)weight);
        high[h] = _mm512_dpbf16_ps(high[h], (__m512bh)second, (__m512bh)weight);
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < kTogether; ++h) {
      _mm512_storeu_ps(out + h * heads.head_dim + d, low[h]);
      _mm512_storeu_ps(out + h * heads.head_dim + d + 16, high[h]);
    }
  }
}

WEMM_AVX512_BF16 WEMM_INLINE void unweave(float* out) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  const __m512 low = _mm512_loadu_ps(out), high = _mm512_loadu_ps(out + 16);
  _mm512_storeu_ps(out, _mm512_permutex2var_ps(low, first, high));
  _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(low, second, high));
}

// Where each position of a piece lies. Behind the end lies the last one again: it is multiplied by 0, or fetched only.
void find_rows(const bfloat16* cache, const Heads& heads, const Span& span,
               const bfloat16* (&rows)[kPiece + 2 * kAdded]) {
  for (std::int64_t i = 0; i < kPiece + 2 * kAdded; ++i) {
    const std::int64_t position = std::min(span.first + i, span.last - 1);
    const std::int64_t block = span.blocks[position / heads.block_size];
    rows[i] = cache + (block * heads.block_size + position % heads.block_size) * heads.num_kv_heads * heads.head_dim;
  }
}

// Groups of whole fours and steps of 32 elements.
WEMM_AVX512_BF16 void attend_piece_bf16(const bfloat16* key_cache, const bfloat16* value_cache, const Heads& heads,
                                        const Piece<bfloat16>& piece, std::vector<float>& scratch) {
  const std::int64_t num_heads = heads.num_kv_heads * heads.group, count = piece.span.last - piece.span.first;
  const std::int64_t padded = (count + kAdded - 1) / kAdded * kAdded;
  scratch.resize(num_heads * kPiece);
  const bfloat16* rows[kPiece + 2 * kAdded];
  find_rows(key_cache, heads, piece.span, rows);
  for (std::int64_t i = 0; i < padded; i += kScored) {
    for (std::int64_t h = 0; h < num_heads; h += kTogether) {
      score_keys(rows + i, h / heads.group * heads.head_dim, piece.query + h * heads.head_dim, heads,
                 scratch.data() + h * kPiece + i);
    }
  }
  for (std::int64_t h = 0; h < num_heads; ++h) {
    float* scores = scratch.data() + h * kPiece;
    avx512::soften(scores, count, piece.maxima[h], piece.sums[h]);
    std::fill(scores + count, scores + padded, 0.0f);
    for (std::int64_t i = 0; i < padded; i += kAdded) {  // in place
      _mm_storeu_si128(reinterpret_cast<__m128i*>(reinterpret_cast<bfloat16*>(scores) + i),
                       (__m128i)_mm256_cvtneps_pbh(_mm256_loadu_ps(scores + i)));
    }
  }
  std::fill(piece.out, piece.out + num_heads * heads.head_dim, 0.0f);
  find_rows(value_cache, heads, piece.span, rows);
  for (std::int64_t i = 0; i < padded; i += kAdded) {
    for (std::int64_t h = 0; h < num_heads; h += kTogether) {
      const auto* weights = reinterpret_cast<const bfloat16*>(scratch.data() + h * kPiece) + i;
      add_weighted(rows + i, h / heads.group * heads.head_dim, reinterpret_cast<const float*>(weights), heads,
                   piece.out + h * heads.head_dim);
    }
  }
  for (std::int64_t d = 0; d < num_heads * heads.head_dim; d += 32) unweave(piece.out + d);
}
#endif

template <typename T, typename Cache>
AttendPiece<T, Cache> attend_of(const Heads& heads) {
#ifdef WEMM_AVX512_BF16
  if constexpr (std::is_same_v<T, bfloat16>) {
    if (const auto attend = attend_on_tiles<Cache>(heads)) return attend;
  }
  if constexpr (std::is_same_v<T, bfloat16> && std::is_same_v<Cache, bfloat16>) {
    if (has_avx512_bf16() && heads.group % kTogether == 0 && heads.head_dim % 32 == 0) return &attend_piece_bf16;
  }
#endif
  (void)heads;
  return WEMM_BEST(attend_piece<T, Cache>);
}

template <typename T, typename Cache>
void decode(const Tensor& query, const Tensor& key, const Tensor& value,
            const std::vector<std::vector<std::int64_t>>& tables, const std::vector<std::int64_t>& seq_lens, float scale,
            const Tensor& out) {
  const std::int64_t num_heads = query.shape[1], head_dim = query.shape[2], num_kv_heads = key.shape[2];
  const Heads heads{num_kv_heads, num_heads / num_kv_heads, head_dim, key.shape[1], scale};
  const std::int64_t width = num_heads * head_dim;
  std::vector<Job> jobs;
  std::vector<std::int64_t> first_job;  // per sequence
  for (std::size_t s = 0; s < tables.size(); ++s) {
    first_job.push_back(static_cast<std::int64_t>(jobs.size()));
    for (std::int64_t at = 0; at < seq_lens[s]; at += kPiece) {
      jobs.push_back({static_cast<std::int64_t>(s), {tables[s].data(), at, std::min(at + kPiece, seq_lens[s])}});
    }
  }
  first_job.push_back(static_cast<std::int64_t>(jobs.size()));
  const std::int64_t num_jobs = first_job.back(), num_rows = static_cast<std::int64_t>(tables.size()) * num_heads;
  std::vector<float> wide(num_rows * head_dim);
  const std::unique_ptr<float[]> pieces(new float[num_jobs * width]);  // not zeroed: megabytes
  std::vector<float> maxima(num_jobs * num_heads), sums(num_jobs * num_heads);
  for (std::size_t i = 0; i < wide.size(); ++i) wide[i] = to_float(query.data<T>()[i]) * scale;
  const auto attend = attend_of<T, Cache>(heads);
  const auto join = WEMM_BEST(join_pieces<T>);
  std::atomic<std::int64_t> taken{0};

#pragma omp parallel
  {
    std::vector<float> scratch;
    for (std::int64_t j = taken++, next; j < num_jobs; j = next) {
      next = taken++;
      const Job& job = jobs[j];
      const Span ahead = next < num_jobs ? jobs[next].span : Span{nullptr, 0, 0};
      attend(key.data<Cache>(), value.data<Cache>(), heads,
             {job.span, ahead, query.data<T>() + job.seq * width, wide.data() + job.seq * width,
              pieces.get() + j * width, maxima.data() + j * num_heads, sums.data() + j * num_heads},
             scratch);
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < num_rows; ++row) {
      const std::int64_t seq = row / num_heads, head = row % num_heads, first = first_job[seq];
      join(pieces.get() + first * width + head * head_dim, maxima.data() + first * num_heads + head,
           sums.data() + first * num_heads + head, first_job[seq + 1] - first, width, num_heads, head_dim,
           out.data<T>() + row * head_dim);
    }
  }
}

}  // namespace

void decode_attention(const TensorArgument& query_argument, const TensorArgument& key_argument,
                      const TensorArgument& value_argument, const TensorArgument& tables_argument,
                      const TensorArgument& seq_lens_argument, float scale, const TensorArgument& out_argument) {
  const Tensor query(query_argument), key(key_argument), value(value_argument), out(out_argument);
  const Tensor block_tables(tables_argument), lengths(seq_lens_argument);
  const bool quantized = key.dtype == DType::int8;
  const DType stored = quantized ? DType::int8 : query.dtype;
  Contract contract("decode_attention");
  contract.expect("block_tables", block_tables, {"num_seqs", "max_blocks"}, DType::int32)
      .expect("seq_lens", lengths, {"num_seqs"}, DType::int32);
  contract.expect("query", query, {"num_seqs", "num_heads", "head_dim"})
      .expect("key_cache", key, {"num_blocks", "block_size", "num_kv_heads", "width"}, stored)
      .expect("value_cache", value, {"num_blocks", "block_size", "num_kv_heads", "width"}, stored)
      .expect("out", out, {"num_seqs", "num_heads", "head_dim"}, query.dtype);
  contract.require(contract["width"] == contract["head_dim"] + (quantized ? static_cast<std::int64_t>(sizeof(float)) : 0),
                   "needs heads of the cache as wide as those of the queries");
  contract.require(contract["num_kv_heads"] > 0 && contract["num_heads"] % contract["num_kv_heads"] == 0,
                   "needs query heads in whole groups");
  const std::vector<std::int64_t> seq_lens = integers(lengths);
  const auto tables = used_blocks(block_tables, seq_lens, contract["block_size"]);
  contract.require_blocks(tables, seq_lens, contract["num_seqs"], contract["block_size"], contract["num_blocks"]);
  for (const std::int64_t length : seq_lens) contract.require(length > 0, "needs a token in every sequence");
  with_dtype(query.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = quantized ? &decode<T, std::int8_t> : &decode<T, T>;
    run(query, key, value, tables, seq_lens, scale, out);
  });
}

}  // namespace wemm

#else

// A row of a cache: its width in elements, and what it is multiplied by.
template <typename T>
WEMM_INLINE std::int64_t width_of(const T*, std::int64_t head_dim) {
  return head_dim;
}

WEMM_INLINE std::int64_t width_of(const std::int8_t*, std::int64_t head_dim) {
  return head_dim + static_cast<std::int64_t>(sizeof(float));
}

template <typename T>
WEMM_INLINE float scale_of(const T*, std::int64_t) {
  return 1.0f;
}

WEMM_INLINE float scale_of(const std::int8_t* row, std::int64_t head_dim) {
  float scale;
  std::memcpy(&scale, row + head_dim, sizeof scale);
  return scale;
}

// Calls visit(i, row) with the keys, or values, of all KV heads at positions first..last.
template <typename T, typename Visit>
WEMM_INLINE void each_row(const T* cache, const Heads& heads, const Span& span, Visit visit) {
  const std::int64_t width = heads.num_kv_heads * width_of(cache, heads.head_dim);
  std::int64_t block = span.first / heads.block_size, offset = span.first % heads.block_size;
  for (std::int64_t i = span.first; i < span.last; ++block, offset = 0) {
    const T* row = cache + (span.blocks[block] * heads.block_size + offset) * width;
    for (; offset < heads.block_size && i < span.last; ++offset, ++i, row += width) visit(i - span.first, row);
  }
}

// scores[h * kPiece] of N query heads against one key; query: float32 [N, head_dim], scaled.
template <int N, typename T>
WEMM_INLINE void score(const T* key, const float* query, std::int64_t head_dim, float* scores) {
  Floats sums[N] = {};
  std::int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    const Floats k = load(key + d);
    for (int h = 0; h < N; ++h) sums[h] += k * load(query + h * head_dim + d);
  }
  const float scale = scale_of(key, head_dim);
  for (int h = 0; h < N; ++h) {
    float total = sum(sums[h]);
    for (std::int64_t i = d; i < head_dim; ++i) total += to_float(key[i]) * query[h * head_dim + i];
    scores[h * kPiece] = total * scale;
  }
}

// out [N, head_dim] += weights of N query heads times one value
template <int N, typename T>
WEMM_INLINE void add_value(const T* value, const float* weights, std::int64_t head_dim, float* out) {
  const float scale = scale_of(value, head_dim);
  std::int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    const Floats v = load(value + d) * scale;
    for (int h = 0; h < N; ++h) store(load(out + h * head_dim + d) + weights[h * kPiece] * v, out + h * head_dim + d);
  }
  for (; d < head_dim; ++d) {
    for (int h = 0; h < N; ++h) out[h * head_dim + d] += weights[h * kPiece] * (to_float(value[d]) * scale);
  }
}

// Scores become weights e^(score - maximum).
WEMM_INLINE void soften(float* scores, std::int64_t count, float& maximum, float& total) {
  float highest = -INFINITY;
  for (std::int64_t i = 0; i < count; ++i) highest = scores[i] > highest ? scores[i] : highest;
  float sum_of_all = 0.0f;
#pragma omp simd reduction(+ : sum_of_all)
  for (std::int64_t i = 0; i < count; ++i) {
    const float below = scores[i] - highest;
    // What is no number must not become one.
    scores[i] = below == below ? exp_approx(below) : below;
    sum_of_all += scores[i];
  }
  maximum = highest;
  total = sum_of_all;
}

// Calls visit4(h) for whole fours of a group's query heads, visit1(h) for the others.
template <typename Four, typename One>
WEMM_INLINE void each_head(std::int64_t group, Four visit4, One visit1) {
  std::int64_t h = 0;
  for (; h + kTogether <= group; h += kTogether) visit4(h);
  for (; h < group; ++h) visit1(h);
}

// One piece, all heads.
template <typename T, typename Cache>
void attend_piece(const Cache* key_cache, const Cache* value_cache, const Heads& heads, const Piece<T>& piece,
                  std::vector<float>& scratch) {
  const std::int64_t num_kv_heads = heads.num_kv_heads, group = heads.group, head_dim = heads.head_dim;
  const std::int64_t width = width_of(key_cache, head_dim), count = piece.span.last - piece.span.first;
  scratch.resize(num_kv_heads * group * kPiece);
  const float* query = piece.wide;
  float *scores = scratch.data(), *out = piece.out;
  each_row(key_cache, heads, piece.span, [&](std::int64_t i, const Cache* keys) __attribute__((always_inline)) {
    for (std::int64_t kv = 0; kv < num_kv_heads; ++kv) {
      const Cache* key = keys + kv * width;
      each_head(
          group,
          [&](std::int64_t h) __attribute__((always_inline)) {
            score<kTogether>(key, query + (kv * group + h) * head_dim, head_dim, scores + (kv * group + h) * kPiece + i);
          },
          [&](std::int64_t h) __attribute__((always_inline)) {
            score<1>(key, query + (kv * group + h) * head_dim, head_dim, scores + (kv * group + h) * kPiece + i);
          });
    }
  });
  for (std::int64_t h = 0; h < num_kv_heads * group; ++h) {
    soften(scores + h * kPiece, count, piece.maxima[h], piece.sums[h]);
  }
  for (std::int64_t i = 0; i < num_kv_heads * group * head_dim; ++i) out[i] = 0.0f;
  each_row(value_cache, heads, piece.span, [&](std::int64_t i, const Cache* values) __attribute__((always_inline)) {
    for (std::int64_t kv = 0; kv < num_kv_heads; ++kv) {
      const Cache* value = values + kv * width;
      each_head(
          group,
          [&](std::int64_t h) __attribute__((always_inline)) {
            add_value<kTogether>(value, scores + (kv * group + h) * kPiece + i, head_dim,
                                 out + (kv * group + h) * head_dim);
          },
          [&](std::int64_t h) __attribute__((always_inline)) {
            add_value<1>(value, scores + (kv * group + h) * kPiece + i, head_dim, out + (kv * group + h) * head_dim);
          });
    }
  });
}

// One query head from its pieces, which lie `width` apart; maxima and sums lie `num_heads` apart.
template <typename T>
void join_pieces(float* pieces, const float* maxima, const float* sums, std::int64_t num_pieces, std::int64_t width,
                 std::int64_t num_heads, std::int64_t head_dim, T* out) {
  float highest = -INFINITY;
  for (std::int64_t p = 0; p < num_pieces; ++p) {
    highest = maxima[p * num_heads] > highest ? maxima[p * num_heads] : highest;
  }
  float total = 0.0f;
  for (std::int64_t p = 0; p < num_pieces; ++p) {
    const float share = std::exp(maxima[p * num_heads] - highest);
    total += sums[p * num_heads] * share;
    for (std::int64_t d = 0; d < head_dim; ++d) {
      const float before = p == 0 ? 0.0f : pieces[d];
      pieces[d] = before + pieces[p * width + d] * share;
    }
  }
  for (std::int64_t d = 0; d < head_dim; ++d) out[d] = from_float<T>(pieces[d] / total);
}

#endif
