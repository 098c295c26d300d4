// The product for many rows of x: tiles of W as 16-bit integers, decoded once for all rows, multiplied in registers.
#pragma once
#include <algorithm>
#include <cstdint>

#include "codegemm.h"
#include "cpu/tiling.h"

namespace codegemm::cpu {

constexpr int kBlockWidth = 128;     // inputs of a block of K, which has a unit of its own in each row of x
constexpr int kColumns = 64;         // rows of W decoded together
constexpr int64_t kChunkRows = 256;  // rows of x for which a decoded block is used

// Blocks of K: runs of up to kBlockWidth inputs within a segment, hence within a scale group.
class Blocks {
 public:
  explicit Blocks(const Weight& weight)
      : tiling_(weight), v_(weight.vector_length), per_segment_(ceil(tiling_.positions(0), kBlockWidth / v_)) {}
  int64_t count() const { return tiling_.segments() * per_segment_; }
  int64_t segment(int64_t block) const { return block / per_segment_; }
  // Of the first position, within its segment.
  int offset(int64_t block) const { return int(block % per_segment_) * (kBlockWidth / v_); }
  // May be 0 or less at the end of a short segment.
  int positions(int64_t block) const {
    return std::min(tiling_.positions(segment(block)) - offset(block), kBlockWidth / v_);
  }
  int64_t first_input(int64_t block) const { return (tiling_.first_position(segment(block)) + offset(block)) * v_; }
  const Tiling& tiling() const { return tiling_; }

 private:
  static int64_t ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }
  Tiling tiling_;
  int v_;
  int64_t per_segment_;
};

// Codebooks as bytes [m, v, 2, 256], low and high, of integers in one unit.
struct IntegerBooks {
  uint8_t* bytes;
  float unit;  // NaN if an entry is not finite
};

// Rows of x as integers, what they leave over, and their units.
struct IntegerRows {
  int64_t stride;             // rows from block to block, up to kChunkRows
  int16_t *values, *rests;    // [blocks, stride, kBlockWidth], zeros beside the inputs of a block
  float *units, *rest_units;  // [blocks, stride]; NaN if an input is not finite
  uint8_t* has_rest;          // [stride]: whether some block has inputs far larger than the others
};

namespace vbmi {

void prepare_books(const Weight& weight, IntegerBooks* books);

// Row `at` of a chunk from row `row` of x.
void to_integers(const Gemm& call, const Blocks& blocks, int64_t row, int64_t at, const IntegerRows& to);

// y of `rows` rows of x, from `first_row` on, and of the kColumns rows of W from n on. memory: of kManyRowsScratch
// bytes.
struct Columns {
  const Gemm* call;
  const Blocks* blocks;
  const IntegerBooks* books;
  const IntegerRows* x;
  int64_t first_row, rows, n;
  void* memory;
};
constexpr int64_t kManyRowsScratch =
    (kBlockWidth * kColumns * 2) + kChunkRows * kColumns * 4 + kTileRows * kTileLookups;
void multiply_columns(const Columns& job);

}  // namespace vbmi

void gemm_many_rows(const Gemm& call, int threads);

}  // namespace codegemm::cpu
