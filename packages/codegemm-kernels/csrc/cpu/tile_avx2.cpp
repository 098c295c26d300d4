// The tile kernels for AVX2 with FMA and F16C. As in psumbook_avx512.cpp, nothing here may be shared by weak symbols.
#include "cpu/floats.h"
#include "cpu/runs.h"
#include "cpu/tile.h"

#if defined(__AVX2__)
#include <immintrin.h>

namespace codegemm::cpu::avx2 {
namespace {

// to[0 .. (last - first)·V) = the unscaled weights of row n, vector positions first .. last - 1.
template <int V>
inline void decode_run(const Weight& weight, const float* codebooks, int64_t n, int64_t first, int64_t last,
                       float* to) {
  const int64_t plane = weight.in_features / (4 * V) * weight.out_features;
  for (int64_t j = first; j < last; ++j, to += V) {
    const uint32_t* word = weight.codes + j / 4 * weight.out_features + n;
    const int shift = 8 * int(j % 4);
    const float* entry = codebooks + (*word >> shift & 255u) * V;
    if (V == 4) {
      __m128 sum = _mm_loadu_ps(entry);
      for (int i = 1; i < weight.num_codebooks; ++i) {
        sum = _mm_add_ps(sum, _mm_loadu_ps(codebooks + (i * 256 + (word[i * plane] >> shift & 255u)) * V));
      }
      _mm_storeu_ps(to, sum);
    } else {
      __m256 low = _mm256_loadu_ps(entry), high = _mm256_loadu_ps(entry + V - 8);
      for (int i = 1; i < weight.num_codebooks; ++i) {
        entry = codebooks + (i * 256 + (word[i * plane] >> shift & 255u)) * V;
        low = _mm256_add_ps(low, _mm256_loadu_ps(entry));
        if (V == 16) high = _mm256_add_ps(high, _mm256_loadu_ps(entry + 8));
      }
      _mm256_storeu_ps(to, low);
      if (V == 16) _mm256_storeu_ps(to + 8, high);
    }
  }
}

// The dot products of four tile rows with x; count is a multiple of 4.
inline __m128 dot_four(const float* tile, const float* x, int count) {
  __m256 sum[4];
  for (int r = 0; r < 4; ++r) sum[r] = _mm256_setzero_ps();
  int k = 0;
  for (; k + 8 <= count; k += 8) {
    const __m256 inputs = _mm256_loadu_ps(x + k);
    for (int r = 0; r < 4; ++r) sum[r] = _mm256_fmadd_ps(_mm256_loadu_ps(tile + r * kTileColumns + k), inputs, sum[r]);
  }
  __m128 half[4];
  for (int r = 0; r < 4; ++r) half[r] = _mm_add_ps(_mm256_castps256_ps128(sum[r]), _mm256_extractf128_ps(sum[r], 1));
  if (k < count) {
    const __m128 inputs = _mm_loadu_ps(x + k);
    for (int r = 0; r < 4; ++r) half[r] = _mm_fmadd_ps(_mm_loadu_ps(tile + r * kTileColumns + k), inputs, half[r]);
  }
  return _mm_hadd_ps(_mm_hadd_ps(half[0], half[1]), _mm_hadd_ps(half[2], half[3]));
}

template <int V, class T>
void gemm_rows(const GemmBlock& block) {
  const Gemm& call = *block.call;
  const Weight& weight = call.weight;
  const int64_t N = weight.out_features, K = weight.in_features, n = block.n;
  const int rows = block_rows(weight, n);
  alignas(32) float tile[kTileRows * kTileColumns], sums[kTokens][kTileRows];
  for (int i = 0; i < block.tokens; ++i) {
    for (int r = 0; r < kTileRows; ++r) sums[i][r] = 0;
  }
  for (int k = rows * kTileColumns; k < kTileRows * kTileColumns; ++k) tile[k] = 0;
  for_runs<V>(weight, [&](int64_t group, int64_t first, int64_t last) {
    float scales[kTileRows] = {};
    widen_all(static_cast<const T*>(weight.scales) + group * N + n, rows, scales);
    for (int r = 0; r < rows; ++r) decode_run<V>(weight, block.codebooks, n + r, first, last, tile + r * kTileColumns);
    for (int i = 0; i < block.tokens; ++i) {
      for (int r = 0; r < rows; r += 4) {
        const __m128 part = dot_four(tile + r * kTileColumns, block.x + i * K + first * V, int(last - first) * V);
        _mm_store_ps(sums[i] + r, _mm_fmadd_ps(part, _mm_loadu_ps(scales + r), _mm_load_ps(sums[i] + r)));
      }
    }
  });
  const T* bias = static_cast<const T*>(call.bias);
  for (int i = 0; i < block.tokens; ++i) {
    T* y = static_cast<T*>(call.y) + (block.token + i) * N + n;
    for (int r = 0; r < rows; ++r) y[r] = narrow<T>(bias == nullptr ? sums[i][r] : sums[i][r] + widen(bias[n + r]));
  }
}

inline void store_four(__m128 value, float* to) { _mm_storeu_ps(to, value); }

inline void store_four(__m128 value, Half* to) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

inline void store_four(__m128 value, BFloat16* to) {
  const __m128i bits = _mm_castps_si128(value), one = _mm_set1_epi32(1);
  const __m128i even = _mm_add_epi32(_mm_set1_epi32(0x7fff), _mm_and_si128(_mm_srli_epi32(bits, 16), one));
  const __m128i rounded = _mm_srli_epi32(_mm_add_epi32(bits, even), 16);
  const __m128i nan = _mm_castps_si128(_mm_cmpunord_ps(value, value));
  const __m128i result = _mm_blendv_epi8(rounded, _mm_set1_epi32(0x7fc0), nan);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi32(result, result));
}

template <int V, class T>
void dequantize_rows(const DequantizeBlock& block) {
  const Weight& weight = block.call->weight;
  const int64_t N = weight.out_features, K = weight.in_features;
  alignas(32) float run[kTileColumns];
  for_runs<V>(weight, [&](int64_t group, int64_t first, int64_t last) {
    for (int r = 0; r < block.rows; ++r) {
      const int64_t n = block.first + block.n + r;
      const __m128 scale = _mm_set1_ps(widen(static_cast<const T*>(weight.scales)[group * N + n]));
      decode_run<V>(weight, block.codebooks, n, first, last, run);
      T* to = static_cast<T*>(block.call->y) + (block.n + r) * K + first * V;
      for (int64_t k = 0; k < (last - first) * V; k += 4) store_four(_mm_mul_ps(_mm_load_ps(run + k), scale), to + k);
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

}  // namespace codegemm::cpu::avx2
#endif
