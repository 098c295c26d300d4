// The product for many rows of x for AVX-512 with VBMI and VNNI: sums of 16-bit products, two in a lane.
//
// A block of W has kColumns rows in lanes. Register j of four has rows 16q + 4j .. 16q + 4j + 3 in its q-th 128 bits,
// as bytes of two weights unpack to it.
#include "cpu/many_rows.h"

#if defined(__AVX512VBMI__)
#include "cpu/avx512.h"
#include "cpu/bytes_vbmi.h"
#include "cpu/floats.h"

namespace codegemm::cpu::vbmi {
namespace {

constexpr float kInputLength = 32000, kWeightLength = 66000;  // of the integers of a block; their product fits 31 bits
constexpr int kRowsAtOnce = 6;                                // with four registers of sums each

// 4 x 4 transposition of 128 bits: 64 rows in order to the order above, and back.
inline void transpose(__m512* rows) {
  const __m512 a = _mm512_shuffle_f32x4(rows[0], rows[1], 0x44), b = _mm512_shuffle_f32x4(rows[0], rows[1], 0xee);
  const __m512 c = _mm512_shuffle_f32x4(rows[2], rows[3], 0x44), d = _mm512_shuffle_f32x4(rows[2], rows[3], 0xee);
  rows[0] = _mm512_shuffle_f32x4(a, c, 0x88);
  rows[1] = _mm512_shuffle_f32x4(a, c, 0xdd);
  rows[2] = _mm512_shuffle_f32x4(b, d, 0x88);
  rows[3] = _mm512_shuffle_f32x4(b, d, 0xdd);
}

struct DecodeBlock {
  const uint8_t* codes;  // of the first position and column
  int64_t tile_rows;     // from lookup to lookup
  __mmask64 columns;
  int positions, vector_length, num_codebooks;
  const uint8_t* books;
  __m512i* block;  // [pairs of inputs, 4]
};

// One pair of elements of all positions' vectors, with the tables in registers; Add: to what other codebooks gave.
template <bool Add>
void decode_pair(const DecodeBlock& job, const uint8_t* codes, const uint8_t* book, __m512i* to) {
  const Bytes low0 = load_bytes(book), high0 = load_bytes(book + 256);
  const Bytes low1 = load_bytes(book + 512), high1 = load_bytes(book + 768);
  const int64_t step = job.num_codebooks * job.tile_rows, pairs = job.vector_length / 2;
  for (int p = 0; p < job.positions; ++p, codes += step, to += 4 * pairs) {
    const __m512i code = pinned(_mm512_maskz_loadu_epi8(job.columns, codes));
    const __mmask64 upper = _mm512_movepi8_mask(code);
    const __m512i l0 = look(low0, code, upper), h0 = look(high0, code, upper);
    const __m512i l1 = look(low1, code, upper), h1 = look(high1, code, upper);
    const __m512i a0 = _mm512_unpacklo_epi8(l0, h0), a1 = _mm512_unpacklo_epi8(l1, h1);
    const __m512i b0 = _mm512_unpackhi_epi8(l0, h0), b1 = _mm512_unpackhi_epi8(l1, h1);
    const __m512i part[4] = {_mm512_unpacklo_epi16(a0, a1), _mm512_unpackhi_epi16(a0, a1),
                             _mm512_unpacklo_epi16(b0, b1), _mm512_unpackhi_epi16(b0, b1)};
    for (int j = 0; j < 4; ++j) _mm512_store_si512(to + j, Add ? _mm512_add_epi16(to[j], part[j]) : part[j]);
  }
}

void decode(const DecodeBlock& job) {
  for (int i = 0; i < job.num_codebooks; ++i) {
    for (int t = 0; t < job.vector_length; t += 2) {
      const uint8_t* book = job.books + (i * job.vector_length + t) * 512;
      const uint8_t* codes = job.codes + i * job.tile_rows;
      if (i == 0) {
        decode_pair<false>(job, codes, book, job.block + 2 * t);
      } else {
        decode_pair<true>(job, codes, book, job.block + 2 * t);
      }
    }
  }
}

struct MultiplyBlock {
  const __m512i* block;
  int pairs;
  const int16_t* x;  // [rows, kBlockWidth]
  const float* units;
  __m512 scales[4];
  float* sums;  // [rows, kColumns]
};

inline void add_scaled(const MultiplyBlock& job, int64_t row, int j, __m512i sum) {
  float* to = job.sums + row * kColumns + 16 * j;
  const __m512 scale = _mm512_mul_ps(job.scales[j], _mm512_set1_ps(job.units[row]));
  _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, _mm512_load_ps(to)));
}

