// W[N, K] from codes, at the speed at which W can be written.
//
// Codes lie with rows fastest, W with columns fastest, so a block turns a tile of 32 rows x 8 words (32 vectors) in
// shared memory: it is read as 32 neighbouring rows of a word, and written as 32 neighbouring vectors of a row (256 to
// 1024 bytes). The codebooks are copied to shared memory once a block, and a block walks over many tiles of its rows.
#pragma once
#include "codegemm.h"
#include "element.cuh"

namespace codegemm::cuda {

constexpr int kDequantizeThreads = 256;  // 8 warps, each writes 4 of the 32 rows
constexpr int kDequantizeRows = 32;
constexpr int kDequantizeWords = 8;
constexpr int kMaxCodebooks = 4;

template <typename T, int V>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Vector {
  T element[V];
};

// Rows [begin, end) of W to the first rows of y, which must be aligned to 16 bytes. One block: 32 rows, every
// gridDim.y-th tile of words.
template <typename T, int V>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_kernel(const Dequantize call, int64_t begin, int64_t end) {
  using Entry = Vector<T, V>;
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  __shared__ uint32_t tile[kMaxCodebooks][kDequantizeWords][kDequantizeRows + 1];
  Entry* codebooks = reinterpret_cast<Entry*>(dynamic_shared);
  const Weight& weight = call.weight;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int num_codebooks = weight.num_codebooks;
  const int64_t words = weight.in_features / (4 * V), rows = weight.out_features;
  const int64_t vectors_per_group = weight.in_features / weight.num_groups / V;
  const T* source = static_cast<const T*>(weight.codebooks);
  for (int i = threadIdx.x; i < num_codebooks * 256 * V; i += kDequantizeThreads)
    reinterpret_cast<T*>(codebooks)[i] = source[i];

  const int64_t first_row = begin + int64_t(blockIdx.x) * kDequantizeRows;
  for (int64_t first_word = int64_t(blockIdx.y) * kDequantizeWords; first_word < words;
       first_word += int64_t(gridDim.y) * kDequantizeWords) {
    __syncthreads();  // the last tile has been read; the first time, nothing is needed
    const bool inside = first_word + warp < words && first_row + lane < end;
    for (int i = 0; i < num_codebooks; ++i)
      tile[i][warp][lane] = inside ? weight.codes[(i * words + first_word + warp) * rows + first_row + lane] : 0;
    __syncthreads();
    const int64_t vector = 4 * first_word + lane;
    if (vector >= 4 * words) continue;
    const int64_t group = vector / vectors_per_group;
#pragma unroll
    for (int r = warp; r < kDequantizeRows; r += kDequantizeThreads / 32) {
      const int64_t row = first_row + r;
      if (row >= end) break;
      float sum[V] = {};
      for (int i = 0; i < num_codebooks; ++i) {
        const uint32_t code = (tile[i][lane / 4][r] >> (8 * (lane % 4))) & 255;
        const Entry entry = codebooks[i * 256 + code];
#pragma unroll
        for (int e = 0; e < V; ++e) sum[e] += to_float(entry.element[e]);
      }
      const float scale = to_float(static_cast<const T*>(weight.scales)[group * rows + row]);
      Entry out;
#pragma unroll
      for (int e = 0; e < V; ++e) out.element[e] = from_float<T>(scale * sum[e]);
      *reinterpret_cast<Entry*>(static_cast<T*>(call.y) + (row - begin) * weight.in_features + vector * V) = out;
    }
  }
}

}  // namespace codegemm::cuda
