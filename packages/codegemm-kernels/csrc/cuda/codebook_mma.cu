// Launcher of the tensor-core kernel: 2 dtypes x 3 vector lengths x tiles of 8, 16, 32 and 64 tokens, the first two
// with scales on sums or on weights.
#include "codebook_mma.cuh"

#include <algorithm>

#include "kernels.h"
#include "launch.h"

namespace codegemm::cuda {
namespace {

template <typename T, int V, int kTokenTiles, bool kScaleSums>
const char* launch(Product product, int device, cudaStream_t stream) {
  constexpr int kWarps = kTokenTiles < 4 ? 16 : 8, kThreads = kWarps * 32 + 32;
  const auto kernel = codebook_mma_kernel<T, V, kTokenTiles, kScaleSums, kWarps>;
  const DeviceLimits& limits = device_limits(device);
  const bool has_clusters = limits.capability >= 90;
  MmaShape shape;
  // The smallest cluster that leaves each warp column of 128 rows work on every multiprocessor, and x in one piece.
  for (int cluster = has_clusters ? 16 : 1; cluster > 0; cluster /= 2) {
    const int clusters = resident_clusters(kernel, kThreads, device, cluster);
    if (clusters < 1 || (product.words + 3) / 4 < cluster) continue;
    if (cluster > 1 && product.total_rows >= int64_t(128) * clusters * 2) continue;
    if (!make_mma_shape(shape, product, V, kTokenTiles, kWarps, cluster, clusters, kWarps / 4, 1,
                        limits.shared_bytes - kReservedShared))
      continue;
    const LaunchConfig config = {shape.clusters * cluster, kThreads, shape.bytes, cluster, has_clusters};
    return launch_kernel(kernel, config, stream, product, shape);
  }
  return kDoesNotFit;
}

template <typename T, int V>
const char* launch_tokens(const Product& product, int device, cudaStream_t stream) {
  const bool step_has_one_scale = product.words_per_group.value % 4 == 0;
  if (product.tokens <= 8)
    return step_has_one_scale ? launch<T, V, 1, true>(product, device, stream)
                              : launch<T, V, 1, false>(product, device, stream);
  if (product.tokens <= 16)
    return step_has_one_scale ? launch<T, V, 2, true>(product, device, stream)
                              : launch<T, V, 2, false>(product, device, stream);
  if (product.tokens <= 32) return launch<T, V, 4, false>(product, device, stream);
  return launch<T, V, 8, false>(product, device, stream);
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
