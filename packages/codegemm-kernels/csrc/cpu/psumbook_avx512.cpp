// The psumbook product for AVX-512 without VBMI: tables of 16-bit integers, four shuffles of words for 32 codes.
#include "cpu/psumbook.h"

#if defined(__AVX512BW__)
#include <cstring>

#include "cpu/avx512.h"
#include "cpu/integer_tables.h"

namespace codegemm::cpu::avx512 {
namespace {

constexpr int kTableBytes = 256 * sizeof(int16_t);

void build(const BuildTables& job, Tables* tables) {
  build_integers(job, tables, kTableBytes,
                 [](const int16_t* entries, uint8_t* table) { std::memcpy(table, entries, kTableBytes); });
}

inline __m512i look(const __m512i* table, __m512i codes) {
  const __mmask32 odd = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(64));
  const __mmask32 upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(128));
  __m512i part[4];
  for (int q = 0; q < 4; ++q) part[q] = _mm512_permutex2var_epi16(table[2 * q], codes, table[2 * q + 1]);
  return _mm512_mask_blend_epi16(upper, _mm512_mask_blend_epi16(odd, part[0], part[1]),
                                 _mm512_mask_blend_epi16(odd, part[2], part[3]));
}

// Adds the lookups of 32 rows or fewer; four entries fit 16 bits.
void look_up_rows(const LookUp& job, int row) {
  const int left = job.rows - row;
  const __mmask32 rows = left >= 32 ? ~0u : (1u << left) - 1;
  const uint8_t *codes = job.codes + row, *tables = job.tables;
  __m512i even = _mm512_setzero_si512(), odd = even;  // of rows 0, 2, 4 ... and 1, 3, 5 ...
  for (int l = 0; l < job.lookups; l += 4) {
    __m512i sum = _mm512_setzero_si512();
    const int end = job.lookups - l < 4 ? job.lookups - l : 4;
    for (int k = 0; k < end; ++k, codes += job.rows, tables += kTableBytes) {
      _mm_prefetch(codes + 2048, _MM_HINT_T0);
      __m512i table[8];
      for (int q = 0; q < 8; ++q) table[q] = _mm512_loadu_si512(tables + 64 * q);
      sum = _mm512_add_epi16(sum, look(table, _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(rows, codes))));
    }
    even = _mm512_add_epi32(even, _mm512_srai_epi32(_mm512_slli_epi32(sum, 16), 16));
    odd = _mm512_add_epi32(odd, _mm512_srai_epi32(sum, 16));
  }
  const __m512i lower = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i both[2] = {_mm512_permutex2var_epi32(even, lower, odd),
                           _mm512_permutex2var_epi32(even, _mm512_add_epi32(lower, _mm512_set1_epi32(8)), odd)};
  for (int h = 0; h < 2; ++h) {
    const int at = row + 16 * h;
    const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(both[h]), _mm512_set1_ps(job.unit));
    const __m512 scale = load(job.scales, job.dtype, at, first(job.rows - at));
    _mm512_storeu_ps(job.sums + at, _mm512_fmadd_ps(value, scale, _mm512_loadu_ps(job.sums + at)));
  }
}

void look_up(const LookUp& job) {
  for (int row = 0; row < job.rows; row += 32) look_up_rows(job, row);
}

}  // namespace

const PsumbookKernel kPsumbook = {prepare, build, look_up, write, tile_block, kTableBytes, 32};

}  // namespace codegemm::cpu::avx512
#endif
