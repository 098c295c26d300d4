// Shared by the files for AVX-512; internal linkage, see floats.h.
#pragma once
#include <immintrin.h>

#include "codegemm.h"

namespace codegemm::cpu {
namespace {

inline __m512 from_bits(__m512i bits) { return _mm512_castsi512_ps(bits); }

// Sixteen floats of a stored dtype, in fp32.
inline __m512 load(const void* values, DType dtype, int64_t at, __mmask16 some) {
  if (dtype == DType::kFloat32) return _mm512_maskz_loadu_ps(some, static_cast<const float*>(values) + at);
  const __m256i half = _mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(values) + at);
  if (dtype == DType::kFloat16) return _mm512_cvtph_ps(half);
  return from_bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// The 16 bits of a stored dtype in the low half of each lane.
inline __m512i narrow_bits(__m512 value, DType dtype) {
  if (dtype == DType::kFloat16) {
    return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7fc0));
}

// Rounds sixteen floats to a stored dtype.
inline void store(__m512 value, void* values, DType dtype, int64_t at, __mmask16 some) {
  if (dtype == DType::kFloat32) return _mm512_mask_storeu_ps(static_cast<float*>(values) + at, some, value);
  const __m256i half = _mm512_cvtepi32_epi16(narrow_bits(value, dtype));
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(values) + at, some, half);
}

inline __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : __mmask16((1 << count) - 1); }

}  // namespace
}  // namespace codegemm::cpu
