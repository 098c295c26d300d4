// Tables of 14-bit integers, for instruction sets that look up by shuffling; in plain C++ that compilers vectorise.
// Included by files that are compiled for different processors; internal linkage, see floats.h.
#pragma once
#include "cpu/psumbook_scalar.h"

namespace codegemm::cpu {
namespace {

constexpr float kHalfRange = 8191;  // of an entry; four of them add up in 16 bits
constexpr float kFiner = 8192;      // what the second pass adds for fp32 and for inputs with outliers

inline int16_t rounded(float value) { return int16_t(int32_t(value + (value < 0 ? -0.5f : 0.5f))); }

// Whether one input is more than 16 times the mean magnitude of the segment's: 14 bits would leave the others too few.
inline bool has_outlier(const float* x, int count) {
  float peak = 0, total = 0;
  for (int k = 0; k < count; ++k) {
    const float size = x[k] < 0 ? -x[k] : x[k];
    peak = size > peak ? size : peak;
    total += size;
  }
  return peak * float(count) > 16 * total;
}

// Fills tables as int16 [lookups, 256] in the order of the codebooks; store(entries, table) puts 256 of them in place.
template <class Store>
inline void build_integers(const BuildTables& job, Tables* tables, int table_bytes, Store&& store) {
  const Weight& weight = *job.weight;
  const int v = weight.vector_length, m = weight.num_codebooks, lookups = job.positions * m;
  float x[kTileLookups * 16], sums[kTileLookups][256], peak = 0, whole = 0;
  with_type(weight.dtype,
            [&](auto type) { widen_all(static_cast<const decltype(type)*>(job.x), job.positions * v, x); });
  for (int l = 0; l < lookups; ++l) {
    const float *inputs = x + l / m * v, *book = static_cast<const float*>(job.prepared) + l % m * v * 256;
    for (int e = 0; e < 256; ++e) sums[l][e] = book[e] * inputs[0];
    for (int t = 1; t < v; ++t) {
      for (int e = 0; e < 256; ++e) sums[l][e] += book[t * 256 + e] * inputs[t];
    }
    for (int e = 0; e < 256; ++e) {
      const float size = sums[l][e] < 0 ? -sums[l][e] : sums[l][e];
      peak = size > peak ? size : peak;
      whole += sums[l][e] * 0;  // NaN once an entry is not finite; a maximum would lose it
    }
  }
  const float unit = peak > 1e-30f ? peak / kHalfRange : 0, inverse = unit > 0 && whole == 0 ? 1 / unit : 0;
  tables->passes = weight.dtype == DType::kFloat32 || has_outlier(x, job.positions * v) ? 2 : 1;
  tables->units[0] = unit + whole;
  tables->units[1] = unit / kFiner + whole;
  for (int l = 0; l < lookups; ++l) {
    int16_t entries[256];
    for (int e = 0; e < 256; ++e) entries[e] = rounded(sums[l][e] * inverse);
    store(entries, tables->memory + l * table_bytes);
    if (tables->passes == 1) continue;
    for (int e = 0; e < 256; ++e) entries[e] = rounded((sums[l][e] * inverse - float(entries[e])) * kFiner);
    store(entries, tables->memory + (lookups + l) * table_bytes);
  }
}

}  // namespace
}  // namespace codegemm::cpu
