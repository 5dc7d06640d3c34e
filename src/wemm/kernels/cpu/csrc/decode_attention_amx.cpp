// Decode attention on matrix tiles: keys and values are multiplied as they lie, 16 positions at a time.
//
// scores[16 keys, group] = keys[16 keys, 32 elements] query[16 pairs of elements, group, 2]. A tile of values takes the
// other side: what it has side by side are pairs of elements, not of keys, so that each weight has two rows, one that
// meets the first elements of the pairs and one that meets the second.
//
// There is so little to compute that memory is all that counts: between products, the next 32 positions are fetched in
// the order in which they lie, a little at a time. Two runs of 16 share what is loaded beside them.

#include "amx.h"
#include "decode_attention.h"

#if defined(WEMM_AMX)

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <type_traits>

namespace wemm {
namespace {

constexpr int kRun = 16;   // positions of a tile
constexpr int kStep = 32;  // elements of a tile
constexpr int kRuns = kPiece / kRun;
constexpr int kMaxGroup = 8;
constexpr int kLine = 64;

struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes_per_row[16] = {};
  std::uint8_t rows[16] = {};

  explicit TileShapes(int group) {
    for (const int scores : {0, 1}) set(scores, kRun, 4 * group);
    for (const int keys_or_values : {2, 3}) set(keys_or_values, kRun, 64);
    for (const int weights : {4, 5}) set(weights, 2 * group, 64);
    set(6, kStep / 2, 4 * group);  // query
    set(7, 2 * group, 64);         // sums
  }

 private:
  void set(int tile, int num_rows, int bytes) {
    rows[tile] = static_cast<std::uint8_t>(num_rows);
    bytes_per_row[tile] = static_cast<std::uint16_t>(bytes);
  }
};

// amx.h, in shapes of our own.
class ShapedTiles {
 public:
  WEMM_AMX explicit ShapedTiles(const TileShapes& shapes) {
    settle();  // the intrinsic does not say that it reads them
    _tile_loadconfig(&shapes);
  }
  WEMM_AMX ~ShapedTiles() { _tile_release(); }
  ShapedTiles(const ShapedTiles&) = delete;
  ShapedTiles& operator=(const ShapedTiles&) = delete;
  // Tiles are read and written behind the compiler's back.
  static WEMM_INLINE void settle() { std::atomic_signal_fence(std::memory_order_seq_cst); }
};

template <typename Cache>
constexpr std::int64_t width_of(std::int64_t head_dim) {
  return head_dim + (std::is_same_v<Cache, std::int8_t> ? static_cast<std::int64_t>(sizeof(float)) : 0);
}

// Where the keys, or values, of a span lie, 16 positions after 16.
template <typename Cache>
struct Runs {
  const Cache* begin[kRuns + 2];  // behind them, what is read next
  std::int64_t count, size;

  Runs(const Cache* cache, const Heads& heads, const Span& span)
      : count((span.last - span.first + 2 * kRun - 1) / (2 * kRun) * 2),
        size(kRun * heads.num_kv_heads * width_of<Cache>(heads.head_dim)) {
    for (std::int64_t r = 0; r < count; ++r) {
      // Where a run is missing, the last one again: its weights will be 0.
      const std::int64_t position = std::min(span.first + r * kRun, (span.last - 1) / kRun * kRun);
      const std::int64_t block = span.blocks[position / heads.block_size];
      begin[r] = cache + (block * heads.block_size + position % heads.block_size) / kRun * size;
    }
  }

  // Says what is read behind them.
  void precede(const Runs& next) {
    for (int i = 0; i < 2; ++i) begin[count + i] = next.begin[i];
  }

  // What lies behind the end of a sequence may be NaN: the last run becomes a copy with zeros there.
  void fill_up(std::int64_t positions, Cache* copy) {
    const std::int64_t last = (positions - 1) / kRun, length = (positions - last * kRun) * (size / kRun);
    if (length == size) return;
    std::copy_n(begin[last], length, copy);
    std::fill(copy + length, copy + size, Cache{});
    std::fill(begin + last, begin + count, copy);
  }
};

struct Scratch {
  float* scores;           // [kPiece, group], of one KV head after another
  std::uint32_t* query;    // of each KV head [head_dim / 2, group]: pairs of elements
  float* weights;          // [num_heads, kPiece]
  std::uint32_t* pairs;    // [2, 2 * group, 16]: weights next to 0, and 0 next to weights
  float* sums;             // of each KV head [head_dim / 32, 2 * group, 16]
  float* scales;           // [num_kv_heads, kPiece], of keys
  bfloat16* wide;          // [2 * 16, head_dim]
  char* last_keys;
  char* last_values;

