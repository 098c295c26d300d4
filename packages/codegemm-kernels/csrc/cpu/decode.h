// Weights from codes: the rows of a tile, scaled and rounded, into a dense matrix.
#pragma once
#include <cstdint>

#include "codegemm.h"
#include "cpu/tiling.h"

namespace codegemm::cpu {

struct DecodeTile {
  const Weight* weight;
  const float* codebooks;  // in fp32, [m, 256, v]
  const uint8_t* codes;    // tile[lookup][row]
  int positions;
  int tile_rows;       // rows of the tile
  int first, last;     // of which these are wanted
  const void* scales;  // of row 0 of the tile
  void* y;             // weight of row `first` and of the first position, K from row to row
};

namespace portable {
void decode_tile(const DecodeTile& job);
}
namespace avx2 {
void decode_tile(const DecodeTile& job);
}

namespace {

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
