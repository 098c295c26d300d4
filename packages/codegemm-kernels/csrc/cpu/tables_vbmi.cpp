// The tables of the psumbook product for AVX-512 with VBMI and VNNI: integers of 7-bit digits, one plane of bytes a
// digit, as psumbook_vbmi.cpp reads them.
#include "cpu/psumbook.h"

#if defined(__AVX512VBMI__)
#include "cpu/vbmi.h"

namespace codegemm::cpu::vbmi {
namespace {

constexpr float kTiny = 1e-30f;  // inputs below are taken for zero: the inverse of a table's unit would overflow

inline __m512 magnitude(__m512 value) { return _mm512_abs_ps(value); }

// The largest of magnitudes, as bits, so that a NaN is larger than every number.
inline float largest(__m512i bits) {
  return _mm512_cvtss_f32(from_bits(_mm512_set1_epi32(int(_mm512_reduce_max_epu32(bits)))));
}

inline bool is_finite(float magnitude) { return magnitude <= 3.4028235e38f; }

// --- Codebooks -------------------------------------------------------------------------------------------------------

// Codebooks in fp32 as [m, v, 256]; returns the largest magnitude, for fp16 and bf16.
float widen(const Weight& weight, float* to) {
  const bool wide = weight.dtype == DType::kFloat32;
  const int v = weight.vector_length;
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i peak = _mm512_setzero_si512();
  for (int i = 0; i < weight.num_codebooks; ++i) {
    for (int block = 0; block < 16; ++block) {
      const __m512i entry = _mm512_add_epi32(lane, _mm512_set1_epi32(i * 256 + block * 16));
      const __m512i at = _mm512_mullo_epi32(entry, _mm512_set1_epi32(v));
      float* column = to + i * v * 256 + block * 16;
      for (int t = 0; t < v; t += wide ? 1 : 2) {
        if (wide) {
          const __m512 value = _mm512_i32gather_ps(at, static_cast<const float*>(weight.codebooks) + t, 4);
          _mm512_storeu_ps(column + t * 256, value);
          continue;
        }
        const __m512i pair = _mm512_i32gather_epi32(at, static_cast<const uint16_t*>(weight.codebooks) + t, 2);
        __m512 low = from_bits(_mm512_slli_epi32(pair, 16));
        __m512 high = from_bits(_mm512_and_si512(pair, _mm512_set1_epi32(int(0xffff0000))));
        if (weight.dtype == DType::kFloat16) {
          low = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pair));
          high = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pair, 16)));
        }
        _mm512_storeu_ps(column + t * 256, low);
        _mm512_storeu_ps(column + t * 256 + 256, high);
        const __m512i sizes =
            _mm512_max_epu32(_mm512_castps_si512(magnitude(low)), _mm512_castps_si512(magnitude(high)));
        peak = _mm512_max_epu32(peak, sizes);
      }
    }
  }
  return largest(peak);
}

// For fp16 and bf16: a header of 16 floats, of which the first is the unit of the integers, then pairs of 16-bit
// integers [m, v/2, 256], then fp32 [m, v, 256]. The longest entry has length kLength, so by Cauchy and Schwarz the
// product with an input vector of the same length stays below 2^30.
constexpr float kLength = 32700;

}  // namespace

