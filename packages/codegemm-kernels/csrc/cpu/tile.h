// Dequantise a small tile, then multiply: the kernel for any scheme, any shape and any row count, in portable C++ that
// the compiler vectorises. Internal linkage (see floats.h).
#pragma once
#include <algorithm>
#include <cstddef>
#include <vector>

#include "codegemm.h"
#include "cpu/floats.h"
#include "cpu/pool.h"

namespace codegemm::cpu {
namespace {

constexpr int kTileRows = 16;      // rows of W in a tile: their words are one cache line
constexpr int kTileColumns = 256;  // 16 x 256 fp32 weights are 16 KB, half of a first-level cache
constexpr int kTokens = 64;        // rows of x handled per decoded tile

// The codebooks in fp32, [m, 256, v].
inline std::vector<float> wide_codebooks(const Weight& weight) {
  std::vector<float> wide(size_t(weight.num_codebooks) * 256 * weight.vector_length);
  with_type(weight.dtype, [&](auto type) {
    widen_all(static_cast<const decltype(type)*>(weight.codebooks), int64_t(wide.size()), wide.data());
  });
  return wide;
}

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
    }
    for (int i = 1; i < weight.num_codebooks; ++i) {
      for (int r = 0; r < rows; ++r) {
        float* to = column + r * kTileColumns;
        const float* entry = codebooks + (i * 256 + (words[i * plane + r] >> shift & 255u)) * V;
        for (int t = 0; t < V; ++t) to[t] += entry[t];
      }
    }
  }
}

// Calls f(group, first, last) for runs of vector positions that share a scale and fit a tile.
template <int V, class F>
void for_runs(const Weight& weight, F&& f) {
  const int64_t group = weight.in_features / V / weight.num_groups;
  for (int64_t g = 0; g < weight.num_groups; ++g) {
    for (int64_t j = g * group; j < (g + 1) * group; j += kTileColumns / V) {
      f(g, j, std::min<int64_t>(j + kTileColumns / V, (g + 1) * group));
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

// One tile row of outputs: y[0 .. tokens)[n .. n + rows), from x in fp32 [tokens, K].
template <int V, class T>
void gemm_rows(const Gemm& call, const float* codebooks, const float* x, int64_t token, int tokens, int64_t n) {
  const Weight& weight = call.weight;
  const int64_t N = weight.out_features, K = weight.in_features;
  const int rows = int(std::min<int64_t>(kTileRows, N - n));
  alignas(64) float tile[kTileRows * kTileColumns];
  alignas(64) float sums[kTokens][kTileRows] = {};
  for_runs<V>(weight, [&](int64_t group, int64_t first, int64_t last) {
    decode_tile<V>(weight, codebooks, n, rows, first, last, tile);
    float scales[kTileRows];
    widen_all(static_cast<const T*>(weight.scales) + group * N + n, rows, scales);
    for (int i = 0; i < tokens; ++i) {
      const float* inputs = x + i * K + first * V;
      for (int r = 0; r < rows; ++r) {
        sums[i][r] += scales[r] * dot<V>(tile + r * kTileColumns, inputs, (last - first) * V);
      }
    }
  });
  const T* bias = static_cast<const T*>(call.bias);
  T* y = static_cast<T*>(call.y);
  for (int i = 0; i < tokens; ++i) {
    for (int r = 0; r < rows; ++r) {
      y[(token + i) * N + n + r] = narrow<T>(bias == nullptr ? sums[i][r] : sums[i][r] + widen(bias[n + r]));
    }
  }
}

template <int V>
void gemm_by_tiles(const Gemm& call, int threads) {
  const Weight& weight = call.weight;
  const int64_t K = weight.in_features;
  const std::vector<float> codebooks = wide_codebooks(weight);
  std::vector<float> x(size_t(std::min<int64_t>(kTokens, call.rows)) * K);
  with_type(weight.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t token = 0; token < call.rows; token += kTokens) {
      const int tokens = int(std::min<int64_t>(kTokens, call.rows - token));
      for (int i = 0; i < tokens; ++i) {
        widen_all(static_cast<const T*>(call.x) + (token + i) * call.x_row_stride, K, x.data() + i * K);
      }
      parallel_for((weight.out_features + kTileRows - 1) / kTileRows, threads, [&](int64_t block) {
        gemm_rows<V, T>(call, codebooks.data(), x.data(), token, tokens, block * kTileRows);
      });
    }
  });
}

template <int V>
void dequantize_by_tiles(const Dequantize& call, int threads) {
  const Weight& weight = call.weight;
  const int64_t N = weight.out_features, K = weight.in_features;
  const std::vector<float> codebooks = wide_codebooks(weight);
  with_type(weight.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for((N + kTileRows - 1) / kTileRows, threads, [&](int64_t block) {
      const int64_t n = block * kTileRows;
      const int rows = int(std::min<int64_t>(kTileRows, N - n));
      alignas(64) float tile[kTileRows * kTileColumns];
      for_runs<V>(weight, [&](int64_t group, int64_t first, int64_t last) {
        decode_tile<V>(weight, codebooks.data(), n, rows, first, last, tile);
        for (int r = 0; r < rows; ++r) {
          const float scale = widen(static_cast<const T*>(weight.scales)[group * N + n + r]);
          T* to = static_cast<T*>(call.y) + (n + r) * K + first * V;
          for (int64_t k = 0; k < (last - first) * V; ++k) to[k] = narrow<T>(scale * tile[r * kTileColumns + k]);
        }
      });
    });
  });
}

// Calls f with the vector length as a compile-time constant.
template <class F>
void with_vector_length(int vector_length, F&& f) {
  if (vector_length == 4) return f(std::integral_constant<int, 4>{});
  if (vector_length == 8) return f(std::integral_constant<int, 8>{});
  return f(std::integral_constant<int, 16>{});
}

}  // namespace
}  // namespace codegemm::cpu
