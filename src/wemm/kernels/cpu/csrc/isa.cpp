#include "isa.h"

#include <algorithm>
#include <atomic>

namespace wemm {
namespace {

Isa best() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2");
  if (fma && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (fma) return Isa::avx2;
#endif
  return Isa::portable;
}

std::atomic<int> limit{static_cast<int>(Isa::avx512)};

}  // namespace

Isa isa() {
  static const Isa found = best();
  return static_cast<Isa>(std::min(static_cast<int>(found), limit.load(std::memory_order_relaxed)));
}

void limit_isa(int isa) { limit.store(isa, std::memory_order_relaxed); }

}  // namespace wemm
