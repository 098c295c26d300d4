// The psumbook product for AVX-512 with VBMI. Tables hold integers of 7-bit digits, one plane of bytes a digit, so that
// a byte shuffle looks up 64 codes at once and two digits add up within a byte: entry = unit · (digits - half their
// range). Two planes (14 bits) serve fp16 and bf16, three (21 bits) fp32 and any segment where one input stands out so
// far that 14 bits would leave the others too few. A unit is zero for inputs of zero and NaN where an entry is not
// finite.
//
// Nothing here may come from a header that other files
// share by weak symbols: the linker could keep the AVX-512 version for all.
#include "cpu/psumbook.h"

#if defined(__AVX512VBMI__)
#include <immintrin.h>

namespace codegemm::cpu::avx512 {
namespace {

constexpr int kMaxPlanes = 3;
constexpr int kMaxLookups = 32;  // of a row in a segment; 256 would overflow its sums
constexpr int kMaxChunks = kMaxBlockRows / kChunkRows;

// Bytes of the digits of 64 entries, from four registers of 16 entries each; see place.
template <int Planes>
inline void store_digits(const __m512i* value, uint8_t* table) {
  const __m512i low = _mm512_set1_epi32(0x3fff), seven = _mm512_set1_epi16(127);
  __m512i words[2];
  for (int h = 0; h < 2; ++h) {
    words[h] = Planes == 2
                   ? _mm512_packus_epi32(value[2 * h], value[2 * h + 1])
                   : _mm512_packus_epi32(_mm512_and_si512(value[2 * h], low), _mm512_and_si512(value[2 * h + 1], low));
  }
  _mm512_store_si512(table, _mm512_packus_epi16(_mm512_and_si512(words[0], seven), _mm512_and_si512(words[1], seven)));
  _mm512_store_si512(table + 256, _mm512_packus_epi16(_mm512_srli_epi16(words[0], 7), _mm512_srli_epi16(words[1], 7)));
  if (Planes == 3) {
    __m512i top[2];
    for (int h = 0; h < 2; ++h) {
      top[h] = _mm512_packus_epi32(_mm512_srli_epi32(value[2 * h], 14), _mm512_srli_epi32(value[2 * h + 1], 14));
    }
    _mm512_store_si512(table + 512, _mm512_packus_epi16(top[0], top[1]));
  }
}

// Whether one input is more than 16 times the mean magnitude of the segment's. Up to there 14 bits keep the error of a
// segment of 128 inputs under about 1e-4 of sum |w||x|; for normally distributed inputs the ratio is about 3.5.
bool has_outlier(const float* x, int count) {
  __m512 peak = _mm512_setzero_ps(), total = _mm512_setzero_ps();
  for (int k = 0; k < count; k += 16) {
    const __m512 size = _mm512_abs_ps(_mm512_loadu_ps(x + k));
    peak = _mm512_max_ps(peak, size);
    total = _mm512_add_ps(total, size);
  }
  return _mm512_reduce_max_ps(peak) * float(count) > 16 * _mm512_reduce_add_ps(total);
}

// Fills sums with the dot products of every lookup; returns the bits of the largest magnitude, compared as integers so
// that a NaN is larger than every number.
uint32_t dot_products(const SegmentTables& job, float (*sums)[256]) {
  const int v = job.vector_length, m = job.num_codebooks, lookups = job.words * m * 4;
  __m512i peak = _mm512_setzero_si512();
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int l = 0; l < lookups; ++l) {
    const float* x = job.x + (l / (4 * m) * 4 + l % 4) * v;
    const float* book = job.codebooks + l / 4 % m * v * 256;
    __m512 sum[16];
    const __m512 first = _mm512_set1_ps(x[0]);
    for (int q = 0; q < 16; ++q) sum[q] = _mm512_mul_ps(_mm512_load_ps(book + 16 * q), first);
    for (int t = 1; t < v; ++t) {
      const __m512 input = _mm512_set1_ps(x[t]);
      for (int q = 0; q < 16; ++q) sum[q] = _mm512_fmadd_ps(_mm512_load_ps(book + t * 256 + 16 * q), input, sum[q]);
    }
    for (int q = 0; q < 16; ++q) {
      peak = _mm512_max_epu32(peak, _mm512_and_si512(_mm512_castps_si512(sum[q]), magnitude));
      _mm512_store_ps(sums[l] + 16 * q, sum[q]);
    }
  }
  return _mm512_reduce_max_epu32(peak);
}

template <int Planes>
void quantize(const SegmentTables& job, const float (*sums)[256], uint32_t bits) {
  const int lookups = job.words * job.num_codebooks * 4;
  const float largest = _mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_set1_epi32(int(bits))));
  constexpr int kOffset = 1 << (7 * Planes - 1);
  float inverse = 0;
  if (bits >= 0x7f800000u) {
    *job.unit = {__builtin_nanf(""), Planes};
  } else if (largest < 1e-30f) {  // its inverse would overflow
    *job.unit = {0, Planes};
  } else {
    *job.unit = {largest / float(kOffset - 1), Planes};
    inverse = float(kOffset - 1) / largest;
  }
  const __m512 factor = _mm512_set1_ps(inverse);
  const __m512i offset = _mm512_set1_epi32(kOffset);
  for (int l = 0; l < lookups; ++l) {
    for (int block = 0; block < 4; ++block) {
      __m512i value[4];
      for (int q = 0; q < 4; ++q) {
        const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(sums[l] + 64 * block + 16 * q), factor);
        value[q] = _mm512_add_epi32(_mm512_cvtps_epi32(scaled), offset);
      }
      store_digits<Planes>(value, job.tables + l * Planes * 256 + block * 64);
    }
  }
}