void prepare(const Weight& weight, void* prepared) {
  float* header = static_cast<float*>(prepared);
  if (weight.dtype == DType::kFloat32) {
    widen(weight, header);
    return;
  }
  const int m = weight.num_codebooks, v = weight.vector_length;
  float* wide = header + 16 + m * v / 2 * 256;
  const float peak = widen(weight, wide);
  const float shrink = peak > kTiny && is_finite(peak) ? 1 / peak : 0;
  __m512 longest = _mm512_setzero_ps();
  for (int i = 0; i < m; ++i) {
    for (int block = 0; block < 256; block += 16) {
      __m512 square = _mm512_setzero_ps();
      for (int t = 0; t < v; ++t) {
        const __m512 value = _mm512_mul_ps(_mm512_load_ps(wide + (i * v + t) * 256 + block), _mm512_set1_ps(shrink));
        square = _mm512_fmadd_ps(value, value, square);
      }
      longest = _mm512_max_ps(longest, square);
    }
  }
  const float length = peak * __builtin_sqrtf(_mm512_reduce_max_ps(longest));
  header[0] = is_finite(peak) ? length / kLength : __builtin_nanf("");
  const __m512 factor = _mm512_set1_ps(shrink == 0 ? 0 : kLength / length);
  int32_t* pairs = reinterpret_cast<int32_t*>(header + 16);
  for (int k = 0; k < m * v / 2 * 256; k += 16) {
    const float* even = wide + k / 256 * 512 + k % 256;
    const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(even), factor));
    const __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(even + 256), factor));
    _mm512_storeu_si512(pairs + k, _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16)));
  }
}

namespace {

// --- Tables ----------------------------------------------------------------------------------------------------------

// Two planes of 64 entries from sums of 31 bits: the digits are bits 24 to 30 and 17 to 23.
inline void store_digits(const __m512i* sum, uint8_t* table) {
  const __m512i lane =
      _mm512_setr_epi32(0x0c080400, 0x1c181410, 0x2c282420, 0x3c383430, 0x4c484440, 0x5c585450, 0x6c686460, 0x7c787470,
                        0x0c080400, 0x1c181410, 0x2c282420, 0x3c383430, 0x4c484440, 0x5c585450, 0x6c686460, 0x7c787470);
  const __m512i top = _mm512_inserti64x4(_mm512_set1_epi8(2), _mm256_set1_epi8(3), 0);
  const __m512i pick = _mm512_or_si512(lane, top);  // the high bytes of 32 dwords, then the bytes below
  const __m512i a = _mm512_permutex2var_epi8(sum[0], pick, sum[1]), b = _mm512_permutex2var_epi8(sum[2], pick, sum[3]);
  const __m512i low = _mm512_srli_epi16(_mm512_shuffle_i64x2(a, b, 0xee), 1);
  _mm512_store_si512(table, _mm512_and_si512(low, _mm512_set1_epi8(127)));
  _mm512_store_si512(table + 256, _mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1));
}

// Tables of a segment's positions from pairs of inputs [positions, Pairs]. Positions are the inner loop, so that the
// entries of 64 lanes are loaded once, up to vectors of 8.
template <int Pairs>
void build_integers(const BuildTables& job, const int32_t* x, uint8_t* tables) {
  const int m = job.weight->num_codebooks;
  const int32_t* books = reinterpret_cast<const int32_t*>(static_cast<const float*>(job.prepared) + 16);
  const __m512i middle = _mm512_set1_epi32((1 << 30) + (1 << 16));  // half the range, and rounding
  for (int i = 0; i < m; ++i) {
    for (int block = 0; block < 256; block += 64) {
      __m512i book[Pairs][4];
#pragma GCC unroll 8
      for (int t = 0; t < Pairs; ++t) {
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) book[t][q] = _mm512_loadu_si512(books + (i * Pairs + t) * 256 + block + 16 * q);
      }
#pragma GCC unroll 1
      for (int p = 0; p < job.positions; ++p) {
        __m512i sum[4] = {middle, middle, middle, middle};
#pragma GCC unroll 8
        for (int t = 0; t < Pairs; ++t) {
          const __m512i input = _mm512_set1_epi32(x[p * Pairs + t]);
#pragma GCC unroll 4
          for (int q = 0; q < 4; ++q) sum[q] = _mm512_dpwssd_epi32(sum[q], book[t][q], input);
        }
        store_digits(sum, tables + (p * m + i) * 512 + block);
      }
    }
  }
}

