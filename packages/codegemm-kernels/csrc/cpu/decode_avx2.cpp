// For AVX2 with FMA and F16C; also what AVX-512 processors use. As in psumbook_vbmi.cpp, nothing here may be shared by
// weak symbols.
#include "cpu/decode.h"
#include "cpu/floats.h"

#if defined(__AVX2__)
#include <immintrin.h>

namespace codegemm::cpu::avx2 {
namespace {

inline void store(__m256 value, float* to) { _mm256_storeu_ps(to, value); }

inline void store(__m256 value, Half* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

inline void store(__m256 value, BFloat16* to) {
  const __m256i bits = _mm256_castps_si256(value), one = _mm256_set1_epi32(1);
  const __m256i even = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(_mm256_srli_epi32(bits, 16), one));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, even), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}

// The sum of the entries of eight weights: one vector, a part of one, or two of length 4 (whose codes are a position
// apart).
template <int V>
inline __m256 entries(const DecodeTile& job, const uint8_t* code, int part) {
  const int m = job.weight->num_codebooks, step = m * job.tile_rows;
  __m256 sum = _mm256_setzero_ps();
  for (int i = 0; i < m; ++i, code += job.tile_rows) {
    const float* book = job.codebooks + i * 256 * V;
    if (V == 4) {
      const __m128 low = _mm_loadu_ps(book + *code * 4), high = _mm_loadu_ps(book + code[step] * 4);
      sum = _mm256_add_ps(sum, _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1));
    } else {
      sum = _mm256_add_ps(sum, _mm256_loadu_ps(book + *code * V + part));
    }
  }
  return sum;
}

template <int V, class T>
void decode_rows(const DecodeTile& job) {
  constexpr int kPositions = V == 4 ? 2 : 1;  // eight weights or more at a time
  const int step = job.weight->num_codebooks * job.tile_rows;
  for (int r = job.first; r < job.last; ++r) {
    const float scale = widen(static_cast<const T*>(job.scales)[r]);
    T* to = static_cast<T*>(job.y) + (r - job.first) * job.weight->in_features;
    const uint8_t* code = job.codes + r;
    int p = 0;
    for (; p + kPositions <= job.positions; p += kPositions, code += kPositions * step) {
      for (int part = 0; part < kPositions * V; part += 8, to += 8) {
        store(_mm256_mul_ps(entries<V>(job, code, part), _mm256_set1_ps(scale)), to);
      }
    }
    if (p == job.positions) continue;
    float sum[4] = {};  // an odd position of length 4
    for (int i = 0; i < job.weight->num_codebooks; ++i) {
      for (int t = 0; t < 4; ++t) sum[t] += job.codebooks[(i * 256 + code[i * job.tile_rows]) * 4 + t];
    }
    for (int t = 0; t < 4; ++t) to[t] = narrow<T>(scale * sum[t]);
  }
}

}  // namespace

void decode_tile(const DecodeTile& job) {
  with_vector_length(job.weight->vector_length, [&](auto v) {
    with_type(job.weight->dtype, [&](auto type) { decode_rows<decltype(v)::value, decltype(type)>(job); });
  });
}

}  // namespace codegemm::cpu::avx2
#endif