  Scratch(const Heads& h, std::int64_t run_bytes, std::vector<float>& memory) {
    const std::int64_t num_heads = h.num_kv_heads * h.group;
    const auto divide = [&](std::uintptr_t at) {  // returns the end
      const auto take = [&at](auto*& part, std::int64_t count) {
        part = reinterpret_cast<std::decay_t<decltype(part)>>(at);
        at += (count * sizeof *part + kLine - 1) / kLine * kLine;
      };
      take(scores, num_heads * kPiece);
      take(query, num_heads * h.head_dim / 2);
      take(weights, num_heads * kPiece);
      take(pairs, 4 * h.group * kRun);
      take(sums, num_heads * h.head_dim);
      take(scales, h.num_kv_heads * kPiece);
      take(wide, 2 * kRun * h.head_dim);
      take(last_keys, run_bytes);
      take(last_values, run_bytes);
      return at;
    };
    memory.resize((divide(0) + kLine) / sizeof(float));
    divide((reinterpret_cast<std::uintptr_t>(memory.data()) + kLine - 1) / kLine * kLine);
  }
};

// Fetches two runs, a few bytes of each at a time.
class Ahead {
 public:
  template <typename Cache>
  Ahead(const Runs<Cache>& runs, std::int64_t r)
      : first_(reinterpret_cast<const char*>(runs.begin[r])),
        second_(reinterpret_cast<const char*>(runs.begin[r + 1])) {}

  // Half of `bytes` of each.
  WEMM_INLINE void fetch(std::int64_t bytes) {
    for (end_ += bytes / 2; at_ < end_; at_ += kLine) {  // GCC would drop a loop of nothing but __builtin_prefetch
      asm volatile("prefetcht1 %0" : : "m"(first_[at_]));
      asm volatile("prefetcht1 %0" : : "m"(second_[at_]));
    }
  }

 private:
  const char* first_;
  const char* second_;
  std::int64_t at_ = 0, end_ = 0;
};

// Sixteen positions of one head as bfloat16: where they lie, and how far apart.
struct Rows {
  const bfloat16* begin;
  std::int64_t bytes_apart;
};

WEMM_AMX WEMM_INLINE Rows rows_of(const bfloat16* head, const Heads& heads, bfloat16*, float*, Ahead&) {
  return {head, static_cast<std::int64_t>(sizeof(bfloat16)) * heads.num_kv_heads * heads.head_dim};
}

// Integers become bfloat16 exactly; their scales are put aside.
WEMM_AMX Rows rows_of(const std::int8_t* head, const Heads& heads, bfloat16* wide, float* scales,
                      Ahead& ahead) {
  const std::int64_t head_dim = heads.head_dim, width = width_of<std::int8_t>(head_dim);
  for (int i = 0; i < kRun; ++i, head += heads.num_kv_heads * width) {
    ahead.fetch(width);
    for (std::int64_t d = 0; d < head_dim; d += kStep) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(head + d));
      const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
      const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
      _mm512_store_si512(wide + i * head_dim + d, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    std::memcpy(scales + i, head + head_dim, sizeof(float));
  }
  return {wide, static_cast<std::int64_t>(sizeof(bfloat16)) * head_dim};
}

// 2^x, relative error 7.5e-5: far below the bfloat16 that it becomes.
WEMM_AMX WEMM_INLINE __m512 exp2(__m512 x) {
  const __m512 fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 y = _mm512_fmadd_ps(fraction, _mm512_set1_ps(0.07802451f), _mm512_set1_ps(0.2260672f));
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(0.6958335f));
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(0.99992526f));
  return _mm512_scalef_ps(y, x);
}