// Not inlined, and sums pinned once more at the end: else GCC stores every sum after every step.
template <int Rows>
__attribute__((noinline)) void multiply_rows(const MultiplyBlock& job, int64_t row) {
  const __m512i* weights = job.block;
  const int32_t* x = reinterpret_cast<const int32_t*>(job.x) + row * (kBlockWidth / 2);
  for (int k = 0; k < Rows * kBlockWidth; k += 32) {  // the rows after these: for a large K they are not in the L2
    _mm_prefetch(job.x + (row + Rows) * kBlockWidth + k, _MM_HINT_T0);
  }
  __m512i sum[Rows][4];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_setzero_si512();
  }
#pragma GCC unroll 1
  for (int k = 0; k < job.pairs; ++k, weights += 4, ++x) {
    const __m512i a = pinned(weights[0]), b = pinned(weights[1]), c = pinned(weights[2]), d = pinned(weights[3]);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const __m512i input = pinned(_mm512_set1_epi32(x[r * (kBlockWidth / 2)]));
      sum[r][0] = _mm512_dpwssd_epi32(sum[r][0], a, input);
      sum[r][1] = _mm512_dpwssd_epi32(sum[r][1], b, input);
      sum[r][2] = _mm512_dpwssd_epi32(sum[r][2], c, input);
      sum[r][3] = _mm512_dpwssd_epi32(sum[r][3], d, input);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) add_scaled(job, row + r, j, pinned(sum[r][j]));
  }
}

void multiply_block(const MultiplyBlock& job, int64_t rows) {
  int64_t row = 0;
  for (; row + kRowsAtOnce <= rows; row += kRowsAtOnce) multiply_rows<kRowsAtOnce>(job, row);
  for (; row + 3 <= rows; row += 3) multiply_rows<3>(job, row);
  for (; row < rows; ++row) multiply_rows<1>(job, row);
}

// Size of the inputs of a block in one row, zeros beside them.
struct Sizes {
  float peak, length;
};

Sizes measure(const float* x) {
  __m512i peak_bits = _mm512_setzero_si512();
  for (int k = 0; k < kBlockWidth; k += 16) {
    peak_bits = _mm512_max_epu32(peak_bits, _mm512_castps_si512(_mm512_abs_ps(_mm512_load_ps(x + k))));
  }
  // As bits, so that a NaN is larger than every number.
  const __m512i widest = _mm512_set1_epi32(int(_mm512_reduce_max_epu32(peak_bits)));
  const float peak = _mm512_cvtss_f32(from_bits(widest));
  if (!(peak <= 3.4028235e38f)) return {peak, __builtin_nanf("")};
  if (peak < 1e-30f) return {peak, 0};
  __m512 square = _mm512_setzero_ps();
  for (int k = 0; k < kBlockWidth; k += 16) {
    const __m512 value = _mm512_mul_ps(_mm512_load_ps(x + k), _mm512_set1_ps(1 / peak));
    square = _mm512_fmadd_ps(value, value, square);
  }
  return {peak, peak * __builtin_sqrtf(_mm512_reduce_add_ps(square))};
}

