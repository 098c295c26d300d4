// Dequantise a small tile, then multiply: the kernels for any scheme, any shape and any number of rows. A block is
// kTileRows rows of W; the loop over blocks is in gemm.cpp, the work on one block here, in portable C++ and for AVX2.
#pragma once
#include <cstdint>

#include "codegemm.h"

namespace codegemm::cpu {

constexpr int kTileRows = 16;      // their words are one cache line
constexpr int kTileColumns = 256;  // 16 x 256 fp32 weights are 16 KB, half of a first-level cache
constexpr int kTokens = 64;        // rows of x handled for each decoded tile

// y[token .. token + tokens)[n .. n + kTileRows) of a product.
struct GemmBlock {
  const Gemm* call;
  const float* codebooks;  // in fp32, [m, 256, v]
  const float* x;          // in fp32, [tokens, K]
  int64_t token;
  int tokens;  // up to kTokens
  int64_t n;
};

// Rows first + n .. first + n + rows of W, to rows n .. of y.
struct DequantizeBlock {
  const Dequantize* call;
  const float* codebooks;
  int64_t first;
  int64_t n;
  int rows;  // up to kTileRows
};

namespace portable {
void gemm_block(const GemmBlock& block);
void dequantize_block(const DequantizeBlock& block);
}  // namespace portable

namespace avx2 {
void gemm_block(const GemmBlock& block);
void dequantize_block(const DequantizeBlock& block);
}  // namespace avx2

}  // namespace codegemm::cpu
