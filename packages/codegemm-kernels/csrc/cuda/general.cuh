// The product for every scheme, dtype, shape and alignment: the kernel that runs where no fast one applies, and the
// one that the fast ones are compared with on the GPU.
//
// A thread owns one row of W and walks along K; neighbouring threads own neighbouring rows, so code and scale loads
// are coalesced, and all threads of a block read the same x, which L1 broadcasts. One pass serves kTokens rows of x.
// Nothing is reused between threads but the caches: about 10 to 30 times slower than the fast kernels.
#pragma once
#include "codegemm.h"
#include "element.cuh"

namespace codegemm::cuda {

constexpr int kGeneralThreads = 128;
constexpr int kGeneralTokens = 4;

template <typename T, int V>
__global__ void __launch_bounds__(kGeneralThreads) general_gemm_kernel(const Gemm call) {
  const Weight& weight = call.weight;
  const int64_t row = int64_t(blockIdx.x) * kGeneralThreads + threadIdx.x;
  if (row >= weight.out_features) return;
  const int64_t words = weight.in_features / (4 * V);
  const int64_t vectors_per_group = weight.in_features / weight.num_groups / V;
  const T* scales = static_cast<const T*>(weight.scales) + row;
  const T* codebooks = static_cast<const T*>(weight.codebooks);

  for (int64_t token = int64_t(blockIdx.y) * kGeneralTokens; token < call.rows;
       token += int64_t(gridDim.y) * kGeneralTokens) {
    const T* x[kGeneralTokens];
    float sum[kGeneralTokens] = {};
    for (int t = 0; t < kGeneralTokens; ++t) {  // tokens past the end repeat the last one and are not stored
      const int64_t source = token + t < call.rows ? token + t : call.rows - 1;
      x[t] = static_cast<const T*>(call.x) + source * call.x_row_stride;
    }
    float scale = 0;
    int64_t group = 0, vectors_left = 0;
    for (int64_t word = 0; word < words; ++word) {
      uint32_t codes[4];
      for (int i = 0; i < weight.num_codebooks; ++i)
        codes[i] = weight.codes[(i * words + word) * weight.out_features + row];
      for (int byte = 0; byte < 4; ++byte) {
        if (vectors_left-- == 0) {
          scale = to_float(scales[group++ * weight.out_features]);
          vectors_left = vectors_per_group - 1;
        }
        float entry[V] = {};
        for (int i = 0; i < weight.num_codebooks; ++i) {
          const T* source = codebooks + (i * 256 + ((codes[i] >> (8 * byte)) & 255)) * V;
#pragma unroll
          for (int e = 0; e < V; ++e) entry[e] += to_float(source[e]);
        }
        const int64_t column = (4 * word + byte) * V;
#pragma unroll
        for (int t = 0; t < kGeneralTokens; ++t) {
          float partial = 0;
#pragma unroll
          for (int e = 0; e < V; ++e) partial = fmaf(entry[e], to_float(x[t][column + e]), partial);
          sum[t] = fmaf(scale, partial, sum[t]);
        }
      }
    }
    const float bias = call.bias ? to_float(static_cast<const T*>(call.bias)[row]) : 0.0f;
    for (int t = 0; t < kGeneralTokens && token + t < call.rows; ++t)
      static_cast<T*>(call.y)[(token + t) * weight.out_features + row] = from_float<T>(sum[t] + bias);
  }
}

}  // namespace codegemm::cuda