// Rounds the inputs of a block to integers of length kInputLength and returns their unit; x becomes what is left over.
float round_inputs(float* x, float length, int16_t* to) {
  const float unit = length / kInputLength, inverse = unit > 1e-35f ? 1 / unit : 0;
  for (int k = 0; k < kBlockWidth; k += 16) {
    const __m512 value = _mm512_load_ps(x + k);
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(value, _mm512_set1_ps(inverse)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), _mm512_cvtsepi32_epi16(rounded));
    _mm512_store_ps(x + k, _mm512_fnmadd_ps(_mm512_cvtepi32_ps(rounded), _mm512_set1_ps(unit), value));
  }
  return unit;
}

// Whether the inputs below 1/16 of the largest have on average fewer than 96 steps, so that rounding would cost them
// more than 0.3 %. Of ordinary rows of 14336 normal inputs one in 70 meets that, with 128 steps one in 6.
bool drowns(const float* x, Sizes sizes) {
  __m512 others = _mm512_setzero_ps();
  int count = 0;
  for (int k = 0; k < kBlockWidth; k += 16) {
    const __m512 size = _mm512_abs_ps(_mm512_load_ps(x + k));
    const __mmask16 there = _mm512_cmp_ps_mask(size, _mm512_setzero_ps(), _CMP_GT_OQ);
    const __mmask16 small = _mm512_mask_cmp_ps_mask(there, size, _mm512_set1_ps(sizes.peak / 16), _CMP_LT_OQ);
    others = _mm512_mask_add_ps(others, small, others, size);
    count += __builtin_popcount(small);
  }
  return _mm512_reduce_add_ps(others) < 96 / kInputLength * sizes.length * float(count);
}

}  // namespace

void prepare_books(const Weight& weight, IntegerBooks* books) {
  const int v = weight.vector_length, entries = weight.num_codebooks * 256;
  float length = 0, peak = 0, whole = 0;
  with_type(weight.dtype, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(weight.codebooks);
    for (int e = 0; e < entries * v; ++e) {
      const float value = widen(from[e]);
      peak = value > peak ? value : -value > peak ? -value : peak;
      whole += value * 0;  // NaN once an entry is not finite
    }
    const float shrink = peak > 1e-30f && whole == 0 ? 1 / peak : 0;  // so that squares of the longest are near 1
    for (int i = 0; i < weight.num_codebooks; ++i) {
      float longest = 0;
      for (int e = 0; e < 256; ++e) {
        float square = 0;
        for (int t = 0; t < v; ++t) {
          const float value = widen(from[(i * 256 + e) * v + t]) * shrink;
          square += value * value;
        }
        longest = square > longest ? square : longest;
      }
      length += __builtin_sqrtf(longest);
    }
    const float limit = kWeightLength / __builtin_sqrtf(float(kBlockWidth / v));
    const float inverse = shrink == 0 ? 0 : limit / length * shrink;
    books->unit = inverse == 0 ? whole : 1 / inverse;
    for (int e = 0; e < entries; ++e) {
      for (int t = 0; t < v; ++t) {
        const float scaled = inverse == 0 ? 0 : widen(from[e * v + t]) * inverse;
        const uint16_t bits = uint16_t(int(scaled + (scaled < 0 ? -0.5f : 0.5f)));
        uint8_t* table = books->bytes + (e / 256 * v + t) * 512 + e % 256;
        table[0] = uint8_t(bits);
        table[256] = uint8_t(bits >> 8);
      }
    }
  });
}

