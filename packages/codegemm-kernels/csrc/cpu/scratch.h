#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace codegemm::cpu {

class OutOfMemory : public std::bad_alloc {
 public:
  const char* what() const noexcept override {
    return "there is not enough memory for what CPU kernels keep while they work: lower the rows of x or the threads";
  }
};

// Memory that a thread keeps from call to call, aligned to a cache line. Throws OutOfMemory.
class Scratch {
 public:
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      size_ = 0;
      memory_.reset(std::aligned_alloc(64, bytes));
      if (memory_ == nullptr) throw OutOfMemory();
      size_ = bytes;
    }
    return static_cast<T*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

}  // namespace codegemm::cpu
