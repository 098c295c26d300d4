// The psumbook product for AVX-512 with VBMI and VNNI. Tables hold integers of 7-bit digits, one plane of bytes a
// digit, so that a byte shuffle looks up 64 codes at once and two digits add up within a byte: entry = unit · (digits -
// half their range). Two planes (14 bits) serve fp16 and bf16, three (21 bits) fp32.
//
// Nothing here may come from a header that other files share by weak symbols: the linker could keep the AVX-512 version
// for all.
#include "cpu/psumbook.h"

#if defined(__AVX512VBMI__)
#include "cpu/vbmi.h"

namespace codegemm::cpu::vbmi {
namespace {

// How far ahead of the loop codes are fetched into the second-level cache, and then into the first. The hardware stops
// at page borders and keeps too few lines on their way; docs/log.md has the measurements.
constexpr int kAhead = 8192, kNear = 384;

struct Table {
  __m512i part[4];
};

inline Table load_table(const uint8_t* table) {
  Table result;
  for (int q = 0; q < 4; ++q) {
    result.part[q] = _mm512_load_si512(table + 64 * q);
    asm("" : "+v"(result.part[q]));
  }
  return result;
}

inline __m512i look(const Table& table, __m512i codes, __mmask64 upper) {
  return _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(table.part[0], codes, table.part[1]),
                                _mm512_permutex2var_epi8(table.part[2], codes, table.part[3]));
}

template <bool Full>
inline __m512i load_codes(const uint8_t* codes, __mmask64 rows) {
  __m512i result = Full ? _mm512_loadu_si512(codes) : _mm512_maskz_loadu_epi8(rows, codes);
  asm("" : "+v"(result));  // one load; GCC would load it again for every shuffle
  return result;
}

// Adds bytes to the 16-bit sums of even and odd rows.
inline void add(__m512i& even, __m512i& odd, __m512i bytes) {
  // A product with 0 and 1 and not a shift by 8, which would need one of the two ports that shuffle.
  even = _mm512_add_epi16(even, _mm512_and_si512(bytes, _mm512_set1_epi16(255)));
  odd = _mm512_add_epi16(odd, _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(256)));
}

// Adds 64 sums to y: four registers of 16 rows from digits of even and odd rows.
template <int Planes>
inline void flush(const LookUp& job, const __m512i (*digits)[2], int row) {
  const __m512i weights = _mm512_set1_epi32(128 << 16 | 1), top = _mm512_set1_epi32(1 << 14);
  const __m512i zero = _mm512_setzero_si512(), offset = _mm512_set1_epi32(job.lookups << (7 * Planes - 1));
  __m512i half[2][2];  // [even or odd rows][low or high half of 128 bits]
  for (int o = 0; o < 2; ++o) {
    const __m512i a = digits[0][o], b = digits[1][o];
    half[o][0] = _mm512_madd_epi16(_mm512_unpacklo_epi16(a, b), weights);
    half[o][1] = _mm512_madd_epi16(_mm512_unpackhi_epi16(a, b), weights);
    if (Planes == 3) {
      const __m512i c = digits[Planes - 1][o];
      half[o][0] = _mm512_add_epi32(half[o][0], _mm512_madd_epi16(_mm512_unpacklo_epi16(c, zero), top));
      half[o][1] = _mm512_add_epi32(half[o][1], _mm512_madd_epi16(_mm512_unpackhi_epi16(c, zero), top));
    }
  }
  // part[q] has rows 16l + 4q .. 16l + 4q + 3 in its l-th 128 bits.
  __m512i part[4];
  for (int h = 0; h < 2; ++h) {
    part[2 * h] = _mm512_unpacklo_epi32(half[0][h], half[1][h]);
    part[2 * h + 1] = _mm512_unpackhi_epi32(half[0][h], half[1][h]);
  }
  const __m512i a = _mm512_shuffle_i32x4(part[0], part[1], 0x44), b = _mm512_shuffle_i32x4(part[0], part[1], 0xee);
  const __m512i c = _mm512_shuffle_i32x4(part[2], part[3], 0x44), d = _mm512_shuffle_i32x4(part[2], part[3], 0xee);
  const __m512i sum[4] = {_mm512_shuffle_i32x4(a, c, 0x88), _mm512_shuffle_i32x4(a, c, 0xdd),
                          _mm512_shuffle_i32x4(b, d, 0x88), _mm512_shuffle_i32x4(b, d, 0xdd)};
  for (int k = 0; k < 4; ++k, row += 16) {
    const __m512 scale = load(job.scales, job.dtype, row, first(job.rows - row));
    const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum[k], offset)), _mm512_set1_ps(job.unit));
    _mm512_storeu_ps(job.sums + row, _mm512_fmadd_ps(value, scale, _mm512_loadu_ps(job.sums + row)));
  }
}

