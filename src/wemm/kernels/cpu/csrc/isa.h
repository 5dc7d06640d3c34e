// Which instruction set runs: kernels are compiled for several (foreach_isa.h), and choose at each call.
#pragma once

namespace wemm {

// amx: AVX-512 and matrix tiles of bfloat16 and int8 (amx.h).
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, amx = 3 };

// The best that this machine has, or less if `limit_isa` said so.
Isa isa();

// For tests: no better than this from now on.
void limit_isa(int isa);

// AVX-512 with products of pairs of bfloat16; of four int8.
bool has_avx512_bf16();
bool has_avx512_vnni();

}  // namespace wemm

// The version of a function that was compiled for this machine.
#if defined(__x86_64__) && defined(__GNUC__)
#define WEMM_BEST(...)                                              \
  (::wemm::isa() >= ::wemm::Isa::avx512 ? ::wemm::avx512::__VA_ARGS__ \
   : ::wemm::isa() == ::wemm::Isa::avx2 ? ::wemm::avx2::__VA_ARGS__   \
                                        : ::wemm::portable::__VA_ARGS__)
#else
#define WEMM_BEST(...) ::wemm::portable::__VA_ARGS__
#endif

#if defined(__GNUC__)
#define WEMM_INLINE inline __attribute__((always_inline))
#else
#define WEMM_INLINE inline
#endif
