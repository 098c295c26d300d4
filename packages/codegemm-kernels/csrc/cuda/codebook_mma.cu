// Launcher of the tensor-core kernel: 2 dtypes x 3 vector lengths x tiles of 16, 32 and 64 tokens, the first
// with scales on sums or on weights.
#include "codebook_mma.cuh"

#include <algorithm>

#include "kernels.h"
#include "launch.h"

namespace codegemm::cuda {
namespace {

// A way to divide a launch, and what one call needs to know of it.
struct MmaPlan {
  int cluster = 0;  // 0: none fits
  int rows_per_range;
  MmaShape shape;
};

// What a warp's steps are made of.
struct MmaKernel {
  int vector_length, tokens, warps;
  int quads() const { return mma_quads(vector_length, tokens); }
};

// Microseconds that a plan takes on an H200, apart from what all plans share: a sum of counted things, whose prices are
// a least-squares fit to the 2100 times of the fifth and sixth sweep (docs/log.md, "CUDA kernels"). The plan it
// prefers is 5 % slower than the best on average and 32 % at worst; no simple rule came near that.
double predicted_us(const MmaPlan& plan, const Product& p, const MmaKernel& kernel, int steps_a_warp) {
  const MmaShape& shape = plan.shape;
  const int slice = shape.steps.first(1), rest = slice % shape.chunk_steps;
  const int chunks = int(ceil_div(slice, shape.chunk_steps)),
            blocks = int(ceil_div(plan.rows_per_range, shape.stage_rows));
  const double tokens = kernel.tokens / 16.0, vectors = kernel.vector_length / 4.0;
  const double ranges = double(ceil_div(shape.num_ranges, shape.clusters));  // that one cluster computes
  const double stages = double(blocks) * (slice / shape.chunk_steps * ceil_div(shape.chunk_steps, shape.stage_steps) +
                                          ceil_div(rest, shape.stage_steps));
  const double warp_steps = stages * steps_a_warp * kernel.warps;
  const double lookups = warp_steps * p.num_codebooks * kernel.quads() * vectors * (0.0175 * tokens + 0.0023);
  const double waits = 0.16 * stages + (shape.stages < 3 ? 0.007 * warp_steps : 0);
  const double sums = 0.45 * chunks * blocks * shape.k_warps + 0.043 * plan.rows_per_range * tokens / plan.cluster;
  const double x = 2.0 * chunks + 0.0049 * slice * vectors * tokens;  // laid out once if it fits at once
  return ranges * (lookups + waits + sums + 2.3) + x * (chunks > 1 ? ranges : 1);
}

template <typename Kernel>
MmaPlan best_plan(const Product& product, const MmaKernel& kernel, Kernel* function, int device) {
  const DeviceLimits& limits = device_limits(device);
  const int steps = int(ceil_div(product.words, 4)), threads = (kernel.warps + kProducerWarps) * 32;
  const int largest = limits.capability >= 90 ? kMaxCluster : 1;
  MmaPlan best;
  double best_us = 0;
  for (int cluster = 1; cluster <= largest && cluster <= steps; cluster *= 2) {
    const int clusters = resident_clusters(function, threads, device, cluster);
    if (clusters < 1) continue;
    for (int k_warps = 1; k_warps <= 8; k_warps *= 2) {
      for (int steps_a_warp = 1; steps_a_warp <= 2; ++steps_a_warp) {
        Product candidate = product;
        MmaPlan plan;
        if (!make_mma_shape(plan.shape, candidate, kernel.vector_length, kernel.tokens, kernel.warps, cluster, clusters,
                            k_warps, steps_a_warp, limits.shared_bytes - kReservedShared))
          continue;
        plan.cluster = cluster;
        plan.rows_per_range = candidate.rows_per_range;
        const double us = predicted_us(plan, product, kernel, steps_a_warp);
        if (best.cluster == 0 || us < best_us) {
          best = plan;
          best_us = us;
        }
      }
    }
  }
  return best;
}

// The plans of the last few matrices, since a model asks for the same ones again for every token.
struct KnownPlan {
  int device, words, num_codebooks;
  uint32_t words_per_group;
  int64_t total_rows;
  MmaPlan plan;
  bool serves(const Product& p, int on_device) const {
    return plan.cluster > 0 && device == on_device && words == p.words && num_codebooks == p.num_codebooks &&
           words_per_group == p.words_per_group.value && total_rows == p.total_rows;
  }
};

template <typename T, int V, int kTokens, bool kScaleSums>
const char* launch(const Product& product, int device, cudaStream_t stream) {
  constexpr int kWarps = kTokens < 32 ? 16 : 8;
  const auto kernel = codebook_mma_kernel<T, V, kTokens, kScaleSums, kWarps>;
  thread_local KnownPlan known[16];
  thread_local int next = 0;
  const KnownPlan* found =
      std::find_if(known, known + 16, [&](const KnownPlan& k) { return k.serves(product, device); });
  if (found == known + 16) {
    KnownPlan& entry = known[next++ % 16];
    entry = {device,
             product.words,
             product.num_codebooks,
             product.words_per_group.value,
             product.total_rows,
             best_plan(product, {V, kTokens, kWarps}, kernel, device)};
    found = &entry;
  }
  if (found->plan.cluster == 0) return kDoesNotFit;
  const MmaShape& shape = found->plan.shape;
  Product planned = product;
  planned.rows_per_range = found->plan.rows_per_range;
  const LaunchConfig config = {shape.clusters * found->plan.cluster, (kWarps + kProducerWarps) * 32, shape.bytes,
                               found->plan.cluster, device_limits(device).capability >= 90};
  return launch_kernel(kernel, config, stream, planned, shape);
}

template <typename T, int V>
const char* launch_tokens(const Product& product, int device, cudaStream_t stream) {
  const bool step_has_one_scale = product.words_per_group.value % 4 == 0;
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
