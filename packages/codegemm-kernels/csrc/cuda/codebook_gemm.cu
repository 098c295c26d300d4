// Launcher of the kernel for 17 to 64 tokens: 2 dtypes x 3 vector lengths x 32 or 64 tokens x codebooks one by one or
// in pairs, and one or two strips a warp where both have shapes they suit.
#include "codebook_gemm.cuh"

#include <algorithm>

#include "kernels.h"
#include "launch.h"
#include "plans.h"

namespace codegemm::cuda {
namespace {

struct GemmPlan {
  int cluster = 0;  // 0: none fits
  int rows_per_range;
  double stages;  // predicted time, in stages of one strip
  GemmShape shape;
};

// Stages that follow one another in a plan: waves of clusters, each with its share of K and a beginning and an end
// worth three. A stage of two strips takes 1.75 times as long as one of one (docs/log.md, "CUDA kernels", ninth
// version).
template <typename Function>
GemmPlan best_plan(const Product& product, int vector_length, int tokens, int strips, int blocks, Function* function,
                   int device) {
  const DeviceLimits& limits = device_limits(device);
  GemmPlan best;
  for (int cluster = 1; cluster <= (limits.capability >= 90 ? kMaxCluster : 1); ++cluster) {
    Product candidate = product;
    GemmPlan plan;
    plan.shape = make_gemm_shape(candidate, vector_length, tokens, strips, cluster);
    if (plan.shape.stages.each < 1 || plan.shape.bytes > limits.shared_bytes - kReservedShared) continue;
    const LaunchConfig config = {0, kGemmWarps * 32, plan.shape.bytes, cluster, false};
    const int resident = cluster == 1 ? limits.multiprocessors * blocks : active_clusters(function, config);
    if (resident < 1) continue;
    plan.cluster = cluster;
    plan.rows_per_range = candidate.rows_per_range;
    plan.stages = double(ceil_div(plan.shape.first_block[kMaxSegments], resident)) *
                  (plan.shape.stages.first(1) * (strips == 2 ? 1.75 : 1.0) + 3);
    if (best.cluster == 0 || plan.stages < best.stages) best = plan;
  }
  return best;
}

template <typename T, int V, int kTiles, int kBooks, int kStrips>
GemmPlan plan_of(const Product& product, int device) {
  const auto kernel = codebook_gemm_kernel<T, V, kTiles, kStrips, kBooks>;
  thread_local PlanCache<GemmPlan> known;
  return known.find(PlanKey(product, device), [&] {
    return best_plan(product, V, 16 * kTiles, kStrips, gemm_blocks(V, kTiles), kernel, device);
  });
}

template <typename T, int V, int kTiles, int kBooks, int kStrips>
const char* launch(Product product, const GemmPlan& plan, int device, cudaStream_t stream) {
  if (plan.cluster == 0) return kDoesNotFit;
  product.rows_per_range = plan.rows_per_range;
  const LaunchConfig config = {plan.shape.first_block[kMaxSegments] * plan.cluster, kGemmWarps * 32, plan.shape.bytes,
                               plan.cluster, device_limits(device).capability >= 90};
  return launch_kernel(codebook_gemm_kernel<T, V, kTiles, kStrips, kBooks>, config, stream, product, plan.shape);
}

// Two strips read x half as often but leave fewer blocks, and take too many registers for most.
template <typename T, int V, int kTiles, int kBooks>
const char* launch_strips(const Product& product, int device, cudaStream_t stream) {
  const GemmPlan one = plan_of<T, V, kTiles, kBooks, 1>(product, device);
  if constexpr ((V == 4 && kTiles == 4) || (V == 8 && kTiles == 2)) {
    const GemmPlan two = plan_of<T, V, kTiles, kBooks, 2>(product, device);
    if (two.cluster > 0 && (one.cluster == 0 || two.stages < one.stages))
      return launch<T, V, kTiles, kBooks, 2>(product, two, device, stream);
  }
  return launch<T, V, kTiles, kBooks, 1>(product, one, device, stream);
}

template <typename T, int V>
const char* launch_tokens(const Product& product, int device, cudaStream_t stream) {
  if (product.num_codebooks % 2 == 0)
    return product.tokens <= 32 ? launch_strips<T, V, 2, 2>(product, device, stream)
                                : launch_strips<T, V, 4, 2>(product, device, stream);
  return product.tokens <= 32 ? launch_strips<T, V, 2, 1>(product, device, stream)
                              : launch_strips<T, V, 4, 1>(product, device, stream);
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

const char* codebook_gemm(const Gemm* calls, int count, int device, cudaStream_t stream) {
  const Product product = make_product(calls, count);
  const int v = calls[0].weight.vector_length;
  return calls[0].weight.dtype == DType::kFloat16 ? launch_vector_length<__half>(product, v, device, stream)
                                                  : launch_vector_length<__nv_bfloat16>(product, v, device, stream);
}

}  // namespace codegemm::cuda
