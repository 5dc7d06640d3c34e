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
typedef std::uint32_t Words __attribute__((vector_size(sizeof(float) * kLanes)));
typedef std::uint16_t Halves __attribute__((vector_size(sizeof(std::uint16_t) * kLanes)));

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
  Halves halves;
  std::memcpy(&halves, x, sizeof halves);
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
#endif
}

WEMM_INLINE Floats load(const float16* x) {
#if defined(WEMM_ISA_AVX512)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif defined(WEMM_ISA_AVX2)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#else
  // to_float in vectors
  Halves halves;
  std::memcpy(&halves, x, sizeof halves);
  const Words wide = __builtin_convertvector(halves, Words);
  const Words magnitude = (wide & 0x7FFF) << 13;
  const Words normal = magnitude + (112u << 23), not_finite = magnitude + (224u << 23);
  const Words subnormal = (Words)((Floats)(magnitude + (113u << 23)) - 6.103515625e-5f);
  const Words finite = magnitude < (1u << 23) ? subnormal : normal;
  return (Floats)((magnitude < (31u << 23) ? finite : not_finite) | (wide & 0x8000) << 16);
#endif
}

WEMM_INLINE Floats load(const std::int8_t* x) {
#ifdef WEMM_ISA_AVX512
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
#else
  typedef std::int8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes bytes;
  std::memcpy(&bytes, x, sizeof bytes);
  return __builtin_convertvector(bytes, Floats);
#endif
}

WEMM_INLINE void store(const Floats& value, float* x) { std::memcpy(x, &value, sizeof value); }

WEMM_INLINE void store(const Floats& value, bfloat16* x) {
  const Words bits = (Words)value;
  const Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const Halves halves = __builtin_convertvector((Words)(value != value ? 0x7FC0 : rounded), Halves);
  std::memcpy(x, &halves, sizeof halves);
}

WEMM_INLINE void store(const Floats& value, float16* x) {
#if defined(WEMM_ISA_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(WEMM_ISA_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = from_float<float16>(value[i]);
#endif
}

// The first `count` elements where a row ends: zeros behind them, and nothing is read or written there.
template <typename T>
WEMM_INLINE Floats load(const T* x, std::int64_t count) {
  if (count >= kLanes) return load(x);
  T some[kLanes] = {};
  std::memcpy(some, x, sizeof(T) * count);
  return load(some);
}

template <typename T>
WEMM_INLINE void store(const Floats& value, T* x, std::int64_t count) {
  if (count >= kLanes) return store(value, x);
  T some[kLanes];
  store(value, some);
  std::memcpy(x, some, sizeof(T) * count);
}

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
// arithmetic keeps it. For one number and for a vector of them.
template <typename Float, typename Bits>
WEMM_INLINE Float exp_approx(Float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Float shifted = x * 1.44269504f + magic;
  const Float n = shifted - magic;
  const Float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Float y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  Bits power;
  std::memcpy(&power, &shifted, sizeof power);
  power = (power + (127u - 0x4B400000u)) << 23;
  Float scale;
  std::memcpy(&scale, &power, sizeof scale);
  return y * scale;
}

WEMM_INLINE float exp_approx(float x) { return exp_approx<float, std::uint32_t>(x); }

WEMM_INLINE Floats exp_approx(const Floats& x) { return exp_approx<Floats, Words>(x); }

// The tanh form: x / (1 + e^-2u), u = sqrt(2 / pi) * (x + 0.044715 x^3). NaN stays NaN.
WEMM_INLINE Floats gelu(const Floats& x) {
  return x / (1.0f + exp_approx(x * (-1.59576912f - 0.0713548163f * x * x)));
}