// Scores [count, group] of query head h become weights, 0 behind them. scales: of the keys, or nullptr.
WEMM_AMX void soften(const float* scores, const Heads& heads, std::int64_t h, std::int64_t count, const float* scales,
                     float* weights, float& maximum, float& total) {
  const int group = static_cast<int>(heads.group);
  const __m512i places = _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(group));
  const __m512 factor = _mm512_set1_ps(heads.scale * 1.44269504f);
  __m512 score[kRuns], highest = _mm512_set1_ps(-INFINITY);
  const std::int64_t runs = (count + 2 * kRun - 1) / (2 * kRun) * 2;
  for (std::int64_t r = 0; r < runs; ++r) {
    const std::int64_t left = count - r * kRun;
    const __mmask16 there = left >= kRun ? 0xFFFF : left <= 0 ? 0 : (1 << left) - 1;
    __m512 given = _mm512_mul_ps(_mm512_i32gather_ps(places, scores + r * kRun * group + h, 4), factor);
    if (scales != nullptr) given = _mm512_mul_ps(given, _mm512_load_ps(scales + r * kRun));
    score[r] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), there, given);
    highest = _mm512_max_ps(highest, score[r]);
  }
  const float top = _mm512_reduce_max_ps(highest);
  __m512 sum = _mm512_setzero_ps();
  for (std::int64_t r = 0; r < runs; ++r) {
    const __m512 weight = exp2(_mm512_sub_ps(score[r], _mm512_set1_ps(top)));
    sum = _mm512_add_ps(sum, weight);
    _mm512_store_ps(weights + r * kRun, weight);
  }
  maximum = top * 0.693147181f;
  total = _mm512_reduce_add_ps(sum);
}

// Sixteen weights of a query head as its two rows of a tile.
WEMM_AMX WEMM_INLINE void pair_weights(__m512 weights, std::uint32_t* pairs) {
  const __m512i even = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(weights));
  _mm512_store_si512(pairs, even);
  _mm512_store_si512(pairs + kRun, _mm512_slli_epi32(even, 16));
}

// Rows of even and of odd elements become one.
WEMM_AMX WEMM_INLINE void interleave(const float* sums, float* out) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512 even = _mm512_load_ps(sums), odd = _mm512_load_ps(sums + 16);
  _mm512_storeu_ps(out, _mm512_permutex2var_ps(even, low, odd));
  _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd));
}

void pair_elements(const bfloat16* query, std::int64_t group, std::int64_t head_dim, std::uint32_t* pairs) {
  for (std::int64_t h = 0; h < group; ++h) {
    for (std::int64_t j = 0; j < head_dim / 2; ++j) {
      std::memcpy(pairs + j * group + h, query + h * head_dim + 2 * j, sizeof *pairs);
    }
  }
}

