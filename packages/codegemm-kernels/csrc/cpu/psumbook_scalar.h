// The psumbook product in plain C++: fp32 tables and one load a lookup. Included by psumbook_portable.cpp and
// psumbook_avx2.cpp, which compile it for their processors; internal linkage, see floats.h.
#pragma once
#include "cpu/floats.h"
#include "cpu/psumbook.h"

namespace codegemm::cpu {
namespace {

// Codebooks in fp32 as [m, v, 256].
inline void prepare(const Weight& weight, void* prepared) {
  float* to = static_cast<float*>(prepared);
  const int v = weight.vector_length;
  with_type(weight.dtype, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(weight.codebooks);
    for (int i = 0; i < weight.num_codebooks; ++i, from += 256 * v, to += 256 * v) {
      for (int e = 0; e < 256; ++e) {
        for (int t = 0; t < v; ++t) to[t * 256 + e] = widen(from[e * v + t]);
      }
    }
  });
}

inline void build(const BuildTables& job, Tables* tables) {
  const int v = job.weight->vector_length, m = job.weight->num_codebooks;
  float x[kTileLookups * 16];
  with_type(job.weight->dtype,
            [&](auto type) { widen_all(static_cast<const decltype(type)*>(job.x), job.positions * v, x); });
  float* table = reinterpret_cast<float*>(tables->memory);
  for (int l = 0; l < job.positions * m; ++l, table += 256) {
    const float* inputs = x + l / m * v;
    const float* book = static_cast<const float*>(job.prepared) + l % m * v * 256;
    for (int e = 0; e < 256; ++e) table[e] = book[e] * inputs[0];
    for (int t = 1; t < v; ++t) {
      for (int e = 0; e < 256; ++e) table[e] += book[t * 256 + e] * inputs[t];
    }
  }
  tables->passes = 1;
  tables->units[0] = 1;
}

inline void look_up(const LookUp& job) {
  const float* table = reinterpret_cast<const float*>(job.tables);
  const uint8_t* codes = job.codes;
  const int rows = job.rows;
  float sums[kTileRows] = {};
  int l = 0;
  for (; l + 4 <= job.lookups; l += 4, table += 4 * 256, codes += 4 * rows) {
    for (int r = 0; r < rows; ++r) {
      const float low = table[codes[r]] + table[256 + codes[rows + r]];
      const float high = table[512 + codes[2 * rows + r]] + table[768 + codes[3 * rows + r]];
      sums[r] += low + high;
    }
  }
  for (; l < job.lookups; ++l, table += 256, codes += rows) {
    for (int r = 0; r < rows; ++r) sums[r] += table[codes[r]];
  }
  with_type(job.dtype, [&](auto type) {
    const auto* scales = static_cast<const decltype(type)*>(job.scales);
    for (int r = 0; r < rows; ++r) job.sums[r] += sums[r] * widen(scales[r]);
  });
}

inline void write(const float* sums, int parts, int64_t stride, const void* bias, void* y, DType dtype, int64_t rows) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t n = 0; n < rows; ++n) {
      float sum = sums[n];
      for (int p = 1; p < parts; ++p) sum += sums[p * stride + n];
      if (bias != nullptr) sum += widen(static_cast<const T*>(bias)[n]);
      static_cast<T*>(y)[n] = narrow<T>(sum);
    }
  });
}

constexpr PsumbookKernel kScalar = {prepare, build, look_up, write, tile_block, 256 * sizeof(float), 4};

}  // namespace
}  // namespace codegemm::cpu
