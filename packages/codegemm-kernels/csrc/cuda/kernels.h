// The kernel families behind codegemm::cuda::gemm. Each launches on `stream` of the current device, which is `device`.
#pragma once
#include <cuda_runtime.h>

#include "codegemm.h"

namespace codegemm::cuda {

constexpr int kMmaTokens = 16, kGemmTokens = 64;  // the most tokens a launch of two tensor-core kernels takes

// Returned when a scheme's tables and one tile of sums exceed the shared memory of the device: nothing was launched.
inline constexpr const char* kDoesNotFit = "the GPU has too little shared memory for this kernel";

// general.cu: every scheme, dtype, shape and alignment; sums in one thread an output.
const char* general_gemm(const Gemm& call, cudaStream_t stream);

// The fast families: fp16 and bf16, out_features a multiple of 8, groups of whole code words, aligned tensors; `count`
// calls (1 to 4) with the same x, rows, m, v, G, K and dtype in one launch.
// psumbook.cu: one or two tokens, sm_90 and later, unless scale groups divide a block of 8 words unevenly.
// codebook_flow.cu: up to 8, sm_90 and later, groups of whole units, where tables fit and x of a block's K fits into
// registers. codebook_mma.cu: up to kMmaTokens. codebook_gemm.cu: up to kGemmTokens.
// codebook_wgmma.cu: any number; v of 4 or 8, at most two codebooks, capability 9.0.
const char* psumbook_gemm(const Gemm* calls, int count, int device, cudaStream_t stream);
const char* codebook_flow_gemm(const Gemm* calls, int count, int device, cudaStream_t stream);
const char* codebook_mma_gemm(const Gemm* calls, int count, int device, cudaStream_t stream);
const char* codebook_gemm(const Gemm* calls, int count, int device, cudaStream_t stream);
const char* codebook_wgmma_gemm(const Gemm* calls, int count, int device, cudaStream_t stream);

}  // namespace codegemm::cuda
