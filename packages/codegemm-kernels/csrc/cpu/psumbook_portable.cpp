// The psumbook product in portable C++: fp32 tables and scalar lookups, about one a cycle.
#include "cpu/floats.h"
#include "cpu/psumbook.h"

namespace codegemm::cpu::portable {
namespace {

constexpr int kMaxLookups = 16;  // of a row in a segment: 16 tables of 1 KB fill half of the L1 cache

void build_tables(const SegmentTables& job) {
  const int v = job.vector_length, m = job.num_codebooks, lookups = job.words * m * 4;
  float* table = reinterpret_cast<float*>(job.tables);
  for (int l = 0; l < lookups; ++l, table += 256) {
    const float* x = job.x + (l / (4 * m) * 4 + l % 4) * v;
    const float* book = job.codebooks + l / 4 % m * v * 256;
    for (int e = 0; e < 256; ++e) table[e] = book[e] * x[0];
    for (int t = 1; t < v; ++t) {
      for (int e = 0; e < 256; ++e) table[e] += book[t * 256 + e] * x[t];
    }
  }
  *job.unit = {1, 0};
}

void add_token(const SegmentLookups& job, int token) {
  float sums[kMaxBlockRows] = {};
  const float* table = reinterpret_cast<const float*>(job.tables + token * job.table_stride);
  for (int w = 0; w < job.words; ++w) {
    for (int i = 0; i < job.num_codebooks; ++i, table += 4 * 256) {
      const uint32_t* words = job.codes + w * job.word_stride + i * job.plane_stride;
      for (int r = 0; r < job.rows; ++r) {
        const uint32_t word = words[r];
        const float low = table[word & 255] + table[256 + (word >> 8 & 255)];
        const float high = table[512 + (word >> 16 & 255)] + table[768 + (word >> 24)];
        sums[r] += low + high;
      }
    }
  }
  float* y = job.sums + token * job.sum_stride;
  with_type(job.dtype, [&](auto type) {
    const auto* scales = static_cast<const decltype(type)*>(job.scales);
    for (int r = 0; r < job.rows; ++r) y[r] += sums[r] * widen(scales[r]);
  });
}

void add_lookups(const SegmentLookups& job) {
  for (int token = 0; token < job.tokens; ++token) add_token(job, token);
}

void write_outputs(const float* sums, const void* bias, void* y, DType dtype, int64_t rows) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* offsets = static_cast<const T*>(bias);
    for (int64_t n = 0; n < rows; ++n) {
      static_cast<T*>(y)[n] = narrow<T>(bias == nullptr ? sums[n] : sums[n] + widen(offsets[n]));
    }
  });
}

int place(int entry) { return entry; }

}  // namespace

const PsumbookKernel kPsumbook = {build_tables, add_lookups, write_outputs, place, 256 * sizeof(float), kMaxLookups};

}  // namespace codegemm::cpu::portable
