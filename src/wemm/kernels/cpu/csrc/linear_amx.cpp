// linear for a few tokens in bfloat16 on matrix tiles.

#include <algorithm>

#include "linear.h"
#include "linear_amx.h"

namespace wemm {

#ifdef WEMM_AMX

namespace {

WEMM_AMX void finish_row(const float* sums, const bfloat16* bias, std::int64_t n, bfloat16* out) {
  for (std::int64_t i = 0; i < n; i += 16) {
    const __mmask16 some = n - i < 16 ? static_cast<__mmask16>((1u << (n - i)) - 1) : 0xFFFF;
    __m512 values = _mm512_loadu_ps(sums + i);
    if (bias != nullptr) {
      const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, bias + i));
      values = _mm512_add_ps(values, _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)));
    }
    store_some(values, some, out + i);
  }
}

}  // namespace

void linear_amx(const bfloat16* x, std::int64_t tokens, const bfloat16* weight, const bfloat16* bias,
                std::int64_t outputs, std::int64_t width, bfloat16* out) {
  few::linear(x, tokens, width, weight, outputs, width,
              [&](const float* sums, std::int64_t token, std::int64_t first, std::int64_t n) {
                finish_row(sums, bias == nullptr ? nullptr : bias + first, n, out + token * outputs + first);
              });
}

#else

void linear_amx(const bfloat16*, std::int64_t, const bfloat16*, const bfloat16*, std::int64_t, std::int64_t,
                bfloat16*) {}

#endif

}  // namespace wemm
