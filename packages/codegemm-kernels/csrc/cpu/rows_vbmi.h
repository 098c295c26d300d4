// The order of the fp32 sums of 64 rows in four registers, as 16-bit digits of even and odd rows unpack to it: of the
// 32 pairs of rows, registers 0 and 1 have the even and odd rows of pairs 8q .. 8q + 3 in the q-th 128 bits, registers
// 2 and 3 those of pairs 8q + 4 .. 8q + 7. Rows in this order need no shuffles while they are summed.
// Internal linkage, see floats.h.
#pragma once
#include "cpu/avx512.h"

namespace codegemm::cpu {
namespace {

inline __mmask32 first32(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }

inline __m512 widen_low(__m512i pairs, DType dtype) {
  if (dtype == DType::kFloat16) return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
  return from_bits(_mm512_slli_epi32(pairs, 16));
}

inline __m512 widen_high(__m512i pairs, DType dtype) {
  if (dtype == DType::kFloat16) return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
  return from_bits(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
}

// Values of a stored dtype of 64 rows, of which `left` are there, in fp32.
inline void load_rows(const void* values, DType dtype, int64_t at, int64_t left, __m512* rows) {
  if (dtype == DType::kFloat32) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    __m512 in_order[4], half[2][2];
    for (int k = 0; k < 4; ++k) in_order[k] = load(values, dtype, at + 16 * k, first(left - 16 * k));
    for (int k = 0; k < 2; ++k) {
      half[k][0] = _mm512_permutex2var_ps(in_order[2 * k], even, in_order[2 * k + 1]);
      half[k][1] = _mm512_permutex2var_ps(in_order[2 * k], odd, in_order[2 * k + 1]);
    }
    for (int o = 0; o < 2; ++o) {
      rows[o] = _mm512_shuffle_f32x4(half[0][o], half[1][o], 0x88);
      rows[2 + o] = _mm512_shuffle_f32x4(half[0][o], half[1][o], 0xdd);
    }
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(values) + at;
  const __m512i a = _mm512_maskz_loadu_epi16(first32(left), from);
  const __m512i b = _mm512_maskz_loadu_epi16(first32(left - 32), from + 32);
  const __m512i pairs[2] = {_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd)};
  for (int h = 0; h < 2; ++h) {
    rows[2 * h] = widen_low(pairs[h], dtype);
    rows[2 * h + 1] = widen_high(pairs[h], dtype);
  }
}

// The reverse of load_rows: rounds and stores 64 rows, or as many as are left.
inline void store_rows(void* y, DType dtype, int64_t at, int64_t left, const __m512* rows) {
  // Lanes of (first, second) half of the 128-bit pieces, back in order.
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  if (dtype == DType::kFloat32) {
    float* to = static_cast<float*>(y) + at;
    for (int k = 0; k < 4; ++k) {
      const __m512i pieces = k < 2 ? low : high;
      const __m512d even = _mm512_permutex2var_pd(_mm512_castps_pd(rows[0]), pieces, _mm512_castps_pd(rows[2]));
      const __m512d odd = _mm512_permutex2var_pd(_mm512_castps_pd(rows[1]), pieces, _mm512_castps_pd(rows[3]));
      const __m512i merge = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      const __m512i part = _mm512_add_epi32(merge, _mm512_set1_epi32(k % 2 * 8));
      _mm512_mask_storeu_ps(to + 16 * k, first(left - 16 * k),
                            _mm512_permutex2var_ps(_mm512_castpd_ps(even), part, _mm512_castpd_ps(odd)));
    }
    return;
  }
  __m512i pairs[2];
  for (int h = 0; h < 2; ++h) {
    const __m512i odd = _mm512_slli_epi32(narrow_bits(rows[2 * h + 1], dtype), 16);
    pairs[h] = _mm512_or_si512(narrow_bits(rows[2 * h], dtype), odd);
  }
  uint16_t* to = static_cast<uint16_t*>(y) + at;
  _mm512_mask_storeu_epi16(to, first32(left), _mm512_permutex2var_epi64(pairs[0], low, pairs[1]));
  _mm512_mask_storeu_epi16(to + 32, first32(left - 32), _mm512_permutex2var_epi64(pairs[0], high, pairs[1]));
}

}  // namespace
}  // namespace codegemm::cpu
