#include "cpu/floats.h"
#include "cpu/runs.h"
#include "cpu/tile.h"

namespace codegemm::cpu::portable {
namespace {

// tile[r][0 .. (last - first)·V) = the unscaled weights of row n + r, vector positions first .. last - 1.
template <int V>
void decode_tile(const Weight& weight, const float* codebooks, int64_t n, int rows, int64_t first, int64_t last,
                 float* tile) {
  const int64_t plane = weight.in_features / (4 * V) * weight.out_features;
  for (int64_t j = first; j < last; ++j) {
    const uint32_t* words = weight.codes + j / 4 * weight.out_features + n;
    const int shift = 8 * int(j % 4);
    float* column = tile + (j - first) * V;
    for (int r = 0; r < rows; ++r) {
      float* to = column + r * kTileColumns;
      const float* entry = codebooks + (words[r] >> shift & 255u) * V;
      for (int t = 0; t < V; ++t) to[t] = entry[t];
      for (int i = 1; i < weight.num_codebooks; ++i) {
        entry = codebooks + (i * 256 + (words[i * plane + r] >> shift & 255u)) * V;
        for (int t = 0; t < V; ++t) to[t] += entry[t];
      }
    }
  }
}

template <int V>
float dot(const float* a, const float* b, int64_t count) {
  float lanes[V] = {};
  for (int64_t k = 0; k < count; k += V) {
    for (int t = 0; t < V; ++t) lanes[t] += a[k + t] * b[k + t];
  }
  float sum = 0;
  for (int t = 0; t < V; ++t) sum += lanes[t];
  return sum;
}

template <int V, class T>
void gemm_rows(const GemmBlock& block) {
  const Gemm& call = *block.call;
  const Weight& weight = call.weight;
  const int64_t N = weight.out_features, K = weight.in_features, n = block.n;
  const int rows = block_rows(weight, n);
  float tile[kTileRows * kTileColumns], sums[kTokens][kTileRows] = {};
  for_runs<V>(weight, [&](int64_t group, int64_t first, int64_t last) {
    decode_tile<V>(weight, block.codebooks, n, rows, first, last, tile);
    float scales[kTileRows];
    widen_all(static_cast<const T*>(weight.scales) + group * N + n, rows, scales);
    for (int i = 0; i < block.tokens; ++i) {
      const float* inputs = block.x + i * K + first * V;
      for (int r = 0; r < rows; ++r) {
        sums[i][r] += scales[r] * dot<V>(tile + r * kTileColumns, inputs, (last - first) * V);
      }
    }
  });
  const T* bias = static_cast<const T*>(call.bias);
  for (int i = 0; i < block.tokens; ++i) {
    T* y = static_cast<T*>(call.y) + (block.token + i) * N + n;
    for (int r = 0; r < rows; ++r) y[r] = narrow<T>(bias == nullptr ? sums[i][r] : sums[i][r] + widen(bias[n + r]));
  }
}

template <int V, class T>
void dequantize_rows(const DequantizeBlock& block) {
  const Weight& weight = block.call->weight;
  const int64_t N = weight.out_features, K = weight.in_features, n = block.first + block.n;
  float tile[kTileRows * kTileColumns];
  for_runs<V>(weight, [&](int64_t group, int64_t first, int64_t last) {
    decode_tile<V>(weight, block.codebooks, n, block.rows, first, last, tile);
    for (int r = 0; r < block.rows; ++r) {
      const float scale = widen(static_cast<const T*>(weight.scales)[group * N + n + r]);
      T* to = static_cast<T*>(block.call->y) + (block.n + r) * K + first * V;
      for (int64_t k = 0; k < (last - first) * V; ++k) to[k] = narrow<T>(scale * tile[r * kTileColumns + k]);
    }
  });
}

}  // namespace

void gemm_block(const GemmBlock& block) {
  with_vector_length(block.call->weight.vector_length, [&](auto v) {
    with_type(block.call->weight.dtype, [&](auto type) { gemm_rows<decltype(v)::value, decltype(type)>(block); });
  });
}

void dequantize_block(const DequantizeBlock& block) {
  with_vector_length(block.call->weight.vector_length, [&](auto v) {
    with_type(block.call->weight.dtype, [&](auto type) { dequantize_rows<decltype(v)::value, decltype(type)>(block); });
  });
}

}  // namespace codegemm::cpu::portable