// 64 rows x 4 positions: out[p] holds in lane l, dword k, byte b the code of row 16k + 4l + b at position p.
template <bool Full>
inline void transpose(const uint32_t* words, const __mmask16* rows, __m512i* out, int out_stride) {
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m512i a[4];
  for (int k = 0; k < 4; ++k) {
    const __m512i loaded =
        Full ? _mm512_loadu_si512(words + 16 * k) : _mm512_maskz_loadu_epi32(rows[k], words + 16 * k);
    a[k] = _mm512_shuffle_epi8(loaded, order);
  }
  const __m512i t0 = _mm512_unpacklo_epi32(a[0], a[1]), t1 = _mm512_unpacklo_epi32(a[2], a[3]);
  const __m512i t2 = _mm512_unpackhi_epi32(a[0], a[1]), t3 = _mm512_unpackhi_epi32(a[2], a[3]);
  out[0] = _mm512_unpacklo_epi64(t0, t1);
  out[out_stride] = _mm512_unpackhi_epi64(t0, t1);
  out[2 * out_stride] = _mm512_unpacklo_epi64(t2, t3);
  out[3 * out_stride] = _mm512_unpackhi_epi64(t2, t3);
}

// Sixteen floats of a stored dtype, in fp32.
inline __m512 load(const void* values, DType dtype, int64_t at, __mmask16 rows) {
  if (dtype == DType::kFloat32) return _mm512_maskz_loadu_ps(rows, static_cast<const float*>(values) + at);
  const __m256i half = _mm256_maskz_loadu_epi16(rows, static_cast<const uint16_t*>(values) + at);
  if (dtype == DType::kFloat16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// The four sums of 16 rows from the digit sums of even and odd bytes.
template <int Planes>
inline void combine(const __m512i* digits, __m512i* sum) {
  const __m512i weights = _mm512_set1_epi32(128 << 16 | 1), top = _mm512_set1_epi32(1 << 14),
                zero = _mm512_setzero_si512();
  __m512i part[2][2];  // [even or odd byte][low or high half of a lane]
  for (int o = 0; o < 2; ++o) {
    part[o][0] = _mm512_madd_epi16(_mm512_unpacklo_epi16(digits[o], digits[2 + o]), weights);
    part[o][1] = _mm512_madd_epi16(_mm512_unpackhi_epi16(digits[o], digits[2 + o]), weights);
    if (Planes == 3) {
      const __m512i third = digits[4 + o];
      part[o][0] = _mm512_add_epi32(part[o][0], _mm512_madd_epi16(_mm512_unpacklo_epi16(third, zero), top));
      part[o][1] = _mm512_add_epi32(part[o][1], _mm512_madd_epi16(_mm512_unpackhi_epi16(third, zero), top));
    }
  }
  for (int h = 0; h < 2; ++h) {
    sum[2 * h] = _mm512_unpacklo_epi32(part[0][h], part[1][h]);
    sum[2 * h + 1] = _mm512_unpackhi_epi32(part[0][h], part[1][h]);
  }
}

// Adds the digits of two lookups for every row. The loop is bound by the two ports that shuffle: 8 shuffles and 2
// masks for 128 lookups of two digits. So both tables stay in registers, and the masks serve all planes.
template <int Planes>
inline void add_pair(const uint8_t* tables, const __m512i* first, const __m512i* second, __m512i* digits, int chunks,
                     const uint32_t* ahead) {
  // A product with 0 and 1 and not a shift by 8, which would need a shuffle port.
  const __m512i bytes = _mm512_set1_epi16(255), upper = _mm512_set1_epi16(256);
  __m512i a[Planes][4], b[Planes][4];
  for (int plane = 0; plane < Planes; ++plane) {
    for (int q = 0; q < 4; ++q) {
      a[plane][q] = _mm512_load_si512(tables + plane * 256 + 64 * q);
      b[plane][q] = _mm512_load_si512(tables + (Planes + plane) * 256 + 64 * q);
    }
  }
#pragma GCC unroll 1
  for (int c = 0; c < chunks; ++c, digits += 2 * Planes) {
    __m512i i = first[c], j = second[c];
    _mm_prefetch(reinterpret_cast<const char*>(ahead + 64 * c), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(ahead + 64 * c + 16), _MM_HINT_T0);
    asm("" : "+v"(i), "+v"(j));  // one load each; GCC would load them again for every shuffle
    const __mmask64 upper_i = _mm512_movepi8_mask(i), upper_j = _mm512_movepi8_mask(j);
    for (int plane = 0; plane < Planes; ++plane) {
      const __m512i x = _mm512_mask_blend_epi8(upper_i, _mm512_permutex2var_epi8(a[plane][0], i, a[plane][1]),
                                               _mm512_permutex2var_epi8(a[plane][2], i, a[plane][3]));
      const __m512i y = _mm512_mask_blend_epi8(upper_j, _mm512_permutex2var_epi8(b[plane][0], j, b[plane][1]),
                                               _mm512_permutex2var_epi8(b[plane][2], j, b[plane][3]));
      const __m512i pair = _mm512_add_epi8(x, y);  // two 7-bit digits fill a byte
      digits[2 * plane] = _mm512_add_epi16(digits[2 * plane], _mm512_and_si512(pair, bytes));
      digits[2 * plane + 1] = _mm512_add_epi16(digits[2 * plane + 1], _mm512_maddubs_epi16(pair, upper));
    }
  }
}

// Adds a segment's sums of one token to its outputs.
template <int Planes>
void flush(const SegmentLookups& job, const __m512i* digits, const __mmask16* masks, int chunks, int token) {
  const int lookups = job.words * job.num_codebooks * 4;
  const __m512i offset = _mm512_set1_epi32(lookups << (7 * Planes - 1));
  const __m512 unit = _mm512_set1_ps(job.units[token * job.unit_stride].unit);
  float* sums = job.sums + token * job.sum_stride;
  for (int c = 0; c < chunks; ++c) {
    __m512i sum[4];
    combine<Planes>(digits + c * 2 * Planes, sum);
    for (int k = 0; k < 4; ++k) {
      const int at = 64 * c + 16 * k;
      const __m512 scale = load(job.scales, job.dtype, at, masks[4 * c + k]);
      const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum[k], offset)), unit);
      _mm512_storeu_ps(sums + at, _mm512_fmadd_ps(part, scale, _mm512_loadu_ps(sums + at)));
    }
  }
}

