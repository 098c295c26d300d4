// Launcher of the kernel for 2 to 16 tokens: 2 dtypes x 3 vector lengths x (8 tokens, 16, 16 with scales on weights).
#include "codebook_mma.cuh"

#include <algorithm>

#include "kernels.h"
#include "launch.h"
#include "plans.h"

namespace codegemm::cuda {
namespace {

struct MmaPlan {
  int cluster = 0;  // 0: none fits
  int warps, rows_per_range;
  MmaShape shape;
};

// Microseconds that a plan takes on an H200, apart from what all plans share. Prices are read off the sweep of
// docs/log.md, "CUDA kernels", ninth version: a turn of a block's warps takes 1.0 for all schemes.
double predicted_us(const MmaPlan& plan, const Product& p, int tokens) {
  const MmaShape& shape = plan.shape;
  const int slice = shape.chunks.first(1), whole = slice / shape.staged_chunks, rest = slice % shape.staged_chunks;
  const int tiles = plan.rows_per_range / kTileRows, parts = whole + (rest > 0);
  const double turns = double(p.num_codebooks) *
                       (whole * ceil_div(tiles * shape.staged_chunks, plan.warps) + ceil_div(tiles * rest, plan.warps));
  const double ranges = double(ceil_div(shape.first_range[kMaxSegments], shape.clusters));  // that one cluster computes
  const double sums = 1.5 + 3e-5 * (4.0 * tokens * plan.rows_per_range);
  const double x = 1.5 * parts + 1e-5 * (shape.sums - shape.x) * parts;  // laid out once if it fits at once
  return ranges * (turns + sums) + x * (parts > 1 ? ranges : 1);
}

template <typename Function>
MmaPlan best_plan(const Product& product, const MmaKernel& kernel, Function* function, int device) {
  const DeviceLimits& limits = device_limits(device);
  const int largest = limits.capability >= 90 ? kMaxCluster : 1;
  MmaPlan best;
  double best_us = 0;
  for (int warps = kMmaWarps; warps >= 8 && best.cluster == 0; warps /= 2) {
    for (int cluster = 1; cluster <= largest; cluster *= 2) {
      const int clusters = resident_clusters(function, warps * 32, device, cluster);
      Product candidate = product;
      MmaPlan plan;
      if (clusters < 1 || !make_mma_shape(plan.shape, candidate, kernel, warps, cluster, clusters,
                                          limits.shared_bytes - kReservedShared))
        continue;
      plan.cluster = cluster;
      plan.warps = warps;
      plan.rows_per_range = candidate.rows_per_range;
      const double us = predicted_us(plan, product, kernel.tokens);
      if (best.cluster == 0 || us < best_us) {
        best = plan;
        best_us = us;
      }
    }
  }
  return best;
}

template <typename T, int V, int kTokens, bool kScaleSums>
const char* launch(Product product, int device, cudaStream_t stream) {
  const auto kernel = codebook_mma_kernel<T, V, kTokens, kScaleSums>;
  thread_local PlanCache<MmaPlan> known;
  const MmaPlan& plan = known.find(PlanKey(product, device),
                                   [&] { return best_plan(product, {V, kTokens, kScaleSums}, kernel, device); });
  if (plan.cluster == 0) return kDoesNotFit;
  product.rows_per_range = plan.rows_per_range;
  const LaunchConfig config = {plan.shape.clusters * plan.cluster, plan.warps * 32, plan.shape.bytes, plan.cluster,
                               device_limits(device).capability >= 90};
  return launch_kernel(kernel, config, stream, product, plan.shape);
}

template <typename T, int V>
const char* launch_tokens(const Product& product, int device, cudaStream_t stream) {
  const bool turn_has_one_scale = product.words_per_group.value % (4 * chunk_loads(V)) == 0;
  if (!turn_has_one_scale) return launch<T, V, 16, false>(product, device, stream);
  return product.tokens <= 8 ? launch<T, V, 8, true>(product, device, stream)
                             : launch<T, V, 16, true>(product, device, stream);
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
