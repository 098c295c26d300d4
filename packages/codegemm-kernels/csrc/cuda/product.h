// The parameter block of the fast kernels: up to four weights that multiply the same x in one launch.
#pragma once
#include <cstdint>

#include "codegemm.h"

namespace codegemm::cuda {

constexpr int kMaxSegments = 4;

// One weight of the launch. Its rows are rows first_row .. first_row + out_features - 1 of the launch.
struct Segment {
  const uint32_t* codes;
  const void* codebooks;
  const void* scales;
  const void* bias;  // or null
  void* y;
  int64_t out_features;
  int64_t first_row;
};

// n / divisor for n, divisor < 65536 without a division instruction (about 30 of them in SASS).
struct Divisor {
  uint32_t value, reciprocal;
};

struct Product {
  Segment segment[kMaxSegments];
  int segments;
  int num_codebooks;
  int words;                // K/(4v), 32-bit words of codes a row and codebook
  Divisor words_per_group;  // g/(4v)
  Divisor codebooks;        // num_codebooks again
  int tokens;               // M
  int rows_per_range;       // rows of the launch that one cluster computes, a multiple of the kernel's row tile
  int64_t total_rows;
  const void* x;
  int64_t x_row_stride;
};

inline Divisor make_divisor(int64_t value) {
  const uint64_t two_32 = uint64_t(1) << 32;
  return {uint32_t(value), value == 1 ? 0 : uint32_t((two_32 + value - 1) / value)};
}

__device__ __forceinline__ int operator/(int n, const Divisor& divisor) {
  return divisor.value == 1 ? n : int(__umulhi(uint32_t(n), divisor.reciprocal));
}

// K divided among the blocks of a cluster, in units: the first `extra` blocks have one more than `each`.
struct Shares {
  int each, extra;
  __host__ __device__ int first(int rank) const { return rank * each + (rank < extra ? rank : extra); }
};

// The launch that computes `count` products of the same x, rows_per_range still to be chosen.
inline Product make_product(const Gemm* calls, int count) {
  const Weight& weight = calls[0].weight;
  Product product = {};
  product.segments = count;
  product.num_codebooks = weight.num_codebooks;
  product.words = int(weight.in_features / (4 * weight.vector_length));
  product.words_per_group = make_divisor(product.words / weight.num_groups);
  product.codebooks = make_divisor(weight.num_codebooks);
  product.tokens = int(calls[0].rows);
  product.x = calls[0].x;
  product.x_row_stride = calls[0].x_row_stride;
  for (int i = 0; i < count; ++i) {
    const Weight& w = calls[i].weight;
    product.segment[i] = {w.codes,    w.codebooks,    w.scales,          calls[i].bias,
                          calls[i].y, w.out_features, product.total_rows};
    product.total_rows += w.out_features;
  }
  return product;
}

// The segment that a row of the launch belongs to.
__device__ __forceinline__ const Segment& segment_of(const Product& p, int64_t row) {
  int s = 0;
  while (s + 1 < p.segments && row >= p.segment[s + 1].first_row) ++s;
  return p.segment[s];
}

}  // namespace codegemm::cuda