void build_tables(const SegmentTables& job) {
  alignas(64) float sums[kMaxLookups][256];
  const uint32_t largest = dot_products(job, sums);
  if (job.dtype == DType::kFloat32 || has_outlier(job.x, job.words * 4 * job.vector_length)) {
    quantize<3>(job, sums, largest);
  } else {
    quantize<2>(job, sums, largest);
  }
}

void add_lookups(const SegmentLookups& job) {
  const int chunks = (job.rows + kChunkRows - 1) / kChunkRows, m = job.num_codebooks;
  const int token_digits = chunks * 2 * kMaxPlanes;
  __mmask16 masks[kMaxChunks * 4];
  for (int k = 0; k < chunks * 4; ++k) {
    const int left = job.rows - 16 * k;
    masks[k] = left >= 16 ? 0xffff : left <= 0 ? 0 : __mmask16((1 << left) - 1);
  }
  __m512i digits[kMaxTokens * kMaxChunks * 2 * kMaxPlanes];
  for (int d = 0; d < job.tokens * token_digits; ++d) digits[d] = _mm512_setzero_si512();
  for (int step = 0; step < job.words * m; ++step) {
    const int w = step / m, i = step % m;
    const uint32_t* words = job.codes + w * job.word_stride + i * job.plane_stride;
    __m512i codes[4][kMaxChunks];
    for (int c = 0; c < chunks; ++c) {
      if (masks[4 * c + 3] == 0xffff) {
        transpose<true>(words + 64 * c, masks + 4 * c, &codes[0][c], kMaxChunks);
      } else {
        transpose<false>(words + 64 * c, masks + 4 * c, &codes[0][c], kMaxChunks);
      }
    }
    for (int token = 0; token < job.tokens; ++token) {
      __m512i* sums = digits + token * token_digits;
      const int planes = job.units[token * job.unit_stride].planes;
      const uint8_t* tables = job.tables + token * job.table_stride + step * 4 * planes * 256;
      for (int p = 0; p < 4; p += 2, tables += 2 * planes * 256) {
        // The words of the next step lie a whole row of words away, too far for the hardware to foresee. Half of them
        // are fetched in each pass; past the end of the matrix a prefetch does nothing.
        const uint32_t* ahead = words + job.word_stride + 16 * p;
        if (planes == 3) {
          add_pair<3>(tables, codes[p], codes[p + 1], sums, chunks, ahead);
        } else {
          add_pair<2>(tables, codes[p], codes[p + 1], sums, chunks, ahead);
        }
      }
    }
  }
  for (int token = 0; token < job.tokens; ++token) {
    if (job.units[token * job.unit_stride].planes == 3) {
      flush<3>(job, digits + token * token_digits, masks, chunks, token);
    } else {
      flush<2>(job, digits + token * token_digits, masks, chunks, token);
    }
  }
}

void write_outputs(const float* sums, const void* bias, void* y, DType dtype, int64_t rows) {
  for (int64_t n = 0; n < rows; n += 16) {
    const __mmask16 mask = rows - n >= 16 ? 0xffff : __mmask16((1 << (rows - n)) - 1);
    __m512 value = _mm512_loadu_ps(sums + n);
    if (bias != nullptr) value = _mm512_add_ps(value, load(bias, dtype, n, mask));
    if (dtype == DType::kFloat32) {
      _mm512_mask_storeu_ps(static_cast<float*>(y) + n, mask, value);
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
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + n, mask, half);
  }
}

// Packing 32-bit lanes to bytes interleaves within 128 bits, so entries are laid out for it.
int place(int e) { return (e & ~63) | (e & 12) << 2 | (e & 48) >> 2 | (e & 3); }

}  // namespace

const PsumbookKernel kPsumbook = {build_tables, add_lookups, write_outputs, place, kMaxPlanes * 256, kMaxLookups};

}  // namespace codegemm::cpu::avx512
#endif