void to_integers(const Gemm& call, const Blocks& blocks, int64_t row, int64_t at, const IntegerRows& to) {
  const int element = call.weight.dtype == DType::kFloat32 ? 4 : 2;
  const char* from = static_cast<const char*>(call.x) + row * call.x_row_stride * element;
  to.has_rest[at] = 0;
  for (int64_t block = 0; block < blocks.count(); ++block) {
    const int count = blocks.positions(block) * call.weight.vector_length;
    if (count <= 0) continue;
    alignas(64) float x[kBlockWidth];
    for (int k = 0; k < kBlockWidth; k += 16) {
      _mm512_store_ps(x + k, load(from, call.weight.dtype, blocks.first_input(block) + k, first(count - k)));
    }
    const int64_t place = block * to.stride + at;
    const Sizes sizes = measure(x);
    const bool rest = drowns(x, sizes);
    to.units[place] = round_inputs(x, sizes.length, to.values + place * kBlockWidth);
    // Where nothing is left over the unit is zero and the integers can be anything.
    to.rest_units[place] = rest ? round_inputs(x, measure(x).length, to.rests + place * kBlockWidth) : 0;
    to.has_rest[at] |= rest;
  }
}

void multiply_columns(const Columns& job) {
  const Gemm& call = *job.call;
  const Weight& weight = call.weight;
  const Tiling& tiling = job.blocks->tiling();
  const int64_t columns = weight.out_features - job.n, tile = job.n / kTileRows, column = job.n % kTileRows;
  __m512i* block = static_cast<__m512i*>(job.memory);
  float* sums = reinterpret_cast<float*>(block + kBlockWidth / 2 * 4);
  uint8_t* scratch = reinterpret_cast<uint8_t*>(sums + kChunkRows * kColumns);
  __builtin_memset(sums, 0, size_t(job.rows * kColumns) * sizeof(float));
  const __mmask64 some = columns >= 64 ? ~0ull : (1ull << columns) - 1;
  for (int64_t k = 0; k < job.blocks->count(); ++k) {
    const int positions = job.blocks->positions(k), tile_rows = tiling.rows(tile);
    if (positions <= 0) continue;
    const int64_t segment = job.blocks->segment(k);
    const uint8_t* codes = reinterpret_cast<const uint8_t*>(weight.codes) + tiling.offset(segment, tile);
    if (!weight.tiled) {
      tile_block(weight, tiling, segment, tile, scratch);
      codes = scratch;
    }
    codes += int64_t(job.blocks->offset(k)) * weight.num_codebooks * tile_rows + column;
    decode({codes, tile_rows, some, positions, weight.vector_length, weight.num_codebooks, job.books->bytes, block});
    const int64_t place = k * job.x->stride;
    MultiplyBlock product = {
        block, positions * weight.vector_length / 2, job.x->values + place * kBlockWidth, job.x->units + place, {},
        sums};
    const int64_t at = tiling.group(segment) * weight.out_features + job.n;
    for (int q = 0; q < 4; ++q) {
      const __m512 scale = load(weight.scales, weight.dtype, at + 16 * q, first(columns - 16 * q));
      product.scales[q] = _mm512_mul_ps(scale, _mm512_set1_ps(job.books->unit));
    }
    transpose(product.scales);
    multiply_block(product, job.rows);
    product.x = job.x->rests + place * kBlockWidth;
    product.units = job.x->rest_units + place;
    for (int64_t row = 0; row < job.rows; ++row) {
      if (job.x->has_rest[row]) multiply_rows<1>(product, row);
    }
  }
  for (int64_t row = 0; row < job.rows; ++row) {
    __m512 y[4];
    for (int j = 0; j < 4; ++j) y[j] = _mm512_load_ps(sums + row * kColumns + 16 * j);
    transpose(y);
    const int64_t at = (job.first_row + row) * weight.out_features + job.n;
    for (int q = 0; q < 4; ++q) {
      const __mmask16 there = first(columns - 16 * q);
      if (call.bias != nullptr) y[q] = _mm512_add_ps(y[q], load(call.bias, weight.dtype, job.n + 16 * q, there));
      store(y[q], call.y, weight.dtype, at + 16 * q, there);
    }
  }
}

}  // namespace codegemm::cpu::vbmi
#endif
