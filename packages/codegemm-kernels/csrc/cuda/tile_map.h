// The description of x that the tensor copy engine reads tiles by.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include "codebook_wgmma.cuh"
#include "device.h"

namespace codegemm::cuda {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// From the driver, by way of the runtime: nothing links to libcuda, which machines without a GPU do not have.
inline EncodeTiled find_encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const auto status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const auto status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (DeviceGuard::describe(status) || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<EncodeTiled>(function);
}

// x of a launch as tiles of 64 columns x `tokens`; false if the driver cannot (an older one; rows of x that overlap).
inline bool make_tile_map(TileMap& x, const Product& p, int columns, int tokens) {
  static const EncodeTiled encode = find_encode_tiled();
  const cuuint64_t size[2] = {cuuint64_t(columns), cuuint64_t(p.tokens)};
  const cuuint64_t row_bytes = cuuint64_t(p.x_row_stride) * 2;
  const cuuint32_t box[2] = {kStageColumns, cuuint32_t(tokens)}, steps[2] = {1, 1};
  return encode && encode(&x.map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(p.x), size, &row_bytes, box,
                          steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                          CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace codegemm::cuda
