// Arithmetic in vectors. No include guard: foreach_isa.h compiles this once per instruction set.

// As many numbers as a register holds. Where it holds fewer still, the compiler takes two.
#ifdef WEMM_ISA_AVX512
constexpr int kLanes = 16;
constexpr bool kManyRegisters = true;
#else
constexpr int kLanes = 8;
constexpr bool kManyRegisters = false;
#endif
typedef float Floats __attribute__((vector_size(sizeof(float) * kLanes)));

WEMM_INLINE Floats load(const float* x) {
  Floats value;
  std::memcpy(&value, x, sizeof value);
  return value;
}

WEMM_INLINE Floats load(const bfloat16* x) {
#ifdef WEMM_ISA_AVX512
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  return (Floats)_mm512_slli_epi32(words, 16);
#else
  typedef std::uint16_t Halves __attribute__((vector_size(sizeof(std::uint16_t) * kLanes)));
  typedef std::uint32_t Words __attribute__((vector_size(sizeof(float) * kLanes)));
  Halves halves;
  std::memcpy(&halves, x, sizeof halves);
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
#endif
}

WEMM_INLINE void store(const Floats& value, float* x) { std::memcpy(x, &value, sizeof value); }

// In pairs, not one after another: fewer steps.
WEMM_INLINE float sum(const Floats& x) {
#ifdef WEMM_ISA_AVX512
  return _mm512_reduce_add_ps((__m512)x);
#else
  float parts[kLanes];
  store(x, parts);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  }
  return parts[0];
#endif
}

// e^x, relative error 2e-7; nearly 0 below -87, infinity from 88.4 on. NaN gives some number: the callers' own
// arithmetic keeps it.
WEMM_INLINE float exp_approx(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  std::int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const std::uint32_t power = static_cast<std::uint32_t>(bits + (127 - 0x4B400000)) << 23;
  float scale;
  std::memcpy(&scale, &power, sizeof scale);
  return y * scale;
}
