// Launcher of the kernel for Hopper: 2 dtypes x 2 vector lengths x 1 or 2 codebooks x 32, 64 or 128 tokens a block.
// This file alone is compiled for sm_90a, and called on devices of capability 9.0.
#include "codebook_wgmma.cuh"

#include "kernels.h"
#include "launch.h"
#include "plans.h"
#include "tile_map.h"

namespace codegemm::cuda {
namespace {

constexpr int kMostBlocks = 8;  // of a cluster; larger ones were never the best

// How a block can be: its warpgroups, and whether it leaves half of a multiprocessor to another.
struct BlockKind {
  int groups;
  bool half;
};
constexpr BlockKind kKinds[] = {{4, false}, {2, false}, {2, true}};

struct WgmmaPlan {
  int cluster = 0;  // 0: none fits
  int groups;
  double us;
  WgmmaShape shape;
};

// Microseconds that a plan takes on an H200 while `resident` clusters run at once, fitted to the sweep of docs/log.md,
// "CUDA kernels", tenth version: within 7 %, and the plan chosen 1 % from the best.
double predicted_us(const WgmmaPlan& plan, int books, int tokens, int resident, int multiprocessors) {
  const auto wave = [&](int blocks) {  // of blocks that a multiprocessor has at once
    const double stage = blocks * (plan.groups * (0.055 + 0.00091 * tokens + 0.043 * (books - 1)) + 0.041);
    return plan.shape.stages.first(1) * stage + 3.6 + 0.02 * tokens;
  };
  const auto blocks = [&](int clusters) { return int(ceil_div(clusters * plan.cluster, multiprocessors)); };
  const int clusters = plan.shape.first_tile[kMaxSegments] * plan.shape.token_tiles;
  const int waves = clusters / resident, rest = clusters % resident, most = blocks(resident);
  // Blocks of a first wave that is not full share multiprocessors all the same: they start while the previous kernel
  // ends, wherever there is room.
  return waves * wave(most) + (rest == 0 ? 0 : wave(waves == 0 ? most : blocks(rest))) + 0.2 * plan.cluster;
}

// Clusters of each kind of block and size that run at once; asked for once a device, since that takes long.
template <typename Kernel>
struct Residents {
  int device = -1, clusters[3][kMostBlocks + 1];

  void find(Kernel* kernel, int on_device, const int (&bytes)[3]) {
    if (device == on_device) return;
    device = on_device;
    for (int kind = 0; kind < 3; ++kind)
      for (int cluster = 1; cluster <= kMostBlocks; ++cluster)
        clusters[kind][cluster] =
            active_clusters(kernel, {0, kKinds[kind].groups * 128 + kProducerThreads, bytes[kind], cluster, false});
  }
};

template <typename T, int V, int kBooks, int kN>
WgmmaPlan best_plan(const Product& product, int device) {
  const auto kernel = codebook_wgmma_kernel<T, V, kBooks, kN>;
  const DeviceLimits& limits = device_limits(device);
  const int room = limits.shared_bytes - kReservedShared;
  const auto shape_of = [&](BlockKind kind, int cluster) {
    Product candidate = product;
    return make_wgmma_shape(candidate, V, kN, kind.groups, cluster, kind.half ? room / 2 : room);
  };
  const int bytes[3] = {shape_of(kKinds[0], 1).bytes, shape_of(kKinds[1], 1).bytes, shape_of(kKinds[2], 1).bytes};
  thread_local Residents<std::remove_pointer_t<decltype(kernel)>> residents;
  residents.find(kernel, device, bytes);
  WgmmaPlan best;
  for (int kind = 0; kind < 3; ++kind) {
    for (int cluster = 1; cluster <= kMostBlocks; ++cluster) {
      const int resident = residents.clusters[kind][cluster];
      WgmmaPlan plan = {cluster, kKinds[kind].groups, 0, shape_of(kKinds[kind], cluster)};
      if (resident < 1 || plan.shape.stages.each < 1 || plan.shape.slots < 3 || plan.shape.bytes > room) continue;
      plan.us = predicted_us(plan, kBooks, kN, resident, limits.multiprocessors);
      if (best.cluster == 0 || plan.us < best.us) best = plan;
    }
  }
  return best;
}

template <typename T, int V, int kBooks, int kN>
const WgmmaPlan& plan_of(const Product& product, int device) {
  thread_local PlanCache<WgmmaPlan> known;
  return known.find(PlanKey(product, device, int(ceil_div(product.tokens, kN))),
                    [&] { return best_plan<T, V, kBooks, kN>(product, device); });
}

template <typename T, int V, int kBooks, int kN>
const char* launch(Product product, const WgmmaPlan& plan, cudaStream_t stream) {
  TileMap x;
  if (plan.cluster == 0 || !make_tile_map(x, product, product.words * (4 * V), kN)) return kDoesNotFit;
  product.rows_per_range = 64 * plan.groups;
  const LaunchConfig config = {plan.shape.first_tile[kMaxSegments] * plan.shape.token_tiles * plan.cluster,
                               plan.groups * 128 + kProducerThreads, plan.shape.bytes, plan.cluster, true};
  return launch_kernel(codebook_wgmma_kernel<T, V, kBooks, kN>, config, stream, product, plan.shape, x);
}

template <typename T, int V, int kBooks>
const char* launch_tokens(const Product& product, int device, cudaStream_t stream) {
  if (product.tokens <= 32)
    return launch<T, V, kBooks, 32>(product, plan_of<T, V, kBooks, 32>(product, device), stream);
  const WgmmaPlan& narrow = plan_of<T, V, kBooks, 64>(product, device);
  if (product.tokens > 64) {
    const WgmmaPlan& wide = plan_of<T, V, kBooks, 128>(product, device);
    if (wide.cluster > 0 && (narrow.cluster == 0 || wide.us < narrow.us))
      return launch<T, V, kBooks, 128>(product, wide, stream);
  }
  return launch<T, V, kBooks, 64>(product, narrow, stream);
}

template <typename T>
const char* launch_scheme(const Product& product, int vector_length, int device, cudaStream_t stream) {
  const bool two = product.num_codebooks == 2;
  if (vector_length == 4)
    return two ? launch_tokens<T, 4, 2>(product, device, stream) : launch_tokens<T, 4, 1>(product, device, stream);
  return two ? launch_tokens<T, 8, 2>(product, device, stream) : launch_tokens<T, 8, 1>(product, device, stream);
}

}  // namespace

const char* codebook_wgmma_gemm(const Gemm* calls, int count, int device, cudaStream_t stream) {
  const Product product = make_product(calls, count);
  const int v = calls[0].weight.vector_length;
  if (!fits_wgmma(product, v)) return kDoesNotFit;
  return calls[0].weight.dtype == DType::kFloat16 ? launch_scheme<__half>(product, v, device, stream)
                                                  : launch_scheme<__nv_bfloat16>(product, v, device, stream);
}

}  // namespace codegemm::cuda
