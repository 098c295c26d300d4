// The entry points: the choice of a kernel for this processor and this call, and the loop over blocks of rows.
#include <algorithm>
#include <cstddef>
#include <vector>

#include "codegemm.h"
#include "cpu/features.h"
#include "cpu/floats.h"
#include "cpu/pool.h"
#include "cpu/psumbook.h"
#include "cpu/tile.h"

namespace codegemm::cpu {
namespace {

// Up to this many rows of x the psumbook wins: by byte shuffles over torch's product with dequantised weights, where
// ops.py goes beyond, by scalar lookups over decoded tiles.
constexpr int64_t kShuffleTokens = 64;
constexpr int64_t kScalarTokens = 4;

// A thread more for every so many codes decoded or looked up, about 10 us of work: waking a thread can take 50.
constexpr int64_t kCodesPerThread = 1 << 17;

int useful_threads(int64_t codes, int threads) { return int(std::min<int64_t>(threads, 1 + codes / kCodesPerThread)); }

int64_t codes_per_row(const Weight& weight) { return weight.in_features / weight.vector_length * weight.num_codebooks; }

// The psumbook for a call, or null where decoded tiles are better.
const PsumbookKernel* psumbook_for(const Gemm& call) {
  const Weight& weight = call.weight;
  if (weight.in_features / weight.vector_length / weight.num_groups % 4 != 0) return nullptr;  // words in two groups
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::kAvx512Vbmi) {
    return call.rows <= kShuffleTokens ? &avx512::kPsumbook : nullptr;
  }
#endif
  return call.rows <= kScalarTokens ? &portable::kPsumbook : nullptr;
}

auto* gemm_block() {
#if defined(__x86_64__)
  if (instruction_set() != InstructionSet::kPortable) return avx2::gemm_block;
#endif
  return portable::gemm_block;
}

auto* dequantize_block() {
#if defined(__x86_64__)
  if (instruction_set() != InstructionSet::kPortable) return avx2::dequantize_block;
#endif
  return portable::dequantize_block;
}

std::vector<float> wide_codebooks(const Weight& weight) {
  std::vector<float> wide(size_t(weight.num_codebooks) * 256 * weight.vector_length);
  with_type(weight.dtype, [&](auto type) {
    widen_all(static_cast<const decltype(type)*>(weight.codebooks), int64_t(wide.size()), wide.data());
  });
  return wide;
}

std::vector<float> wide_inputs(const Gemm& call, int64_t token, int tokens) {
  const int64_t K = call.weight.in_features;
  std::vector<float> x(size_t(tokens) * K);
  with_type(call.weight.dtype, [&](auto type) {
    for (int64_t i = 0; i < tokens; ++i) {
      widen_all(static_cast<const decltype(type)*>(call.x) + (token + i) * call.x_row_stride, K, x.data() + i * K);
    }
  });
  return x;
}

}  // namespace

void gemm(const Gemm& call, int threads) {
  const Weight& weight = call.weight;
  if (call.rows == 0 || weight.out_features == 0) return;
  threads = useful_threads(weight.out_features * codes_per_row(weight) * call.rows, threads);
  if (const PsumbookKernel* kernel = psumbook_for(call)) return gemm_by_psumbook(call, *kernel, threads);
  const std::vector<float> codebooks = wide_codebooks(weight);
  for (int64_t token = 0; token < call.rows; token += kTokens) {
    const int tokens = int(std::min<int64_t>(kTokens, call.rows - token));
    const std::vector<float> x = wide_inputs(call, token, tokens);
    parallel_for((weight.out_features + kTileRows - 1) / kTileRows, threads, [&](int64_t block) {
      gemm_block()({&call, codebooks.data(), x.data(), token, tokens, block * kTileRows});
    });
  }
}

void dequantize(const Dequantize& call, int64_t first_row, int64_t rows, int threads) {
  const std::vector<float> codebooks = wide_codebooks(call.weight);
  threads = useful_threads(rows * codes_per_row(call.weight), threads);
  parallel_for((rows + kTileRows - 1) / kTileRows, threads, [&](int64_t block) {
    const int64_t n = block * kTileRows;
    dequantize_block()({&call, codebooks.data(), first_row, n, int(std::min<int64_t>(kTileRows, rows - n))});
  });
}

}  // namespace codegemm::cpu
