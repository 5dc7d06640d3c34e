// Compiles a part of a source file once per instruction set, each in a namespace of its own:
//
//   #ifndef WEMM_COMPILING_FOR_ISA
//   #define WEMM_THIS_FILE "linear.cpp"
//   #include "foreach_isa.h"
//   … entry points, which call WEMM_BEST(function)(…)
//   #else
//   … functions, over vec.h
//   #endif
//
// Vectors that a compiler lowers before it inlines have to be in a function that already knows its instruction
// set: an attribute on the caller alone would come too late.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include "isa.h"
#include "types.h"

#define WEMM_COMPILING_FOR_ISA

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace wemm::avx512 {
#define WEMM_ISA_AVX512  // the compiler's own macros do not follow the pragma in C++
#include "vec.h"
#include WEMM_THIS_FILE
#undef WEMM_ISA_AVX512
}  // namespace wemm::avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace wemm::avx2 {
#define WEMM_ISA_AVX2
#include "vec.h"
#include WEMM_THIS_FILE
#undef WEMM_ISA_AVX2
}  // namespace wemm::avx2
#pragma GCC pop_options
#endif

namespace wemm::portable {
#include "vec.h"
#include WEMM_THIS_FILE
}  // namespace wemm::portable

#undef WEMM_COMPILING_FOR_ISA