// Tables of the positions that `large` names, in two parts: in the unit of the first pass, and what that leaves over in
// the unit of the second, so that such an input is worth 28 bits.
void build_large(const BuildTables& job, const float* x, uint32_t large, const float* units, uint8_t* tables,
                 uint8_t* rests) {
  const int m = job.weight->num_codebooks, v = job.weight->vector_length;
  const float* books = static_cast<const float*>(job.prepared) + 16 + m * v / 2 * 256;
  const __m512 unit = _mm512_set1_ps(units[0]), inverse = _mm512_set1_ps(1 / units[0]);
  const __m512 rest_inverse = _mm512_set1_ps(1 / units[1]);
  const __m512i half = _mm512_set1_epi32(1 << 13);
  for (int l = 0; l < job.positions * m; ++l) {
    if ((large >> l / m & 1) == 0) continue;
    for (int block = 0; block < 256; block += 64) {
      __m512i whole[4], rest[4];
      for (int q = 0; q < 4; ++q) {
        __m512 sum = _mm512_setzero_ps();
        for (int t = 0; t < v; ++t) {
          const float* column = books + (l % m * v + t) * 256 + block + 16 * q;
          sum = _mm512_fmadd_ps(_mm512_load_ps(column), _mm512_set1_ps(x[l / m * v + t]), sum);
        }
        whole[q] = _mm512_cvtps_epi32(_mm512_mul_ps(sum, inverse));
        rest[q] =
            _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_fnmadd_ps(_mm512_cvtepi32_ps(whole[q]), unit, sum), rest_inverse));
        whole[q] = _mm512_slli_epi32(_mm512_add_epi32(whole[q], half), 17);
        rest[q] = _mm512_slli_epi32(_mm512_add_epi32(rest[q], half), 17);
      }
      store_digits(whole, tables + l * 512 + block);
      store_digits(rest, rests + l * 512 + block);
    }
  }
}

// Fills `tables` for fp16 and bf16. Positions are sorted into large ones, longer than 1/8 of the longest, and others:
// if the large ones are fewer than a quarter, as in layers with massive activations, the unit would be too coarse for
// the others, so they get a pass and a unit of their own.
void build_narrow(const BuildTables& job, Tables* tables) {
  const Weight& weight = *job.weight;
  const int v = weight.vector_length, count = job.positions * v;
  alignas(64) float x[kTileLookups * 16];
  __m512i peak_bits = _mm512_setzero_si512();
  for (int k = 0; k < count; k += 16) {
    const __m512 value = load(job.x, weight.dtype, k, first(count - k));
    peak_bits = _mm512_max_epu32(peak_bits, _mm512_castps_si512(magnitude(value)));
    _mm512_store_ps(x + k, value);
  }
  const float peak = largest(peak_bits), shrink = peak > kTiny && is_finite(peak) ? 1 / peak : 0;
  float squares[kTileLookups], longest = 0, longest_other = 0;
  for (int p = 0; p < job.positions; ++p) {
    float square = 0;
    for (int t = 0; t < v; ++t) square += (x[p * v + t] * shrink) * (x[p * v + t] * shrink);
    squares[p] = square;
    longest = square > longest ? square : longest;
  }
  uint32_t large = 0;
  for (int p = 0; p < job.positions; ++p) {
    if (squares[p] * 64 > longest) {
      large |= 1u << p;
    } else {
      longest_other = squares[p] > longest_other ? squares[p] : longest_other;
    }
  }
  const float entry_unit = static_cast<const float*>(job.prepared)[0];
  const bool split =
      longest_other > 0 && peak > 1e-20f && entry_unit > 0 && 4 * __builtin_popcount(large) < job.positions;
  tables->passes = split ? 2 : 1;
  // What a large input leaves over is at most half a unit of the first pass, and must fit 2^13 units of the second.
  const float shortest = longest / (16000.f * 16000.f);
  const float lengths[2] = {longest, longest_other > shortest ? longest_other : shortest};
  uint8_t* last = tables->memory;
  for (int pass = 0; pass < tables->passes; ++pass, last += job.positions * weight.num_codebooks * kTableBytes) {
    const float length = peak * __builtin_sqrtf(lengths[pass]), factor = length > kTiny ? kLength / length : 0;
    tables->units[pass] = !is_finite(length) ? __builtin_nanf("") : entry_unit * (factor == 0 ? 0 : (1 << 17) / factor);
    alignas(64) int32_t pairs[kTileLookups * 8];
    for (int k = 0; k < count; k += 16) {
      const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(x + k), _mm512_set1_ps(factor)));
      _mm256_store_si256(reinterpret_cast<__m256i*>(pairs + k / 2), _mm512_cvtsepi32_epi16(rounded));
    }
    if (split) {  // the large ones are not among these: build_large makes their tables, and the first pass has no
                  // others
      for (int k = 0; k < count / 2; ++k) pairs[k] = pass == 0 || (large >> (2 * k / v) & 1) ? 0 : pairs[k];
    }
    if (v == 4) build_integers<2>(job, pairs, last);
    if (v == 8) build_integers<4>(job, pairs, last);
    if (v == 16) build_integers<8>(job, pairs, last);
  }
  if (split) {
    build_large(job, x, large, tables->units, tables->memory,
                tables->memory + job.positions * weight.num_codebooks * kTableBytes);
  }
}

