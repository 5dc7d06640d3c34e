#include "isa.h"

#include <algorithm>
#include <atomic>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace wemm {
namespace {

// The processor has tiles, and the kernel of the system lets this process use them.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kAll) != kAll) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa best() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2");
  if (fma && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    const bool products = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    return products && may_use_tiles() ? Isa::amx : Isa::avx512;
  }
  if (fma) return Isa::avx2;
#endif
  return Isa::portable;
}

std::atomic<int> limit{static_cast<int>(Isa::amx)};

}  // namespace

Isa isa() {
  static const Isa found = best();
  return static_cast<Isa>(std::min(static_cast<int>(found), limit.load(std::memory_order_relaxed)));
}

void limit_isa(int isa) { limit.store(isa, std::memory_order_relaxed); }

bool has_avx512_bf16() {
#if defined(__x86_64__) && defined(__GNUC__)
  return isa() >= Isa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool has_avx512_vnni() {
#if defined(__x86_64__) && defined(__GNUC__)
  return isa() >= Isa::avx512 && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

}  // namespace wemm
