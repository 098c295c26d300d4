// Which kernel computes a product: the choice, and nothing else.
#include <cuda_runtime.h>

#include "device.h"
#include "kernels.h"
#include "product.h"

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

namespace {

bool is_fast(const Gemm& call) {
  const Weight& w = call.weight;
  const int64_t word_inputs = 4 * w.vector_length, group = w.in_features / w.num_groups;
  return w.dtype != DType::kFloat32 && w.out_features % 8 == 0 && group % word_inputs == 0 &&
         w.in_features / word_inputs < 65536 && w.out_features < (int64_t(1) << 31) && is_aligned(w.codes, 16) &&
         is_aligned(w.codebooks, 16) && is_aligned(w.scales, 16) && is_aligned(call.x, 16) && is_aligned(call.y, 8) &&
         (call.rows == 1 || call.x_row_stride % 8 == 0);
}

bool share_input(const Gemm& a, const Gemm& b) {
  return a.x == b.x && a.x_row_stride == b.x_row_stride && a.rows == b.rows && a.weight.dtype == b.weight.dtype &&
         a.weight.num_codebooks == b.weight.num_codebooks && a.weight.vector_length == b.weight.vector_length &&
         a.weight.num_groups == b.weight.num_groups && a.weight.in_features == b.weight.in_features;
}

// `count` calls with `rows` tokens from `token` on, by one launch of `launch`.
template <typename Launch>
const char* launch_slice(const Gemm* calls, int count, int64_t token, int64_t rows, int device, cudaStream_t stream,
                         const Launch& launch) {
  const int64_t element = 2;
  Gemm slice[kMaxSegments];
  for (int i = 0; i < count; ++i) {
    slice[i] = calls[i];
    slice[i].rows = rows;
    slice[i].x = static_cast<const char*>(calls[i].x) + token * calls[i].x_row_stride * element;
    slice[i].y = static_cast<char*>(calls[i].y) + token * calls[i].weight.out_features * element;
  }
  return launch(slice, count, device, stream);
}

// One token, and two unless few rows would share the tables of short vectors (docs/log.md, "CUDA kernels", eleventh
// version).
bool prefers_psumbook(const Gemm* calls, int count) {
  int64_t rows = 0;
  for (int i = 0; i < count; ++i) rows += calls[i].weight.out_features;
  return calls[0].rows == 1 || (calls[0].rows == 2 && (calls[0].weight.vector_length > 4 || rows > 4096));
}

// Calls that one launch can compute for some tokens at a time.
const char* fast_gemm(const Gemm* calls, int count, int device, cudaStream_t stream) {
  const int64_t tokens = calls[0].rows;
  if (prefers_psumbook(calls, count) && device_limits(device).capability >= 90) {
    const char* error = psumbook_gemm(calls, count, device, stream);
    if (error != kDoesNotFit) return error;
  }
  if (tokens > kMmaTokens && device_limits(device).capability == 90) {
    const char* error = codebook_wgmma_gemm(calls, count, device, stream);
    if (error != kDoesNotFit) return error;
  }
  for (int64_t token = 0; token < tokens;) {
    int64_t rows = tokens - token < kGemmTokens ? tokens - token : kGemmTokens;
    const char* error = kDoesNotFit;
    if (rows > kMmaTokens) error = launch_slice(calls, count, token, rows, device, stream, codebook_gemm);
    if (error == kDoesNotFit && rows <= kMmaTokens)
      error = launch_slice(calls, count, token, rows, device, stream, codebook_flow_gemm);
    if (error == kDoesNotFit) {
      rows = rows < kMmaTokens ? rows : kMmaTokens;
      error = launch_slice(calls, count, token, rows, device, stream, codebook_mma_gemm);
    }
    if (error) return error;
    token += rows;
  }
  return nullptr;
}

const char* any_gemm(const Gemm& call, int device, cudaStream_t stream) {
  if (call.rows == 0 || call.weight.out_features == 0) return nullptr;
  if (is_fast(call)) {
    const char* error = fast_gemm(&call, 1, device, stream);
    if (error != kDoesNotFit) return error;
  }
  return general_gemm(call, stream);
}

}  // namespace

const char* gemm(const Gemm& call, int device, void* stream) { return gemm_grouped(&call, 1, device, stream); }

const char* gemm_grouped(const Gemm* calls, int count, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error) return guard.error;
  const auto queue = static_cast<cudaStream_t>(stream);
  bool together = count > 1 && count <= kMaxSegments && calls[0].rows > 0;
  for (int i = 0; together && i < count; ++i)
    together = is_fast(calls[i]) && share_input(calls[0], calls[i]) && calls[i].weight.out_features > 0;
  if (together) {
    const char* error = fast_gemm(calls, count, device, queue);
    if (error != kDoesNotFit) return error;
  }
  for (int i = 0; i < count; ++i)
    if (const char* error = any_gemm(calls[i], device, queue)) return error;
  return nullptr;
}

}  // namespace codegemm::cuda
