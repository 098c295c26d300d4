// The entry points: portable kernels, and the choice of better ones where the processor has them.
#include "codegemm.h"
#include "cpu/tile.h"

namespace codegemm::cpu {

void gemm(const Gemm& call, int threads) {
  if (call.rows == 0 || call.weight.out_features == 0) return;
  with_vector_length(call.weight.vector_length, [&](auto v) { gemm_by_tiles<v()>(call, threads); });
}

void dequantize(const Dequantize& call, int threads) {
  with_vector_length(call.weight.vector_length, [&](auto v) { dequantize_by_tiles<v()>(call, threads); });
}

}  // namespace codegemm::cpu
