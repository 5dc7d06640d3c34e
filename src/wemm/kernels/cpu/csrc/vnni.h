// AVX-512 VNNI: four products of an unsigned and a signed byte are added to each int32.
#pragma once

#include "isa.h"
#include "types.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

// One instruction set, written in its own words: not a case for foreach_isa.h.
#define WEMM_AVX512_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

namespace wemm {

// The intrinsic makes g++ 12 move accumulators to memory and back.
WEMM_AVX512_VNNI WEMM_INLINE void add_products(__m512i& sums, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// In each of four steps, squares of 8, 4, 2 and 1 numbers change places across the diagonal.
WEMM_AVX512_VNNI WEMM_INLINE void transpose(__m512i (&rows)[16]) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
  for (int side = 8; side > 0; side /= 2) {
    const __m512i other = _mm512_xor_si512(lane, _mm512_set1_epi32(side)), second = _mm512_set1_epi32(16);
    const __mmask16 right = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(side));
    const __m512i upper = _mm512_mask_add_epi32(lane, right, other, second);
    const __m512i lower = _mm512_mask_add_epi32(other, right, lane, second);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i & side) continue;
      const __m512i a = rows[i], b = rows[i + side];
      rows[i] = _mm512_permutex2var_epi32(a, upper, b);
      rows[i + side] = _mm512_permutex2var_epi32(a, lower, b);
    }
  }
}

// The numbers that `some` names.
WEMM_AVX512_VNNI WEMM_INLINE void store_some(__m512 values, __mmask16 some, float* out) {
  _mm512_mask_storeu_ps(out, some, values);
}

// Round to nearest even; NaN stays NaN.
WEMM_AVX512_VNNI WEMM_INLINE void store_some(__m512 values, __mmask16 some, bfloat16* out) {
  const __m512i bits = (__m512i)values, odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i words = _mm512_mask_blend_epi32(nan, _mm512_srli_epi32(rounded, 16), _mm512_set1_epi32(0x7FC0));
  _mm256_mask_storeu_epi16(out, some, _mm512_cvtepi32_epi16(words));
}

WEMM_AVX512_VNNI WEMM_INLINE void store_some(__m512 values, __mmask16 some, float16* out) {
  _mm256_mask_storeu_epi16(out, some, _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace wemm

#endif