// Chunks of 64 rows of a tile. The loop is bound by the two ports that shuffle: 8 shuffles and 2 masks for 128 lookups
// of two digits. So both tables of a pair stay in registers, and the masks serve all planes.
template <int Planes, int Chunks, bool Full>
void look_up_chunks(const LookUp& job, int row) {
  constexpr int kTable = Planes * 256;
  __mmask64 rows[Chunks];
  __m512i even[Chunks][Planes], odd[Chunks][Planes];
#pragma GCC unroll 8
  for (int c = 0; c < Chunks; ++c) {
    const int left = job.rows - row - 64 * c;
    rows[c] = left >= 64 ? ~0ull : (1ull << left) - 1;
#pragma GCC unroll 8
    for (int p = 0; p < Planes; ++p) even[c][p] = odd[c][p] = _mm512_setzero_si512();
  }
  const uint8_t *codes = job.codes + row, *tables = job.tables;
  int l = 0;
#pragma GCC unroll 1
  for (; l + 2 <= job.lookups; l += 2, codes += 2 * job.rows, tables += 2 * kTable) {
#pragma GCC unroll 8
    for (int c = 0; c < 2 * Chunks; ++c) {
      _mm_prefetch(codes + kAhead + 64 * c, _MM_HINT_T1);
      _mm_prefetch(codes + kNear + 64 * c, _MM_HINT_T0);
    }
    __mmask64 upper[Chunks][2];
#pragma GCC unroll 8
    for (int p = 0; p < Planes; ++p) {
      const Table a = load_table(tables + p * 256), b = load_table(tables + kTable + p * 256);
#pragma GCC unroll 8
      for (int c = 0; c < Chunks; ++c) {
        const __m512i i = load_codes<Full>(codes + 64 * c, rows[c]);
        const __m512i j = load_codes<Full>(codes + job.rows + 64 * c, rows[c]);
        if (p == 0) {
          upper[c][0] = _mm512_movepi8_mask(i);
          upper[c][1] = _mm512_movepi8_mask(j);
        }
        add(even[c][p], odd[c][p], _mm512_add_epi8(look(a, i, upper[c][0]), look(b, j, upper[c][1])));
      }
    }
  }
  if (l < job.lookups) {
#pragma GCC unroll 8
    for (int p = 0; p < Planes; ++p) {
      const Table a = load_table(tables + p * 256);
#pragma GCC unroll 8
      for (int c = 0; c < Chunks; ++c) {
        const __m512i i = load_codes<Full>(codes + 64 * c, rows[c]);
        add(even[c][p], odd[c][p], look(a, i, _mm512_movepi8_mask(i)));
      }
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < Chunks; ++c) {
    __m512i digits[Planes][2];  // a copy: sums whose address is taken would live in memory
#pragma GCC unroll 8
    for (int p = 0; p < Planes; ++p) {
      digits[p][0] = even[c][p];
      digits[p][1] = odd[c][p];
    }
    flush<Planes>(job, digits, row + 64 * c);
  }
}

template <int Planes>
void look_up_planes(const LookUp& job) {
  if (job.rows == kTileRows) return look_up_chunks<Planes, 2, true>(job, 0);
  for (int row = 0; row < job.rows; row += 64) {
    if (job.rows - row >= 64) {
      look_up_chunks<Planes, 1, true>(job, row);
    } else {
      look_up_chunks<Planes, 1, false>(job, row);
    }
  }
}

void look_up(const LookUp& job) {
  if (job.dtype == DType::kFloat32) return look_up_planes<3>(job);
  look_up_planes<2>(job);
}

void write(const float* sums, int parts, int64_t stride, const void* bias, void* y, DType dtype, int64_t rows) {
  for (int64_t n = 0; n < rows; n += 16) {
    const __mmask16 some = first(rows - n);
    __m512 value = _mm512_loadu_ps(sums + n);
    for (int p = 1; p < parts; ++p) value = _mm512_add_ps(value, _mm512_loadu_ps(sums + p * stride + n));
    if (bias != nullptr) value = _mm512_add_ps(value, load(bias, dtype, n, some));
    if (dtype == DType::kFloat32) {
      _mm512_mask_storeu_ps(static_cast<float*>(y) + n, some, value);
      continue;
    }
    __m256i half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    if (dtype == DType::kBFloat16) {
      const __m512i bits = _mm512_castps_si512(value);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
      const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
      half = _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7fc0)));
    }
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + n, some, half);
  }
}

}  // namespace

const PsumbookKernel kPsumbook = {prepare, build, look_up, write, tile_block, kTableBytes, 64};

}  // namespace codegemm::cpu::vbmi
#endif
