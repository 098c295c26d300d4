#include "cpu/decode.h"
#include "cpu/floats.h"

namespace codegemm::cpu::portable {
namespace {

template <int V, class T>
void decode_rows(const DecodeTile& job) {
  const int m = job.weight->num_codebooks;
  for (int r = job.first; r < job.last; ++r) {
    const float scale = widen(static_cast<const T*>(job.scales)[r]);
    T* to = static_cast<T*>(job.y) + (r - job.first) * job.weight->in_features;
    const uint8_t* code = job.codes + r;
    for (int p = 0; p < job.positions; ++p, to += V) {
      float sum[V] = {};
      for (int i = 0; i < m; ++i, code += job.tile_rows) {
        const float* entry = job.codebooks + (i * 256 + *code) * V;
        for (int t = 0; t < V; ++t) sum[t] += entry[t];
      }
      for (int t = 0; t < V; ++t) to[t] = narrow<T>(scale * sum[t]);
    }
  }
}

}  // namespace

void decode_tile(const DecodeTile& job) {
  with_vector_length(job.weight->vector_length, [&](auto v) {
    with_type(job.weight->dtype, [&](auto type) { decode_rows<decltype(v)::value, decltype(type)>(job); });
  });
}

}  // namespace codegemm::cpu::portable
