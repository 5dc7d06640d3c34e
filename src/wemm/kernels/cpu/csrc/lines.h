// Uninitialised memory that begins with a cache line: the thread that writes it first gets its pages.
#pragma once

#include <cstdint>
#include <memory>

namespace wemm {

template <typename T>
class Lines {
 public:
  explicit Lines(std::int64_t size) : memory_(new T[size + 64 / sizeof(T)]) {
    void* start = memory_.get();
    std::size_t space = size * sizeof(T) + 64;
    data_ = static_cast<T*>(std::align(64, size * sizeof(T), start, space));
  }
  T* data() { return data_; }

 private:
  std::unique_ptr<T[]> memory_;
  T* data_;
};

}  // namespace wemm
