// A tensor as it crosses from Python: address, dtype, shape, strides. And the shape contract that
// every kernel states at its entry, so that Python and C++ cannot disagree silently.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "types.h"

namespace wemm {

// wemm/kernels/cpu/tensors.py: DTYPE_CODES, INTEGER_CODES
enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, int8 = 3, uint8 = 4, int32 = 5, int64 = 6 };

using TensorArgument = std::tuple<std::uintptr_t, int, std::vector<std::int64_t>, std::vector<std::int64_t>>;

struct Tensor {
  std::uintptr_t address;
  DType dtype;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;

  explicit Tensor(const TensorArgument& argument)
      : address(std::get<0>(argument)),
        dtype(static_cast<DType>(std::get<1>(argument))),
        shape(std::get<2>(argument)),
        strides(std::get<3>(argument)) {}

  bool is_empty() const {
    for (const std::int64_t length : shape) {
      if (length == 0) return true;
    }
    return false;
  }

  template <typename T>
  T* data() const {
    return reinterpret_cast<T*>(address);
  }
};

// Names dimensions as it meets them: a name met again must have the same length.
//
//   Contract contract("rms_norm");
//   contract.expect("x", x, {"rows", "hidden_size"}).expect("weight", weight, {"hidden_size"});
//   const auto rows = contract["rows"];
class Contract {
 public:
  explicit Contract(std::string kernel) : kernel_(std::move(kernel)) {}

  // Of any float dtype.
  Contract& expect(const char* name, const Tensor& tensor, std::initializer_list<const char*> dims) {
    expect_rows(name, tensor, dims);
    return expect_contiguous(name, tensor);
  }

  Contract& expect(const char* name, const Tensor& tensor, std::initializer_list<const char*> dims, DType dtype) {
    if (tensor.dtype != dtype) fail(name, "has the wrong dtype");
    expect_shape(name, tensor, dims);
    return expect_contiguous(name, tensor);
  }

  // Contiguous in the last dimension only.
  Contract& expect_rows(const char* name, const Tensor& tensor, std::initializer_list<const char*> dims) {
    if (tensor.dtype != DType::float32 && tensor.dtype != DType::bfloat16 && tensor.dtype != DType::float16) {
      fail(name, "has an unknown dtype");
    }
    return expect_shape(name, tensor, dims);
  }

  Contract& same_dtype(std::initializer_list<const Tensor*> tensors) {
    for (const Tensor* tensor : tensors) {
      if (tensor->dtype != (*tensors.begin())->dtype) throw std::invalid_argument(kernel_ + ": dtypes differ");
    }
    return *this;
  }

  void require(bool holds, const char* rule) const {
    if (!holds) throw std::invalid_argument(kernel_ + " " + rule);
  }

  // Bounds of packed sequences: from 0 to `total`, never falling.
  void require_bounds(const char* name, const std::vector<std::int64_t>& bounds, std::int64_t total) const {
    bool rises = !bounds.empty() && bounds.front() == 0 && bounds.back() == total;
    for (std::size_t i = 1; i < bounds.size(); ++i) rises = rises && bounds[i - 1] <= bounds[i];
    if (!rises) fail(name, "must rise from 0 to " + std::to_string(total));
  }

  // Block tables that hold every token of their sequences, in a cache of `num_blocks`.
  void require_blocks(const std::vector<std::vector<std::int64_t>>& tables, const std::vector<std::int64_t>& seq_lens,
                      std::int64_t num_seqs, std::int64_t block_size, std::int64_t num_blocks) const {
    require(static_cast<std::int64_t>(tables.size()) == num_seqs &&
                static_cast<std::int64_t>(seq_lens.size()) == num_seqs,
            "needs a block table and a length per sequence");
    for (std::size_t s = 0; s < tables.size(); ++s) {
      require(seq_lens[s] >= 0 && static_cast<std::int64_t>(tables[s].size()) * block_size >= seq_lens[s],
              "needs blocks for every token");
      for (std::int64_t b = 0; b * block_size < seq_lens[s]; ++b) {
        require(tables[s][b] >= 0 && tables[s][b] < num_blocks, "needs blocks of the cache");
      }
    }
  }

  std::int64_t operator[](const char* dim) const { return lengths_.at(dim); }

 private:
  Contract& expect_shape(const char* name, const Tensor& tensor, std::initializer_list<const char*> dims) {
    if (tensor.shape.size() != dims.size() || tensor.strides.size() != dims.size()) {
      fail(name, "must have " + std::to_string(dims.size()) + " dimensions");
    }
    std::size_t i = 0;
    for (const char* dim : dims) {
      const auto [known, added] = lengths_.emplace(dim, tensor.shape[i]);
      if (!added && known->second != tensor.shape[i]) {
        fail(name, std::string("has ") + std::to_string(tensor.shape[i]) + " in dimension " + dim + ", not " +
                       std::to_string(known->second));
      }
      ++i;
    }
    if (!tensor.is_empty()) {
      if (tensor.address == 0) fail(name, "is null");
      if (tensor.shape.back() > 1 && tensor.strides.back() != 1) fail(name, "must have contiguous rows");
    }
    return *this;
  }

  Contract& expect_contiguous(const char* name, const Tensor& tensor) {
    std::int64_t stride = 1;
    for (std::size_t d = tensor.shape.size(); d-- > 0; stride *= tensor.shape[d]) {
      if (tensor.shape[d] > 1 && tensor.strides[d] != stride && !tensor.is_empty()) fail(name, "must be contiguous");
    }
    return *this;
  }

  [[noreturn]] void fail(const char* name, const std::string& rule) const {
    throw std::invalid_argument(kernel_ + ": " + name + " " + rule);
  }

  std::string kernel_;
  std::map<std::string, std::int64_t> lengths_;
};

// A row of int32.
inline std::vector<std::int64_t> integers(const Tensor& tensor) {
  const std::int32_t* first = tensor.data<std::int32_t>();
  return std::vector<std::int64_t>(first, first + tensor.shape[0]);
}

// Of block tables, int32 [num_seqs, max_blocks], what their sequences need, or all there is.
inline std::vector<std::vector<std::int64_t>> used_blocks(const Tensor& tables,
                                                          const std::vector<std::int64_t>& seq_lens,
                                                          std::int64_t block_size) {
  std::vector<std::vector<std::int64_t>> used;
  for (std::size_t s = 0; s < seq_lens.size(); ++s) {
    const std::int32_t* row = tables.data<std::int32_t>() + s * tables.shape[1];
    const std::int64_t needed = block_size > 0 ? (std::max<std::int64_t>(seq_lens[s], 0) + block_size - 1) / block_size : 0;
    used.emplace_back(row, row + std::min(needed, tables.shape[1]));
  }
  return used;
}

// Calls function(T()) for the element type T.
template <typename Function>
void with_dtype(DType dtype, Function function) {
  if (dtype == DType::float32) {
    function(float());
  } else if (dtype == DType::float16) {
    function(float16());
  } else {
    function(bfloat16());
  }
}

}  // namespace wemm
