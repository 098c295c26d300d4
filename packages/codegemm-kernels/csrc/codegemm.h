// The whole C++ API of codegemm: plain structs and raw pointers. No torch, no Python.
//
// The stored layout (see docs/format.md): codes[i][w][n] is a 32-bit word with the codes of vectors 4w .. 4w+3 of row n
// in codebook i, least significant byte first; codebooks[i][e][t]; scales[γ][n]. CPU kernels are faster on tiled codes,
// the same bytes in another order (cpu/tiling.h).
#pragma once
#include <cstdint>

namespace codegemm {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// A quantised matrix W [N, K]; codebooks and scales have the same dtype as the activations.
struct Weight {
  const uint32_t* codes;  // [m, K/(4v), N]
  const void* codebooks;  // [m, 256, v]
  const void* scales;     // [G, N]
  int num_codebooks;      // m, 1 .. 4
  int vector_length;      // v, 4, 8 or 16
  int64_t num_groups;     // G = K/g
  int64_t out_features;   // N
  int64_t in_features;    // K, a multiple of 4v and of G·v
  DType dtype;
  bool tiled = false;  // codes are tiled; for cpu only
};

// y[M, N] = x[M, K] Wᵀ + bias; sums in fp32. Rows of x start x_row_stride elements apart, rows of y are contiguous.
struct Gemm {
  Weight weight;
  const void* x;
  int64_t x_row_stride;
  const void* bias;  // [N] or null
  void* y;
  int64_t rows;  // M
};

// W[N, K] in weight.dtype.
struct Dequantize {
  Weight weight;
  void* y;
};

namespace cpu {
void gemm(const Gemm& call, int threads);
// The same as `count` calls of gemm of as many rows each; the threads are started once.
void gemm_grouped(const Gemm* calls, int count, int threads);
// Rows of x from which on torch's product with dequantised weights is faster than gemm.
int max_gemm_rows();
// Stored codes to tiled ones and back: as many bytes; the weight's codebooks and scales are not looked at.
void tile(const Weight& stored, uint8_t* tiled, int threads);
void untile(const Weight& tiled, uint32_t* stored, int threads);
// Rows first_row .. first_row + rows - 1 of W, to y[rows, K].
void dequantize(const Dequantize& call, int64_t first_row, int64_t rows, int threads);
}  // namespace cpu

namespace cuda {
// All launches go to `stream` of `device`; the caller's current device is left as it was. They return null, or a
// description of the failure that stays valid for the life of the program.
const char* gemm(const Gemm& call, int device, void* stream);
// Rows first_row .. first_row + rows - 1 of W, to the first rows of call.y.
const char* dequantize(const Dequantize& call, int64_t first_row, int64_t rows, int device, void* stream);
// The same as `count` calls of gemm; one launch if they have the same x, rows, scheme, K and dtype (q|k|v, gate|up).
const char* gemm_grouped(const Gemm* calls, int count, int device, void* stream);
}  // namespace cuda

}  // namespace codegemm
