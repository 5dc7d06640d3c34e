// Softmax attention of one head, as each instruction family does it, and of a whole sequence, which all share.
//
// Common to the families: keys and values of a head are packed once, a block of queries meets all of them, and the
// running maximum is raised only where a score exceeds it by far, which bfloat16's range allows; what was summed up is
// then scaled to the new one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "types.h"

namespace wemm {

constexpr int kMaxHeadDim = 256;
constexpr float kLazy = 8.0f;  // log2: how far a score may exceed the running maximum

// One position.
struct KeyValue {
  const bfloat16* key;
  const bfloat16* value;
};

// One query: where it lies, how many keys it sees (at least one, from the first on), where its result goes.
struct Query {
  const bfloat16* query;
  bfloat16* out;
  std::int64_t visible;
};

// All keys of one head. head_dim is even.
struct FlashShape {
  std::int64_t num_keys;
  int head_dim;
};

struct FlashFamily {
  int query_block;  // queries that `attend` takes at most
  int key_block;    // positions that `pack` takes at once; fewer only at the end
  // bfloat16 elements of the packed keys and values.
  std::int64_t (*packed_size)(const FlashShape&);
  // Positions first..first + count. One whose key is not finite gets a result that is not finite either.
  void (*pack)(const FlashShape&, const KeyValue* rows, std::int64_t first, int count, bfloat16* packed);
  // floats that `attend` works in.
  std::int64_t (*scratch_size)(int head_dim);
  // scale: not negative.
  void (*attend)(const FlashShape&, const bfloat16* packed, const Query* queries, int num_queries, float scale,
                 float* scratch);
};

extern const FlashFamily kFlashAvx512;  // flash_attention_avx512.cpp, needs BF16
extern const FlashFamily kFlashAmx;     // flash_attention_amx.cpp, needs VBMI

// The best that may run. Raises std::invalid_argument where none may.
const FlashFamily& flash_family();

inline int num_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

inline std::int64_t blocks_of(std::int64_t count, std::int64_t block) { return (count + block - 1) / block; }

// Every head of one sequence, each with `num_queries` queries. position(h, i) → KeyValue, query(h, i) → Query.
template <typename Position, typename QueryAt>
void flash_attention(const FlashShape& shape, std::int64_t num_heads, std::int64_t num_queries, float scale,
                     Position position, QueryAt query) {
  if (num_heads == 0 || num_queries == 0) return;
  const FlashFamily& family = flash_family();
  const std::int64_t size = family.packed_size(shape);
  const std::int64_t packs = blocks_of(shape.num_keys, family.key_block);
  const std::int64_t jobs = blocks_of(num_queries, family.query_block);
  // As few heads at a time as keep all threads busy: what is packed stays small, and in the cache.
  const std::int64_t together = std::min(num_heads, blocks_of(std::int64_t{8} * num_threads(), jobs));
  const std::unique_ptr<bfloat16[]> packed(new bfloat16[together * size]);
#pragma omp parallel
  {
    std::vector<float> scratch(family.scratch_size(shape.head_dim));
    std::vector<KeyValue> rows(family.key_block);
    std::vector<Query> queries(family.query_block);
    for (std::int64_t head = 0; head < num_heads; head += together) {
      const std::int64_t heads = std::min(together, num_heads - head);
#pragma omp for schedule(static)
      for (std::int64_t job = 0; job < heads * packs; ++job) {
        const std::int64_t h = job / packs, first = job % packs * family.key_block;
        const int count = static_cast<int>(std::min<std::int64_t>(family.key_block, shape.num_keys - first));
        for (int i = 0; i < count; ++i) rows[i] = position(head + h, first + i);
        family.pack(shape, rows.data(), first, count, packed.get() + h * size);
      }
      // Last queries first: where they are causal, those see most keys.
#pragma omp for schedule(dynamic)
      for (std::int64_t job = heads * jobs - 1; job >= 0; --job) {
        const std::int64_t h = job % heads, first = job / heads * family.query_block;
        const int count = static_cast<int>(std::min<std::int64_t>(family.query_block, num_queries - first));
        for (int i = 0; i < count; ++i) queries[i] = query(head + h, first + i);
        family.attend(shape, packed.get() + h * size, queries.data(), count, scale, scratch.data());
      }
    }
  }
}

}  // namespace wemm
