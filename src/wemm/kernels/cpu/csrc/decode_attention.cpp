// ops/decode_attention.py: one query per sequence over the paged cache.
//
// A job is a piece of one sequence, all heads of it: keys and values are read in the order in which they lie, once for
// all the query heads that share them. Pieces are put together by their maxima and sums.

#ifndef WEMM_COMPILING_FOR_ISA

#include <algorithm>
#include <cstdint>
#include <vector>

namespace wemm {

constexpr std::int64_t kPiece = 64;  // keys
constexpr int kTogether = 4;         // query heads that share a pass over a key

struct Heads {
  std::int64_t num_kv_heads, group, head_dim, block_size;
};

}  // namespace wemm

#define WEMM_THIS_FILE "decode_attention.cpp"
#include "foreach_isa.h"
#include "kernels.h"

namespace wemm {
namespace {

struct Job {
  std::int64_t seq, first, last;
};

template <typename T>
void decode(const Tensor& query, const Tensor& key, const Tensor& value,
            const std::vector<std::vector<std::int64_t>>& tables, const std::vector<std::int64_t>& seq_lens, float scale,
            const Tensor& out) {
  const std::int64_t num_heads = query.shape[1], head_dim = query.shape[2], num_kv_heads = key.shape[2];
  const Heads heads{num_kv_heads, num_heads / num_kv_heads, head_dim, key.shape[1]};
  const std::int64_t width = num_heads * head_dim;
  std::vector<Job> jobs;
  std::vector<std::int64_t> first_job;  // per sequence
  for (std::size_t s = 0; s < tables.size(); ++s) {
    first_job.push_back(static_cast<std::int64_t>(jobs.size()));
    for (std::int64_t at = 0; at < seq_lens[s]; at += kPiece) {
      jobs.push_back({static_cast<std::int64_t>(s), at, std::min(at + kPiece, seq_lens[s])});
    }
  }
  first_job.push_back(static_cast<std::int64_t>(jobs.size()));
  const std::int64_t num_jobs = first_job.back(), num_rows = static_cast<std::int64_t>(tables.size()) * num_heads;
  std::vector<float> wide(num_rows * head_dim), pieces(num_jobs * width);
  std::vector<float> maxima(num_jobs * num_heads), sums(num_jobs * num_heads);
  for (std::size_t i = 0; i < wide.size(); ++i) wide[i] = to_float(query.data<T>()[i]) * scale;
  const auto attend = WEMM_BEST(attend_piece<T>);
  const auto join = WEMM_BEST(join_pieces<T>);

#pragma omp parallel
  {
    std::vector<float> scores(num_heads * kPiece);
#pragma omp for schedule(dynamic)
    for (std::int64_t j = 0; j < num_jobs; ++j) {
      const Job& job = jobs[j];
      attend(key.data<T>(), value.data<T>(), tables[job.seq].data(), heads, job.first, job.last,
             wide.data() + job.seq * width, scores.data(), pieces.data() + j * width, maxima.data() + j * num_heads, sums.data() + j * num_heads);
    }
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < num_rows; ++row) {
      const std::int64_t seq = row / num_heads, head = row % num_heads, first = first_job[seq];
      join(pieces.data() + first * width + head * head_dim, maxima.data() + first * num_heads + head,
           sums.data() + first * num_heads + head, first_job[seq + 1] - first, width, num_heads, head_dim,
           out.data<T>() + row * head_dim);
    }
  }
}

}  // namespace

