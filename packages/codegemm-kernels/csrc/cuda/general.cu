// Launcher of the general kernel: 3 dtypes x 3 vector lengths; everything else is a run-time number.
#include "general.cuh"

#include <algorithm>

#include "device.h"
#include "kernels.h"

namespace codegemm::cuda {
namespace {

template <typename T, int V>
void launch(const Gemm& call, cudaStream_t stream) {
  const int64_t row_blocks = ceil_div(call.weight.out_features, kGeneralThreads);
  const int64_t token_blocks = std::min<int64_t>(ceil_div(call.rows, kGeneralTokens), 65535);
  general_gemm_kernel<T, V><<<dim3(row_blocks, token_blocks), kGeneralThreads, 0, stream>>>(call);
}

template <typename T>
bool launch_vector_length(const Gemm& call, cudaStream_t stream) {
  switch (call.weight.vector_length) {
    case 4:
      launch<T, 4>(call, stream);
      return true;
    case 8:
      launch<T, 8>(call, stream);
      return true;
    case 16:
      launch<T, 16>(call, stream);
      return true;
  }
  return false;
}

}  // namespace

const char* general_gemm(const Gemm& call, cudaStream_t stream) {
  bool known = false;
  switch (call.weight.dtype) {
    case DType::kFloat32:
      known = launch_vector_length<float>(call, stream);
      break;
    case DType::kFloat16:
      known = launch_vector_length<__half>(call, stream);
      break;
    case DType::kBFloat16:
      known = launch_vector_length<__nv_bfloat16>(call, stream);
      break;
  }
  return known ? launch_status() : "no CUDA kernel for this vector length or dtype";
}

}  // namespace codegemm::cuda
