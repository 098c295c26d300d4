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

inline __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : __mmask16((1 << count) - 1); }

}  // namespace
}  // namespace codegemm::cpu
