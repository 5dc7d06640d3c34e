// Matrix tiles: eight registers of 16 rows of 64 bytes. A product of tiles is c[m][n] += sum over k of
// a[m][k] * b[k][n], where a holds rows as they lie in memory, and b holds for every group of elements that fill four
// bytes (two bfloat16, four int8) one row: the groups of 16 columns side by side.
//
// The shape of the tiles is state of a thread. Others (oneDNN) keep theirs there too, so it is set at the beginning
// of a stretch of work and released at its end, on every thread that takes part.
#pragma once

#include "isa.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define WEMM_AMX \
  __attribute__((target("amx-tile,amx-int8,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")))

namespace wemm {

class Tiles {
 public:
  // All eight of 16 rows of 64 bytes. Constant: of a local one, compilers drop what the intrinsic does not say it reads.
  WEMM_AMX Tiles() {
    alignas(64) static constexpr struct {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } kShape;
    _tile_loadconfig(&kShape);
  }
  WEMM_AMX ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

}  // namespace wemm

#endif
