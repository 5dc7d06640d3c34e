// linear_int8 for many tokens on AVX-512 VNNI.

#include "linear_int8.h"
#include "linear_vnni.h"

namespace wemm {

#ifdef WEMM_AVX512_VNNI
namespace {

// Outputs side by side, 128 larger. What lies behind the width is 0 before that; behind the last output, it stands in.
WEMM_AVX512_VNNI void pack_outputs(const Int8Weight& weight, std::int64_t first, std::int64_t begin, std::int64_t end,
                                   std::uint8_t* packed) {
  for (std::int64_t k = begin; k < end; k += 64) {
    const std::int64_t left = weight.width - k;
    const __mmask64 inside = left >= 64 ? ~0ull : (1ull << left) - 1;
#pragma GCC unroll 1
    for (std::int64_t v = 0; v < 3; ++v) {
      __m512i tile[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        const std::int64_t row = std::min(first + 16 * v + r, weight.outputs - 1);
        tile[r] = _mm512_maskz_loadu_epi8(inside, weight.integers + row * weight.width + k);
      }
      transpose(tile);
      std::uint8_t* const to = packed + (k - begin) * vnni::kOutputs + 64 * v;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        _mm512_store_si512(to + i * 4 * vnni::kOutputs, _mm512_xor_si512(tile[i], _mm512_set1_epi8(-128)));
      }
    }
  }
}

template <typename T>
struct Weight : Int8Weight {
  static constexpr std::int64_t kPart = 256, kAlign = 64;
  static constexpr std::int32_t kExcess = 128;
  using Sum = std::int32_t;
  struct Scales {};  // a token's are multiplied by them in the end

  Finish<T> finish_row;

  void pack(std::int64_t first, std::int64_t begin, std::int64_t end, std::uint8_t* packed, Scales*) const {
    pack_outputs(*this, first, begin, end, packed);
  }

  WEMM_AVX512_VNNI static void add_part(const std::int8_t* x, const std::uint8_t* weight, std::int64_t inputs,
                                        const std::int32_t* start, const Scales&, Sum* sums) {
    vnni::Sums products;
    vnni::multiply(x, weight, inputs, start, products);
#pragma GCC unroll 8
    for (int t = 0; t < vnni::kTokens; ++t)
#pragma GCC unroll 3
      for (int v = 0; v < 3; ++v) {
        std::int32_t* const at = sums + t * vnni::kRow + 16 * v;
        _mm512_store_si512(at, _mm512_add_epi32(products[t][v], _mm512_load_si512(at)));
      }
  }

  void finish(const Sum* sums, float x_scale, std::int64_t first, std::int64_t n, T* out) const {
    finish_row(sums, x_scale, scale + first, bias + first, n, out);
  }
};

}  // namespace

template <typename T>
void linear_int8_vnni(const T* x, std::int64_t tokens, const Int8Weight& weight, Finish<T> finish, T* out) {
  vnni::linear(Weight<T>{weight, finish}, x, tokens, out);
}

#else

template <typename T>
void linear_int8_vnni(const T*, std::int64_t, const Int8Weight&, Finish<T>, T*) {}

#endif

template void linear_int8_vnni(const float*, std::int64_t, const Int8Weight&, Finish<float>, float*);
template void linear_int8_vnni(const bfloat16*, std::int64_t, const Int8Weight&, Finish<bfloat16>, bfloat16*);
template void linear_int8_vnni(const float16*, std::int64_t, const Int8Weight&, Finish<float16>, float16*);

}  // namespace wemm
