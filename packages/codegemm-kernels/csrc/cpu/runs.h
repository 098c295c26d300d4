// Shared by the tile kernels; internal linkage, see floats.h.
#pragma once
#include "cpu/tile.h"

namespace codegemm::cpu {
namespace {

// Calls f(group, first, last) for the runs of vector positions that share a scale and fit a tile.
template <int V, class F>
inline void for_runs(const Weight& weight, F&& f) {
  const int64_t length = weight.in_features / V / weight.num_groups;
  for (int64_t group = 0; group < weight.num_groups; ++group) {
    const int64_t end = (group + 1) * length;
    for (int64_t first = group * length; first < end; first += kTileColumns / V) {
      f(group, first, end - first < kTileColumns / V ? end : first + kTileColumns / V);
    }
  }
}

// How many rows of a block exist.
inline int block_rows(const Weight& weight, int64_t n) {
  return weight.out_features - n < kTileRows ? int(weight.out_features - n) : kTileRows;
}

template <int V>
struct VectorLength {
  static constexpr int value = V;
};

// Calls f with the vector length as a compile-time constant.
template <class F>
inline void with_vector_length(int vector_length, F&& f) {
  if (vector_length == 4) return f(VectorLength<4>{});
  if (vector_length == 8) return f(VectorLength<8>{});
  return f(VectorLength<16>{});
}

}  // namespace
}  // namespace codegemm::cpu
