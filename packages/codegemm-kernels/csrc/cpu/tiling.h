// The order in which the CPU kernels read codes. A tile holds the codes of up to kTileRows rows for one segment, a run
// of vector positions within one scale group; a lookup is a position and a codebook:
//
//   stored (codegemm.h)   codes[i][w][n]            four positions of a row a word, rows fastest
//   tiled                 tile[lookup][row]         lookup = position · m + i, one byte a code, rows fastest
//                         segment after segment along K, within a segment block after block of rows
//
// So 64 codes that are looked up in one table are one cache line, and a product reads memory from front to back, which
// the prefetchers follow. It is a permutation of bytes without padding: the last block has as many rows as are left.
#pragma once
#include <algorithm>
#include <cstdint>

#include "codegemm.h"

namespace codegemm::cpu {

constexpr int kTileRows = 128;    // the sums of 128 rows and two tables fit the registers of AVX-512
constexpr int kTileLookups = 32;  // of a row in a tile: their tables fill half of a first-level cache of 32 KB

class Tiling {
 public:
  explicit Tiling(const Weight& weight)
      : num_codebooks_(weight.num_codebooks),
        out_features_(weight.out_features),
        group_positions_(weight.in_features / weight.vector_length / weight.num_groups),
        positions_(std::min<int64_t>(group_positions_, kTileLookups / weight.num_codebooks)),
        per_group_((group_positions_ + positions_ - 1) / positions_),
        segments_(per_group_ * weight.num_groups),
        blocks_((weight.out_features + kTileRows - 1) / kTileRows) {}

  int64_t segments() const { return segments_; }
  int64_t blocks() const { return blocks_; }
  int64_t group(int64_t segment) const { return segment / per_group_; }
  int64_t first_position(int64_t segment) const {
    return group(segment) * group_positions_ + segment % per_group_ * positions_;
  }
  int positions(int64_t segment) const {
    return int(std::min(positions_, group_positions_ - segment % per_group_ * positions_));
  }
  int lookups(int64_t segment) const { return positions(segment) * num_codebooks_; }
  int rows(int64_t block) const { return int(std::min<int64_t>(kTileRows, out_features_ - block * kTileRows)); }
  // Bytes from the first tile to this one.
  int64_t offset(int64_t segment, int64_t block) const {
    return first_position(segment) * num_codebooks_ * out_features_ + block * kTileRows * lookups(segment);
  }

 private:
  int64_t num_codebooks_, out_features_, group_positions_, positions_, per_group_, segments_, blocks_;
};

// tile[lookup][row] from stored codes, and back. Inline so that each instruction set compiles its own; internal linkage
// for the same reason.
namespace {

inline void tile_block(const Weight& weight, const Tiling& tiling, int64_t segment, int64_t block, uint8_t* tile) {
  const int64_t N = weight.out_features, plane = weight.in_features / (4 * weight.vector_length) * N;
  const int64_t first = tiling.first_position(segment);
  const int rows = tiling.rows(block), positions = tiling.positions(segment), m = weight.num_codebooks;
  for (int p = 0; p < positions; ++p) {
    for (int i = 0; i < m; ++i, tile += rows) {
      const uint32_t* words = weight.codes + i * plane + (first + p) / 4 * N + block * kTileRows;
      const int shift = 8 * int((first + p) % 4);
      for (int r = 0; r < rows; ++r) tile[r] = uint8_t(words[r] >> shift);
    }
  }
}

}  // namespace
}  // namespace codegemm::cpu
