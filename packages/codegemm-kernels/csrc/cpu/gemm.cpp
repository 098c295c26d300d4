// The entry points: portable kernels, and the choice of better ones where the processor has them.
#include "codegemm.h"
#include "cpu/features.h"
#include "cpu/psumbook.h"
#include "cpu/tile.h"

namespace codegemm::cpu {
namespace {

// Psumbook tables cost 256 lookups a position and token to build, whatever N is.
constexpr int64_t kPsumbookTokens = 16;

bool psumbook_applies(const Gemm& call) {
#if defined(__x86_64__)
  const Weight& weight = call.weight;
  const int64_t group_vectors = weight.in_features / weight.vector_length / weight.num_groups;
  return instruction_set() == InstructionSet::kAvx512Vbmi && call.rows <= kPsumbookTokens && group_vectors % 4 == 0;
#else
  static_cast<void>(call);
  return false;
#endif
}

}  // namespace

void gemm(const Gemm& call, int threads) {
  if (call.rows == 0 || call.weight.out_features == 0) return;
  if (psumbook_applies(call)) return gemm_by_psumbook(call, threads);
  with_vector_length(call.weight.vector_length, [&](auto v) { gemm_by_tiles<v()>(call, threads); });
}

void dequantize(const Dequantize& call, int threads) {
  with_vector_length(call.weight.vector_length, [&](auto v) { dequantize_by_tiles<v()>(call, threads); });
}

}  // namespace codegemm::cpu
