// W[N, K] from codes, at the speed at which W can be written.
//
// Codes lie with rows fastest, W with columns fastest, so a block turns a tile of 32 rows x 8 or 16 words in shared
// memory: it is read as 32 neighbouring rows of a word, and written 16 bytes a lane, 512 neighbouring bytes of a row.
// The codebooks are copied to shared memory once a block, and a block walks over many tiles of its rows; the codes of
// the next tile are on their way while one is written.
//
// Cost of 16 bytes (v = 4, m = 1): two lookups of about six wavefronts (random 8-byte entries in 16 pairs of banks),
// one store of four, and some 40 instructions.
#pragma once
#include "codegemm.h"
#include "element.cuh"
#include "product.h"

namespace codegemm::cuda {

constexpr int kDequantizeThreads = 256;  // 8 warps, each writes 4 of the 32 rows
constexpr int kDequantizeRows = 32;
constexpr int kMaxCodebooks = 4;

template <typename T, int V>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Vector {
  T element[V];
};

// Adds up the entries of `vectors` neighbouring codes, the first at bit `shift` of the words, and scales them.
template <typename T, int V, int kVectors, int kWords>
__device__ __forceinline__ void decode(Vector<T, V * kVectors>& out,
                                       const uint32_t (*tile)[kWords][kDequantizeRows + 1],
                                       const Vector<T, V>* codebooks, int num_codebooks, int word, int shift, int row,
                                       float scale) {
  float sum[kVectors][V] = {};
#pragma unroll 2
  for (int i = 0; i < num_codebooks; ++i) {
    const uint32_t codes = tile[i][word][row] >> shift;
#pragma unroll
    for (int n = 0; n < kVectors; ++n) {
      const Vector<T, V> entry = codebooks[i * 256 + ((codes >> (8 * n)) & 255)];
#pragma unroll
      for (int e = 0; e < V; ++e) sum[n][e] += to_float(entry.element[e]);
    }
  }
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
#pragma unroll
    for (int e = 0; e < V; ++e) out.element[n * V + e] = from_float<T>(scale * sum[n][e]);
  }
}

// Rows [begin, end) of W to the first rows of y, which must be aligned to 16 bytes. One block: 32 rows, every
// gridDim.y-th tile of words. Neighbouring vectors of a lane share a scale: groups are whole words, or one vector each
// is decoded (kVectors = 1).
template <typename T, int V, int kVectors>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_kernel(const Dequantize call, Divisor vectors_per_group, int64_t begin, int64_t end) {
  constexpr int kWords = 8 * kVectors, kCodes = kWords / (kDequantizeThreads / 32);  // words that a thread reads a tile
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  __shared__ uint32_t tile[kMaxCodebooks][kWords][kDequantizeRows + 1];
  Vector<T, V>* codebooks = reinterpret_cast<Vector<T, V>*>(dynamic_shared);
  const Weight& weight = call.weight;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int num_codebooks = weight.num_codebooks;
  const int words = int(weight.in_features / (4 * V)), step = gridDim.y * kWords;
  const int64_t rows = weight.out_features, first_row = begin + int64_t(blockIdx.x) * kDequantizeRows;
  const T* source = static_cast<const T*>(weight.codebooks);
  for (int i = threadIdx.x; i < num_codebooks * 256 * V; i += kDequantizeThreads)
    reinterpret_cast<T*>(codebooks)[i] = source[i];

  uint32_t next[kMaxCodebooks][kCodes];
  const auto read = [&](int first_word) {
#pragma unroll
    for (int i = 0; i < kMaxCodebooks; ++i) {
#pragma unroll
      for (int k = 0; k < kCodes; ++k) {
        const int word = first_word + warp * kCodes + k;
        const bool inside = i < num_codebooks && word < words && first_row + lane < end;
        next[i][k] = inside ? weight.codes[(int64_t(i) * words + word) * rows + first_row + lane] : 0;
      }
    }
  };
  read(blockIdx.y * kWords);
  for (int first_word = blockIdx.y * kWords; first_word < words; first_word += step) {
    __syncthreads();  // the last tile has been written; the first time, nothing is needed
#pragma unroll
    for (int i = 0; i < kMaxCodebooks; ++i) {
#pragma unroll
      for (int k = 0; k < kCodes; ++k)
        if (i < num_codebooks) tile[i][warp * kCodes + k][lane] = next[i][k];
    }
    __syncthreads();
    if (first_word + step < words) read(first_word + step);
    const int place = lane * kVectors, vector = 4 * first_word + place;
    if (vector >= 4 * words) continue;
    const T* scales = static_cast<const T*>(weight.scales) + (vector / vectors_per_group) * rows + first_row;
    T* y = static_cast<T*>(call.y) + (first_row - begin) * weight.in_features + int64_t(vector) * V;
#pragma unroll
    for (int r = warp; r < kDequantizeRows; r += kDequantizeThreads / 32) {
      if (first_row + r >= end) break;
      Vector<T, V * kVectors> out;
      decode<T, V, kVectors, kWords>(out, tile, codebooks, num_codebooks, place / 4, 8 * (place % 4), r,
                                     to_float(scales[r]));
      *reinterpret_cast<Vector<T, V * kVectors>*>(y + r * weight.in_features) = out;
    }
  }
}

}  // namespace codegemm::cuda
