// What every launcher needs from the runtime: the right device for the length of a call, and errors as strings.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "codegemm.h"

namespace codegemm::cuda {

// Makes `device` current and puts the caller's device back at the end. `error` is null if that worked.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cudaError_t status = cudaGetDevice(&previous_);
    if (status == cudaSuccess && previous_ != device) {
      status = cudaSetDevice(device);
      changed_ = status == cudaSuccess;
    }
    if (status != cudaSuccess) error = describe(status);
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  // The runtime's description of a failure, which is a string constant; null for success. Clears the error state, so
  // that a failed launch is not reported a second time by the next one.
  static const char* describe(cudaError_t status) {
    if (status == cudaSuccess) return nullptr;
    cudaGetLastError();
    return cudaGetErrorString(status);
  }

  const char* error = nullptr;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

inline const char* launch_status() { return DeviceGuard::describe(cudaGetLastError()); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Shared memory a block may ask for, multiprocessors and compute capability (90 for 9.0); asked for once a device.
struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;
  int capability;
};
const DeviceLimits& device_limits(int device);

}  // namespace codegemm::cuda