template <typename Cache>
WEMM_AMX void attend_piece(const Cache* key_cache, const Cache* value_cache, const Heads& heads,
                           const Piece<bfloat16>& piece, std::vector<float>& memory) {
  const std::int64_t num_kv_heads = heads.num_kv_heads, group = heads.group, head_dim = heads.head_dim;
  const std::int64_t count = piece.span.last - piece.span.first, steps = head_dim / kStep;
  const std::int64_t width = width_of<Cache>(head_dim);
  constexpr bool kScaled = std::is_same_v<Cache, std::int8_t>;
  Runs<Cache> keys(key_cache, heads, piece.span), values(value_cache, heads, piece.span);
  const Runs<Cache> next(key_cache, heads, piece.next.last > 0 ? piece.next : piece.span);
  const std::int64_t runs = keys.count;
  keys.precede(values);
  values.precede(next);
  const Scratch s(heads, keys.size * static_cast<std::int64_t>(sizeof(Cache)), memory);
  keys.fill_up(count, reinterpret_cast<Cache*>(s.last_keys));
  const TileShapes shapes(static_cast<int>(group));
  const ShapedTiles tiles(shapes);
  const std::int64_t group_bytes = 4 * group;

  for (std::int64_t kv = 0; kv < num_kv_heads; ++kv) {
    pair_elements(piece.query + kv * group * head_dim, group, head_dim, s.query + kv * group * head_dim / 2);
  }
  for (std::int64_t r = 0; r < runs; r += 2) {
    Ahead ahead(keys, r + 2);
    for (std::int64_t kv = 0; kv < num_kv_heads; ++kv) {
      const Rows first = rows_of(keys.begin[r] + kv * width, heads, s.wide, s.scales + kv * kPiece + r * kRun, ahead);
      const Rows second = rows_of(keys.begin[r + 1] + kv * width, heads, s.wide + kRun * head_dim,
                                  s.scales + kv * kPiece + (r + 1) * kRun, ahead);
      ShapedTiles::settle();
      _tile_zero(0);
      _tile_zero(1);
      for (std::int64_t step = 0; step < steps; ++step) {
        if (!kScaled) ahead.fetch(2 * kRun * 64);
        _tile_loadd(6, s.query + (kv * head_dim + step * kStep) * group / 2, group_bytes);
        _tile_loadd(2, first.begin + step * kStep, first.bytes_apart);
        _tile_dpbf16ps(0, 2, 6);
        _tile_loadd(3, second.begin + step * kStep, second.bytes_apart);
        _tile_dpbf16ps(1, 3, 6);
      }
      float* scores = s.scores + (kv * kPiece + r * kRun) * group;
      _tile_stored(0, scores, group_bytes);
      _tile_stored(1, scores + kRun * group, group_bytes);
      ShapedTiles::settle();
    }
  }
  values.fill_up(count, reinterpret_cast<Cache*>(s.last_values));
  for (std::int64_t h = 0; h < num_kv_heads * group; ++h) {
    const std::int64_t kv = h / group;
    soften(s.scores + kv * kPiece * group, heads, h % group, count, kScaled ? s.scales + kv * kPiece : nullptr,
           s.weights + h * kPiece, piece.maxima[h], piece.sums[h]);
  }
  std::fill_n(s.sums, num_kv_heads * group * head_dim, 0.0f);
  for (std::int64_t r = 0; r < runs; r += 2) {
    Ahead ahead(values, r + 2);
    for (std::int64_t kv = 0; kv < num_kv_heads; ++kv) {
      alignas(64) float scales[2 * kRun];
      const Rows first = rows_of(values.begin[r] + kv * width, heads, s.wide, scales, ahead);
      const Rows second =
          rows_of(values.begin[r + 1] + kv * width, heads, s.wide + kRun * head_dim, scales + kRun, ahead);
      for (std::int64_t half = 0; half < 2; ++half) {
        for (std::int64_t h = 0; h < group; ++h) {
          __m512 weights = _mm512_load_ps(s.weights + (kv * group + h) * kPiece + (r + half) * kRun);
          if (kScaled) weights = _mm512_mul_ps(weights, _mm512_load_ps(scales + half * kRun));
          pair_weights(weights, s.pairs + (half * group + h) * 2 * kRun);
        }
      }
      ShapedTiles::settle();
      _tile_loadd(4, s.pairs, 64);
      _tile_loadd(5, s.pairs + 2 * group * kRun, 64);
      float* sums = s.sums + kv * group * head_dim;
      for (std::int64_t step = 0; step < steps; ++step, sums += 2 * group * 16) {
        if (!kScaled) ahead.fetch(2 * kRun * 64);
        _tile_loadd(7, sums, 64);
        _tile_loadd(2, first.begin + step * kStep, first.bytes_apart);
        _tile_dpbf16ps(7, 4, 2);
        _tile_loadd(3, second.begin + step * kStep, second.bytes_apart);
        _tile_dpbf16ps(7, 5, 3);
        _tile_stored(7, sums, 64);
      }
      ShapedTiles::settle();
    }
  }
  for (std::int64_t h = 0; h < num_kv_heads * group; ++h) {
    const float* sums = s.sums + h / group * group * head_dim + 2 * (h % group) * 16;
    for (std::int64_t step = 0; step < steps; ++step) {
      interleave(sums + step * 2 * group * 16, piece.out + h * head_dim + step * kStep);
    }
  }
}

}  // namespace

template <typename Cache>
AttendPiece<bfloat16, Cache> attend_on_tiles(const Heads& heads) {
  const bool fits = heads.block_size % kRun == 0 && heads.group <= kMaxGroup && heads.head_dim % kStep == 0;
  return isa() == Isa::amx && fits ? &attend_piece<Cache> : nullptr;
}

template AttendPiece<bfloat16, bfloat16> attend_on_tiles(const Heads&);
template AttendPiece<bfloat16, std::int8_t> attend_on_tiles(const Heads&);

}  // namespace wemm

#endif
