// Launcher of the tensor-core kernel: 2 dtypes x 3 vector lengths x tiles of 8, 16, 32 and 64 tokens, the first two
// with scales on sums or on weights.
#include "codebook_mma.cuh"

#include <algorithm>

#include "kernels.h"
#include "launch.h"

namespace codegemm::cuda {
namespace {

// x that a block keeps at once, bytes: with more than 16 tokens the sums need the room.
constexpr int most_x_bytes(int tokens) { return (tokens <= 16 ? 116 : 64) * 1024; }

// The smallest cluster whose blocks hold their share of x, and have 64 rows each as long as a larger one exists; then
// as many warps side by side in K as leave one row tile a warp (docs/log.md, "CUDA kernels", third and fourth sweep).
template <typename T, int V, int kTokens, bool kScaleSums>
const char* launch(const Product& product, int device, cudaStream_t stream) {
  constexpr int kWarps = kTokens < 32 ? 16 : 8, kThreads = (kWarps + kProducerWarps) * 32;
  const auto kernel = codebook_mma_kernel<T, V, kTokens, kScaleSums, kWarps>;
  const DeviceLimits& limits = device_limits(device);
  const bool has_clusters = limits.capability >= 90;
  const int64_t steps = ceil_div(product.words, 4);
  Product planned;
  MmaShape shape;
  int chosen = 0;
  for (int cluster = 1; cluster <= (has_clusters ? kMaxCluster : 1) && cluster <= steps; cluster *= 2) {
    const int clusters = resident_clusters(kernel, kThreads, device, cluster);
    if (clusters < 1) continue;
    const int64_t rows = ceil_div(ceil_div(product.total_rows, clusters), kMmaTileRows) * kMmaTileRows;
    int k_warps = 1;
    while (k_warps < 8 && kMmaTileRows * kWarps / (2 * k_warps) >= rows) k_warps *= 2;
    Product candidate = product;
    MmaShape candidate_shape;
    bool fits = false;
    for (; !fits && k_warps > 0; k_warps /= 2)  // fewer warps in K: smaller pieces of x and of codes
      for (int steps_a_warp = product.num_codebooks == 1 ? 2 : 1; !fits && steps_a_warp > 0; --steps_a_warp)
        fits = make_mma_shape(candidate_shape, candidate, V, kTokens, kWarps, cluster, clusters, k_warps, steps_a_warp,
                              limits.shared_bytes - kReservedShared);
    if (!fits) continue;
    planned = candidate;
    shape = candidate_shape;
    chosen = cluster;
    if (ceil_div(steps, cluster) * (32 * V * kTokens) <= most_x_bytes(kTokens) && (rows >= 64 || cluster > 1)) break;
  }
  if (chosen == 0) return kDoesNotFit;
  const LaunchConfig config = {shape.clusters * chosen, kThreads, shape.bytes, chosen, has_clusters};
  return launch_kernel(kernel, config, stream, planned, shape);
}

template <typename T, int V>
const char* launch_tokens(const Product& product, int device, cudaStream_t stream) {
  const bool step_has_one_scale = product.words_per_group.value % 4 == 0;
  if (product.tokens <= 8)
    return step_has_one_scale ? launch<T, V, 8, true>(product, device, stream)
                              : launch<T, V, 8, false>(product, device, stream);
  if (product.tokens <= 16)
    return step_has_one_scale ? launch<T, V, 16, true>(product, device, stream)
                              : launch<T, V, 16, false>(product, device, stream);
  if (product.tokens <= 32) return launch<T, V, 32, false>(product, device, stream);
  return launch<T, V, 64, false>(product, device, stream);
}

template <typename T>
const char* launch_vector_length(const Product& product, int vector_length, int device, cudaStream_t stream) {
  switch (vector_length) {
    case 4:
      return launch_tokens<T, 4>(product, device, stream);
    case 8:
      return launch_tokens<T, 8>(product, device, stream);
    default:
      return launch_tokens<T, 16>(product, device, stream);
  }
}

}  // namespace

const char* codebook_mma_gemm(const Gemm* calls, int count, int device, cudaStream_t stream) {
  const Product product = make_product(calls, count);
  const int v = calls[0].weight.vector_length;
  return calls[0].weight.dtype == DType::kFloat16 ? launch_vector_length<__half>(product, v, device, stream)
                                                  : launch_vector_length<__nv_bfloat16>(product, v, device, stream);
}

}  // namespace codegemm::cuda
