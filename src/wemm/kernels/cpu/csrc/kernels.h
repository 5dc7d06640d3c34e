// Every kernel of the extension, as bound in module.cpp.
#pragma once

#include "tensor.h"

namespace wemm {

void rms_norm(const TensorArgument& x, const TensorArgument& weight, float eps, const TensorArgument& out);

}  // namespace wemm
