// Softmax attention of one head, 64 queries at a time, on AVX-512 with BF16.
//
// Queries lie across the vector lanes, keys and values are broadcast: maxima and sums are per lane, a
// head_dim of 72 wastes nothing, and keys are used in the order they lie. Scores never leave the registers in
// float32: they become bfloat16 weights at once. The running maximum is raised only where a score exceeds it by
// far, which bfloat16's range allows; what was summed up is then scaled to the new one.
#pragma once

#include <cstdint>
#include <vector>

#include "types.h"

namespace wemm {

constexpr int kQueryBlock = 64;
constexpr int kMaxHeadDim = 256;

// Keys and values of one head, packed by `pack`.
struct PackedHead {
  const bfloat16* keys;      // [num_keys, head_dim]
  const bfloat16* values_t;  // [head_dim, padded], zeros behind num_keys
  std::int64_t num_keys;
  std::int64_t padded;  // even
  int head_dim;         // even
};

// One query: where it lies, how many keys it sees (at least one, from the first on), where its result goes.
struct Query {
  const bfloat16* query;
  bfloat16* out;
  std::int64_t visible;
};

// Room for the working set of one thread.
std::vector<float> flash_scratch(int head_dim);

// At most 64 queries.
void flash_attention(const PackedHead& head, const Query* queries, int num_queries, float scale, float* scratch);

// Copies one key row, and one value row into the transposed array.
inline void pack_row(const bfloat16* key, const bfloat16* value, std::int64_t position, std::int64_t padded,
                     int head_dim, bfloat16* keys, bfloat16* values_t) {
  std::memcpy(keys + position * head_dim, key, sizeof(bfloat16) * head_dim);
  for (int d = 0; d < head_dim; ++d) values_t[d * padded + position] = value[d];
}

}  // namespace wemm