void decode_attention(const TensorArgument& query_argument, const TensorArgument& key_argument,
                      const TensorArgument& value_argument, const std::vector<std::vector<std::int64_t>>& tables,
                      const std::vector<std::int64_t>& seq_lens, float scale, const TensorArgument& out_argument) {
  const Tensor query(query_argument), key(key_argument), value(value_argument), out(out_argument);
  Contract contract("decode_attention");
  contract.expect("query", query, {"num_seqs", "num_heads", "head_dim"})
      .expect("key_cache", key, {"num_blocks", "block_size", "num_kv_heads", "head_dim"})
      .expect("value_cache", value, {"num_blocks", "block_size", "num_kv_heads", "head_dim"})
      .expect("out", out, {"num_seqs", "num_heads", "head_dim"})
      .same_dtype({&query, &key, &value, &out});
  contract.require(contract["num_kv_heads"] > 0 && contract["num_heads"] % contract["num_kv_heads"] == 0,
                   "needs query heads in whole groups");
  contract.require_blocks(tables, seq_lens, contract["num_seqs"], contract["block_size"], contract["num_blocks"]);
  for (const std::int64_t length : seq_lens) contract.require(length > 0, "needs a token in every sequence");
  with_dtype(query.dtype, [&](auto element) {
    decode<decltype(element)>(query, key, value, tables, seq_lens, scale, out);
  });
}

}  // namespace wemm

#else

// Calls visit(i, row) with the keys, or values, of all KV heads at positions first..last.
template <typename T, typename Visit>
WEMM_INLINE void each_row(const T* cache, const std::int64_t* blocks, const Heads& heads, std::int64_t first,
                          std::int64_t last, Visit visit) {
  const std::int64_t width = heads.num_kv_heads * heads.head_dim;
  std::int64_t block = first / heads.block_size, offset = first % heads.block_size;
  for (std::int64_t i = first; i < last; ++block, offset = 0) {
    const T* row = cache + (blocks[block] * heads.block_size + offset) * width;
    for (; offset < heads.block_size && i < last; ++offset, ++i, row += width) visit(i - first, row);
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
  for (int h = 0; h < N; ++h) {
    float total = sum(sums[h]);
    for (std::int64_t i = d; i < head_dim; ++i) total += to_float(key[i]) * query[h * head_dim + i];
    scores[h * kPiece] = total;
  }
}

// out [N, head_dim] += weights of N query heads times one value
template <int N, typename T>
WEMM_INLINE void add_value(const T* value, const float* weights, std::int64_t head_dim, float* out) {
  std::int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    const Floats v = load(value + d);
    for (int h = 0; h < N; ++h) store(load(out + h * head_dim + d) + weights[h * kPiece] * v, out + h * head_dim + d);
  }
  for (; d < head_dim; ++d) {
    for (int h = 0; h < N; ++h) out[h * head_dim + d] += weights[h * kPiece] * to_float(value[d]);
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

// One piece, all heads. query, out: float32 [num_heads, head_dim]; out is not divided by the sums.
template <typename T>
void attend_piece(const T* key_cache, const T* value_cache, const std::int64_t* blocks, const Heads& heads,
                  std::int64_t first, std::int64_t last, const float* query, float* scores, float* out, float* maxima,
                  float* sums) {
  const std::int64_t num_kv_heads = heads.num_kv_heads, group = heads.group, head_dim = heads.head_dim;
  each_row(key_cache, blocks, heads, first, last, [&](std::int64_t i, const T* keys) __attribute__((always_inline)) {
    for (std::int64_t kv = 0; kv < num_kv_heads; ++kv) {
      const T* key = keys + kv * head_dim;
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
  for (std::int64_t h = 0; h < num_kv_heads * group; ++h) soften(scores + h * kPiece, last - first, maxima[h], sums[h]);
  for (std::int64_t i = 0; i < num_kv_heads * group * head_dim; ++i) out[i] = 0.0f;
  each_row(value_cache, blocks, heads, first, last,
           [&](std::int64_t i, const T* values) __attribute__((always_inline)) {
             for (std::int64_t kv = 0; kv < num_kv_heads; ++kv) {
               const T* value = values + kv * head_dim;
               each_head(
                   group,
                   [&](std::int64_t h) __attribute__((always_inline)) {
                     add_value<kTogether>(value, scores + (kv * group + h) * kPiece + i, head_dim,
                                          out + (kv * group + h) * head_dim);
                   },
                   [&](std::int64_t h) __attribute__((always_inline)) {
                     add_value<1>(value, scores + (kv * group + h) * kPiece + i, head_dim,
                                  out + (kv * group + h) * head_dim);
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
