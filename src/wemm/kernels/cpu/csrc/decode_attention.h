// What the ways to attend to a piece of a sequence share: decode_attention.cpp, decode_attention_amx.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include "types.h"

namespace wemm {

constexpr std::int64_t kPiece = 128;  // keys

struct Heads {
  std::int64_t num_kv_heads, group, head_dim, block_size;
  float scale;
};

// Keys first..last of the sequence that lies in these blocks.
struct Span {
  const std::int64_t* blocks;
  std::int64_t first, last;
};

// One span, all heads, and what becomes of them. out is not divided by the sums.
template <typename T>
struct Piece {
  Span span, next;    // next: what the same thread takes up after it, empty at the end
  const T* query;     // [num_heads, head_dim]
  const float* wide;  // the same, scaled
  float* out;         // [num_heads, head_dim]
  float* maxima;      // [num_heads]
  float* sums;        // [num_heads]
};

// Caches of Cache: T, or int8 with a scale behind each row (quantization.py: quantize_kv). scratch grows as it must.
template <typename T, typename Cache>
using AttendPiece = void (*)(const Cache* keys, const Cache* values, const Heads&, const Piece<T>&,
                             std::vector<float>& scratch);

// On matrix tiles; nullptr where these heads are none for them.
template <typename Cache>
AttendPiece<bfloat16, Cache> attend_on_tiles(const Heads& heads);

}  // namespace wemm