// Fills `tables` for fp32, with three planes.
void build_wide(const BuildTables& job, Tables* tables) {
  const int m = job.weight->num_codebooks, v = job.weight->vector_length, lookups = job.positions * m;
  alignas(64) float sums[kTileLookups][256];
  __m512i peak = _mm512_setzero_si512();
  for (int l = 0; l < lookups; ++l) {
    const float* x = static_cast<const float*>(job.x) + l / m * v;
    const float* book = static_cast<const float*>(job.prepared) + l % m * v * 256;
    for (int q = 0; q < 16; ++q) {
      __m512 sum = _mm512_setzero_ps();
      for (int t = 0; t < v; ++t) {
        sum = _mm512_fmadd_ps(_mm512_loadu_ps(book + t * 256 + 16 * q), _mm512_set1_ps(x[t]), sum);
      }
      peak = _mm512_max_epu32(peak, _mm512_castps_si512(magnitude(sum)));
      _mm512_store_ps(sums[l] + 16 * q, sum);
    }
  }
  constexpr int kHalf = 1 << 20;
  const float size = largest(peak), inverse = is_finite(size) && size > kTiny ? float(kHalf - 1) / size : 0;
  tables->passes = 1;
  tables->units[0] = !is_finite(size) ? __builtin_nanf("") : inverse == 0 ? 0 : size / float(kHalf - 1);
  const __m512i digit = _mm512_set1_epi32(127);
  for (int l = 0; l < lookups; ++l) {
    for (int block = 0; block < 256; block += 64) {
      __m512i value[4];
      for (int q = 0; q < 4; ++q) {
        const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(sums[l] + block + 16 * q), _mm512_set1_ps(inverse));
        value[q] = _mm512_add_epi32(_mm512_cvtps_epi32(scaled), _mm512_set1_epi32(kHalf));
      }
      for (int plane = 0; plane < 3; ++plane) {
        __m512i digits[4];
        for (int q = 0; q < 4; ++q) digits[q] = _mm512_and_si512(_mm512_srli_epi32(value[q], 7 * plane), digit);
        for (int q = 0; q < 4; ++q) {
          _mm_store_si128(reinterpret_cast<__m128i*>(tables->memory + (l * 3 + plane) * 256 + block + 16 * q),
                          _mm512_cvtepi32_epi8(digits[q]));
        }
      }
    }
  }
}

}  // namespace

void build(const BuildTables& job, Tables* tables) {
  if (job.weight->dtype == DType::kFloat32) {
    build_wide(job, tables);
  } else {
    build_narrow(job, tables);
  }
}

}  // namespace codegemm::cpu::vbmi
#endif
