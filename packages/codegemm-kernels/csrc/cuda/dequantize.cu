// Launcher of the dequantiser: 3 dtypes x 3 vector lengths.
#include "dequantize.cuh"

#include <algorithm>

#include "device.h"
#include "kernels.h"

namespace codegemm::cuda {
namespace {

template <typename T, int V, int kVectors>
const char* launch(const Dequantize& call, int64_t first_row, int64_t rows, const DeviceLimits& limits,
                   cudaStream_t stream) {
  const int shared = call.weight.num_codebooks * 256 * V * int(sizeof(T));  // at most 64 KB: fp32, m = 4, v = 16
  const auto kernel = dequantize_kernel<T, V, kVectors>;
  if (shared > 36 * 1024) {  // 48 KB less the static code tile
    const auto status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (status != cudaSuccess) return DeviceGuard::describe(status);
  }
  // A block amortises its copy of the codebooks over a strip of words; 16 blocks a multiprocessor fill the device.
  const int64_t row_blocks = ceil_div(rows, kDequantizeRows);
  const int64_t word_tiles = ceil_div(call.weight.in_features / (4 * V), 8 * kVectors);
  const int64_t strips = std::clamp<int64_t>(ceil_div(16 * limits.multiprocessors, row_blocks), 1, word_tiles);
  kernel<<<dim3(row_blocks, std::min<int64_t>(strips, 65535)), kDequantizeThreads, shared, stream>>>(
      call, make_divisor(call.weight.in_features / call.weight.num_groups / V), first_row, first_row + rows);
  return launch_status();
}

// 16 bytes a lane where two neighbouring vectors make them and share a scale.
template <typename T, int V>
const char* launch(const Dequantize& call, int64_t first_row, int64_t rows, const DeviceLimits& limits,
                   cudaStream_t stream) {
  const int64_t group = call.weight.in_features / call.weight.num_groups;
  if constexpr (V * sizeof(T) == 8)
    if (group % (2 * V) == 0) return launch<T, V, 2>(call, first_row, rows, limits, stream);
  return launch<T, V, 1>(call, first_row, rows, limits, stream);
}

template <typename T>
const char* launch_vector_length(const Dequantize& call, int64_t first_row, int64_t rows, const DeviceLimits& limits,
                                 cudaStream_t stream) {
  switch (call.weight.vector_length) {
    case 4:
      return launch<T, 4>(call, first_row, rows, limits, stream);
    case 8:
      return launch<T, 8>(call, first_row, rows, limits, stream);
    case 16:
      return launch<T, 16>(call, first_row, rows, limits, stream);
  }
  return "no CUDA kernel for this vector length";
}

}  // namespace

const char* dequantize(const Dequantize& call, int64_t first_row, int64_t rows, int device, void* stream) {
  if (!is_aligned(call.y, 16)) return "the output of dequantize must be aligned to 16 bytes";
  const DeviceGuard guard(device);
  if (guard.error) return guard.error;
  if (rows == 0 || call.weight.in_features == 0) return nullptr;
  const DeviceLimits& limits = device_limits(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (call.weight.dtype) {
    case DType::kFloat32:
      return launch_vector_length<float>(call, first_row, rows, limits, queue);
    case DType::kFloat16:
      return launch_vector_length<__half>(call, first_row, rows, limits, queue);
    case DType::kBFloat16:
      return launch_vector_length<__nv_bfloat16>(call, first_row, rows, limits, queue);
  }
  return "no CUDA kernel for this dtype";
}

}  // namespace codegemm::cuda
