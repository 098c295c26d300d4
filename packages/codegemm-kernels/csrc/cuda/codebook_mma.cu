// Launcher of the tensor-core kernel: 2 dtypes x 3 vector lengths x tiles of 8, 16, 32 and 64 tokens, the first two
// with scales on sums or on weights.
#include "codebook_mma.cuh"

#include <algorithm>

#include "kernels.h"
#include "launch.h"

namespace codegemm::cuda {
namespace {

constexpr int kSmallestRange = kMmaTileRows;

// How one launch divides K, rows, warps and shared memory.
struct Plan {
  MmaShape shape;
  int cluster;
  int rows_per_range;
  int blocks;
  int shared_bytes;
};

// Fills `plan` for clusters of `cluster` blocks; false if shared memory does not suffice.
bool make_plan(Plan& plan, const Product& product, int vector_length, int token_tiles, int cluster, int k_warps,
               const DeviceLimits& limits) {
  const int tables = (product.num_codebooks + 1) / 2 * kMmaTableBytes;
  const int step_bytes = vector_length / 2 * token_tiles * 512, column_bytes = 8 * token_tiles * 4 * k_warps;
  const int room = limits.shared_bytes - tables, slice = int(ceil_div(ceil_div(product.words, 4), cluster));
  const int smallest_sums = column_bytes * (kSmallestRange + 4);
  const int chunk = std::min(slice, std::max(std::min(1, (room - smallest_sums) / step_bytes), room / 2 / step_bytes));
  if (chunk < 1) return false;
  const int clusters = std::max(1, limits.multiprocessors / cluster - (cluster > 8 ? 1 : 0));
  const int64_t most = ((room - chunk * step_bytes) / column_bytes - 4) / kMmaTileRows * kMmaTileRows;
  if (most < kMmaTileRows) return false;
  const int64_t even = ceil_div(ceil_div(product.total_rows, clusters), kMmaTileRows) * kMmaTileRows;
  const int64_t passes = ceil_div(even, most);
  plan.rows_per_range = int(ceil_div(ceil_div(even, passes), kMmaTileRows) * kMmaTileRows);
  plan.shape = {k_warps, chunk, int(ceil_div(product.total_rows, plan.rows_per_range))};
  plan.cluster = cluster;
  plan.blocks = std::min(clusters, plan.shape.num_ranges) * cluster;
  plan.shared_bytes = tables + chunk * step_bytes + column_bytes * (plan.rows_per_range + 4);
  return true;
}

template <typename T, int V, int kTokenTiles, bool kScaleSums>
const char* launch(Product product, int device, cudaStream_t stream) {
  constexpr int kThreads = kTokenTiles > 4 ? 256 : 512;
  const DeviceLimits& limits = device_limits(device);
  Plan plan;
  int cluster = limits.capability >= 90 ? 8 : 1;
  while (cluster > 1 && ceil_div(product.words, 4) < cluster) cluster /= 2;
  const int k_warps = cluster == 1 ? 4 : 1;
  if (!make_plan(plan, product, V, kTokenTiles, cluster, k_warps, limits)) return kDoesNotFit;
  product.rows_per_range = plan.rows_per_range;
  const LaunchConfig config = {plan.blocks, kThreads, plan.shared_bytes, cluster, limits.capability >= 90};
  return launch_kernel(codebook_mma_kernel<T, V, kTokenTiles, kScaleSums, kThreads, 1>, config, stream, product,
                       plan.shape);
}

template <typename T, int V>
const char* launch_tokens(const Product& product, int device, cudaStream_t stream) {
  const bool step_has_one_scale = product.words_per_group % 4 == 0;
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
    case 4: return launch_tokens<T, 4>(product, device, stream);
    case 8: return launch_tokens<T, 8>(product, device, stream);
    default: return launch_tokens<T, 16>(product, device, stream);
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
