// The entry points, and the loop over the tiles of a matrix that is dequantised.
#include <algorithm>
#include <cstddef>
#include <vector>

#include "codegemm.h"
#include "cpu/decode.h"
#include "cpu/features.h"
#include "cpu/floats.h"
#include "cpu/many_rows.h"
#include "cpu/pool.h"
#include "cpu/psumbook.h"
#include "cpu/tiling.h"

namespace codegemm::cpu {
namespace {

// Rows of x up to which lookups are taken to beat torch on a processor with AMX; a guess, none has been measured.
constexpr int kMaxRowsBesideTiles = 64;

#if defined(__x86_64__)
// Rows of x from which on decoding a tile costs less than tables for every row do.
constexpr int64_t kManyRows = 48;

bool multiplies_many(const Gemm& call) {
  return call.rows >= kManyRows && call.weight.dtype != DType::kFloat32 &&
         instruction_set() == InstructionSet::kAvx512Vbmi;
}
#endif

// A thread more for every so many codes decoded or looked up, about 5 us of work: waking a thread can take 50.
constexpr int64_t kCodesPerThread = 1 << 17;

int useful_threads(int64_t codes, int threads) { return int(std::min<int64_t>(threads, 1 + codes / kCodesPerThread)); }

int64_t codes_per_row(const Weight& weight) { return weight.in_features / weight.vector_length * weight.num_codebooks; }

auto* decode_tile() {
#if defined(__x86_64__)
  if (instruction_set() != InstructionSet::kPortable) return avx2::decode_tile;
#endif
  return portable::decode_tile;
}

}  // namespace

void gemm_grouped(const Gemm* calls, int count, int threads) {
  int64_t codes = 0;
  for (int i = 0; i < count; ++i) {
    codes += calls[i].weight.out_features * codes_per_row(calls[i].weight) * calls[i].rows;
  }
  if (codes == 0) return;
  const int useful = useful_threads(codes, threads);
#if defined(__x86_64__)
  if (multiplies_many(calls[0])) {
    for (int i = 0; i < count; ++i) gemm_many_rows(calls[i], useful);
    return;
  }
#endif
  gemm_by_psumbook(calls, count, useful);
}

void gemm(const Gemm& call, int threads) { gemm_grouped(&call, 1, threads); }

int max_gemm_rows() {
  const int rows = psumbook_kernel().max_rows;
  return has_matrix_tiles() ? std::min(rows, kMaxRowsBesideTiles) : rows;
}

void dequantize(const Dequantize& call, int64_t first_row, int64_t rows, int threads) {
  const Weight& weight = call.weight;
  const Tiling tiling(weight);
  const int element = weight.dtype == DType::kFloat32 ? 4 : 2;
  std::vector<float> codebooks(size_t(weight.num_codebooks) * 256 * weight.vector_length);
  with_type(weight.dtype, [&](auto type) {
    widen_all(static_cast<const decltype(type)*>(weight.codebooks), int64_t(codebooks.size()), codebooks.data());
  });
  const int64_t first_block = first_row / kTileRows, last_block = (first_row + rows - 1) / kTileRows;
  parallel_for((last_block - first_block + 1) * tiling.segments(),
               useful_threads(rows * codes_per_row(weight), threads), [&](int64_t task) {
                 const int64_t block = first_block + task / tiling.segments(), segment = task % tiling.segments();
                 const int64_t row = block * kTileRows, n = std::max(row, first_row);
                 uint8_t scratch[kTileRows * kTileLookups];
                 const uint8_t* codes = reinterpret_cast<const uint8_t*>(weight.codes) + tiling.offset(segment, block);
                 if (!weight.tiled) {
                   tile_block(weight, tiling, segment, block, scratch);
                   codes = scratch;
                 }
                 const char* scales = static_cast<const char*>(weight.scales);
                 const int64_t at =
                     (n - first_row) * weight.in_features + tiling.first_position(segment) * weight.vector_length;
                 decode_tile()({&weight, codebooks.data(), codes, tiling.positions(segment), tiling.rows(block),
                                int(n - row), int(std::min<int64_t>(tiling.rows(block), first_row + rows - row)),
                                scales + (tiling.group(segment) * weight.out_features + row) * element,
                                static_cast<char*>(call.y) + at * element});
               });
}

}  // namespace codegemm::cpu
