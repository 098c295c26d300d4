// The kernel families behind codegemm::cuda::gemm. Each launches on `stream` of the current device.
#pragma once
#include <cuda_runtime.h>

#include "codegemm.h"

namespace codegemm::cuda {

// general.cu: every scheme, dtype, shape and alignment.
const char* general_gemm(const Gemm& call, cudaStream_t stream);

}  // namespace codegemm::cuda
