// The path of linear.cpp on matrix tiles.
#pragma once

#include <cstdint>

#include "types.h"

namespace wemm {

constexpr std::int64_t kMaxTileTokens = 32;

// x: [tokens, width], up to 32 of them, weight: [outputs, width], bias: [outputs] or null → out: [tokens, outputs].
void linear_amx(const bfloat16* x, std::int64_t tokens, const bfloat16* weight, const bfloat16* bias,
                std::int64_t outputs, std::int64_t width, bfloat16* out);

}  // namespace wemm
