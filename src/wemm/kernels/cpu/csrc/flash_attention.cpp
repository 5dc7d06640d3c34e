#include "flash_attention.h"

#include <stdexcept>

namespace wemm {

const FlashFamily& flash_family() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa() == Isa::amx && __builtin_cpu_supports("avx512vbmi")) return kFlashAmx;
  if (has_avx512_bf16()) return kFlashAvx512;
#endif
  throw std::invalid_argument("flash attention needs AVX-512 with BF16");
}

}  // namespace wemm
