// The psumbook product for AVX-512 with VBMI and VNNI. Tables hold integers of 7-bit digits, one plane of bytes a
// digit, so that a byte shuffle looks up 64 codes at once and two digits add up within a byte: entry = unit · (digits -
// half their range). Two planes (14 bits) serve fp16 and bf16, three (21 bits) fp32.
//
// Nothing here may come from a header that other files share by weak symbols: the linker could keep the AVX-512 version
// for all.
#include "cpu/psumbook.h"

#if defined(__AVX512VBMI__)
#include "cpu/bytes_vbmi.h"
#include "cpu/rows_vbmi.h"
#include "cpu/vbmi.h"

namespace codegemm::cpu::vbmi {
namespace {

// How far ahead of the loop codes are fetched into the second-level cache, and then into the first. The hardware stops
// at page borders and keeps too few lines on their way; docs/log.md has the measurements.
constexpr int kAhead = 8192, kNear = 384;

template <bool Full>
inline __m512i load_codes(const uint8_t* codes, __mmask64 rows) {
  return pinned(Full ? _mm512_loadu_si512(codes) : _mm512_maskz_loadu_epi8(rows, codes));
}

// Sums of bytes: of words of two rows modulo 2^16, and of the odd rows. Two instructions less than both apart.
struct Digits {
  __m512i words, odd;
};

inline void add(Digits& digits, __m512i bytes) {
  digits.words = _mm512_add_epi16(digits.words, bytes);
  // A product with 0 and 1 and not a shift by 8, which would need one of the two ports that shuffle.
  digits.odd = _mm512_add_epi16(digits.odd, _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(256)));
}

// Adds the sums of 64 rows to y, in the order of rows_vbmi.h.
template <int Planes>
inline void flush(const LookUp& job, const Digits* digits, int row) {
  const __m512i weights = _mm512_set1_epi32(128 << 16 | 1), top = _mm512_set1_epi32(1 << 14);
  const __m512i zero = _mm512_setzero_si512(), offset = _mm512_set1_epi32(-(job.lookups << (7 * Planes - 1)));
  __m512i words[3][2];  // [plane][even or odd rows]
  for (int p = 0; p < Planes; ++p) {
    words[p][0] = _mm512_sub_epi16(digits[p].words, _mm512_slli_epi16(digits[p].odd, 8));
    words[p][1] = digits[p].odd;
  }
  __m512 scales[4];
  load_rows(job.scales, job.dtype, row, job.rows - row, scales);
  for (int q = 0; q < 4; ++q) {
    const int o = q % 2;
    const __m512i a = words[0][o], b = words[1][o];
    const __m512i pairs = q < 2 ? _mm512_unpacklo_epi16(a, b) : _mm512_unpackhi_epi16(a, b);
    __m512i sum = _mm512_dpwssd_epi32(offset, pairs, weights);
    if (Planes == 3) {
      const __m512i c = words[2][o];
      sum = _mm512_dpwssd_epi32(sum, q < 2 ? _mm512_unpacklo_epi16(c, zero) : _mm512_unpackhi_epi16(c, zero), top);
    }
    const __m512 scale = _mm512_mul_ps(scales[q], _mm512_set1_ps(job.unit));
    float* to = job.sums + row + 16 * q;
    _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, _mm512_loadu_ps(to)));
  }
}

// Chunks of 64 rows of a tile. The loop is bound by the two ports that shuffle and by loads: 8 shuffles, 2 masks and 10
// loads for 128 lookups of two digits. So both tables of a pair and the codes of both chunks stay in registers.
template <int Planes, int Chunks, bool Full>
void look_up_chunks(const LookUp& job, int row) {
  constexpr int kTable = Planes * 256;
  __mmask64 rows[Chunks];
  Digits digits[Chunks][Planes];
#pragma GCC unroll 8
  for (int c = 0; c < Chunks; ++c) {
    const int left = job.rows - row - 64 * c;
    rows[c] = left >= 64 ? ~0ull : (1ull << left) - 1;
#pragma GCC unroll 8
    for (int p = 0; p < Planes; ++p) digits[c][p].words = digits[c][p].odd = _mm512_setzero_si512();
  }
  const uint8_t *codes = job.codes + row, *tables = job.tables;
  int l = 0;
#pragma GCC unroll 1
  for (; l + 2 <= job.lookups; l += 2, codes += 2 * job.rows, tables += 2 * kTable) {
    __m512i first[Chunks], second[Chunks];
    __mmask64 upper[Chunks][2];
#pragma GCC unroll 8
    for (int c = 0; c < Chunks; ++c) {
      for (int k = 0; k < 2; ++k) {
        _mm_prefetch(codes + kAhead + 128 * c + 64 * k, _MM_HINT_T1);
        _mm_prefetch(codes + kNear + 128 * c + 64 * k, _MM_HINT_T0);
      }
      first[c] = load_codes<Full>(codes + 64 * c, rows[c]);
      second[c] = load_codes<Full>(codes + job.rows + 64 * c, rows[c]);
      upper[c][0] = _mm512_movepi8_mask(first[c]);
      upper[c][1] = _mm512_movepi8_mask(second[c]);
    }
#pragma GCC unroll 8
    for (int p = 0; p < Planes; ++p) {
      const Bytes a = load_bytes(tables + p * 256), b = load_bytes(tables + kTable + p * 256);
#pragma GCC unroll 8
      for (int c = 0; c < Chunks; ++c) {
        add(digits[c][p], _mm512_add_epi8(look(a, first[c], upper[c][0]), look(b, second[c], upper[c][1])));
      }
    }
  }
  if (l < job.lookups) {
#pragma GCC unroll 8
    for (int p = 0; p < Planes; ++p) {
      const Bytes a = load_bytes(tables + p * 256);
#pragma GCC unroll 8
      for (int c = 0; c < Chunks; ++c) {
        const __m512i i = load_codes<Full>(codes + 64 * c, rows[c]);
        add(digits[c][p], look(a, i, _mm512_movepi8_mask(i)));
      }
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < Chunks; ++c) {
    Digits sums[Planes];  // a copy: sums whose address is taken would live in memory
#pragma GCC unroll 8
    for (int p = 0; p < Planes; ++p) sums[p] = digits[c][p];
    flush<Planes>(job, sums, row + 64 * c);
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
  for (int64_t n = 0; n < rows; n += 64) {
    __m512 values[4];
    for (int q = 0; q < 4; ++q) {
      values[q] = _mm512_loadu_ps(sums + n + 16 * q);
      for (int p = 1; p < parts; ++p) {
        values[q] = _mm512_add_ps(values[q], _mm512_loadu_ps(sums + p * stride + n + 16 * q));
      }
    }
    if (bias != nullptr) {
      __m512 added[4];
      load_rows(bias, dtype, n, rows - n, added);
      for (int q = 0; q < 4; ++q) values[q] = _mm512_add_ps(values[q], added[q]);
    }
    store_rows(y, dtype, n, rows - n, values);
  }
}

}  // namespace

const PsumbookKernel kPsumbook = {prepare, build, look_up, write, tile_block, kTableBytes, 1 << 30};

}  // namespace codegemm::cpu::vbmi
#endif
