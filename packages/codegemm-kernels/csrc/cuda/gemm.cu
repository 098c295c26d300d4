// Which kernel computes a product: the choice, and nothing else.
#include <cuda_runtime.h>

#include "device.h"
#include "kernels.h"

namespace codegemm::cuda {

const DeviceLimits& device_limits(int device) {
  // Function-local so that nothing touches the driver before the first call; at most 64 GPUs in a machine.
  static DeviceLimits known[64] = {};
  static const DeviceLimits fallback = {1, 48 * 1024, 0};
  if (device < 0 || device >= 64) return fallback;
  DeviceLimits& limits = known[device];
  if (limits.capability == 0) {  // threads that race here write the same values
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    limits.capability = 10 * major + minor;
  }
  return limits;
}

const char* gemm(const Gemm& call, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error) return guard.error;
  if (call.rows == 0 || call.weight.out_features == 0) return nullptr;
  return general_gemm(call, static_cast<cudaStream_t>(stream));
}

}  // namespace codegemm::cuda
