// Launcher of the kernel for 2 to 8 tokens on GPUs with clusters: 2 dtypes x 3 vector lengths.
#include "codebook_flow.cuh"

#include "kernels.h"
#include "launch.h"
#include "plans.h"

namespace codegemm::cuda {
namespace {

struct FlowPlan {
  int cluster = 0;  // 0: none fits
  FlowShape shape;
};

// Microseconds that a plan takes on an H200, fitted to the sweep of docs/log.md, "CUDA kernels", eleventh version:
// within 4 % on average, and the plan chosen is the fastest or within 2 % of it at 16 shapes.
double predicted_us(const FlowPlan& plan, const Product& p) {
  const FlowShape& shape = plan.shape;
  const double units = shape.units.first(1), sections = double(ceil_div(shape.tiles, shape.section_tiles));
  return 1.2 + shape.tiles * (0.041 * units * p.num_codebooks + 0.61) + sections * (plan.cluster > 1 ? 1.1 : 0.3) +
         0.08 * units;
}

template <typename Function>
FlowPlan best_plan(const Product& product, int v, Function* kernel, int device) {
  const DeviceLimits& limits = device_limits(device);
  FlowPlan best;
  double best_us = 0;
  for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
    const int clusters = resident_clusters(kernel, kFlowWarps * 32, device, cluster);
    FlowPlan plan;
    if (clusters < 1 ||
        !make_flow_shape(plan.shape, product, v, cluster, clusters, limits.shared_bytes - kReservedShared))
      continue;
    plan.cluster = cluster;
    const double us = predicted_us(plan, product);
    if (best.cluster == 0 || us < best_us) {
      best = plan;
      best_us = us;
    }
  }
  return best;
}

template <typename T, int V>
const char* launch(const Product& product, int device, cudaStream_t stream) {
  const auto kernel = codebook_flow_kernel<T, V>;
  thread_local PlanCache<FlowPlan> known;
  if (product.tokens > kFlowTokens || product.words_per_group.value % unit_words(V) != 0 ||
      device_limits(device).capability < 90)
    return kDoesNotFit;
  const FlowPlan& plan = known.find(PlanKey(product, device), [&] { return best_plan(product, V, kernel, device); });
  if (plan.cluster == 0) return kDoesNotFit;
  const LaunchConfig config = {plan.shape.first_cluster[kMaxSegments] * plan.cluster, kFlowWarps * 32, plan.shape.bytes,
                               plan.cluster, true};
  return launch_kernel(kernel, config, stream, product, plan.shape);
}

template <typename T>
const char* launch_vector_length(const Product& product, int vector_length, int device, cudaStream_t stream) {
  switch (vector_length) {
    case 4:
      return launch<T, 4>(product, device, stream);
    case 8:
      return launch<T, 8>(product, device, stream);
    default:
      return launch<T, 16>(product, device, stream);
  }
}

}  // namespace

const char* codebook_flow_gemm(const Gemm* calls, int count, int device, cudaStream_t stream) {
  const Product product = make_product(calls, count);
  const int v = calls[0].weight.vector_length;
  return calls[0].weight.dtype == DType::kFloat16 ? launch_vector_length<__half>(product, v, device, stream)
                                                  : launch_vector_length<__nv_bfloat16>(product, v, device, stream);
}

}  // namespace codegemm::cuda
