// Launcher of the kernel for Hopper: 2 dtypes x 2 vector lengths x 1 or 2 codebooks x 32, 64, 128 or 256 tokens a
// block. This file alone is compiled for sm_90a, and called on devices of capability 9.0.
#include "codebook_wgmma.cuh"

#include <algorithm>

#include "kernels.h"
#include "launch.h"
#include "plans.h"
#include "tile_map.h"

namespace codegemm::cuda {
namespace {

constexpr int kMostBlocks = 8;  // of a cluster; larger ones were never the best

struct WgmmaPlan {
  BlockKind kind = {0, 0, false};  // of 0 warpgroups: none fits
  int resident;                    // clusters that run at once
  double us;
  WgmmaShape shape;
};

// Microseconds that a plan takes on an H200, fitted to the sweeps of docs/log.md, "CUDA kernels", eleventh version:
// within 6 % on average, and the plan chosen 0.4 % from the best; 1.7 % (at worst 11 %) at token counts between them.
double predicted_us(const WgmmaPlan& plan, int books, int tokens, int multiprocessors) {
  const int groups = plan.kind.groups, cluster = plan.kind.cluster;
  const double stage =
      tokens == 256 ? 0.635 + 0.045 * books : 0.13 + groups * (0.037 + 0.00086 * tokens + 0.039 * (books - 1));
  const double exchange = 0.0175 * tokens * groups * (cluster - 1) / cluster;
  const auto round = [&](int clusters, bool divides) {                       // an item each
    const int sharing = int(ceil_div(clusters * cluster, multiprocessors));  // blocks of a multiprocessor
    return 2.2 + (divides ? exchange : 0) +
           sharing * stage * (divides ? plan.shape.shares.first(1) : plan.shape.stages);
  };
  const auto rounds = [&](int items, bool divides) {
    const int full = items / plan.resident, rest = items % plan.resident;
    // Blocks of a first round that is not full share multiprocessors all the same: they start while the previous kernel
    // ends, wherever there is room.
    return full * round(plan.resident, divides) + (rest == 0 ? 0 : round(full == 0 ? plan.resident : rest, divides));
  };
  return rounds(plan.shape.whole, false) + rounds(plan.shape.items - plan.shape.whole, true);
}

// The best plan among the kinds of block that kN tokens can have.
template <typename T, int V, int kBooks, int kN>
class Planner {
 public:
  Planner(const Product& product, int device) : product_(product), limits_(device_limits(device)), device_(device) {}

  WgmmaPlan best() {
    if constexpr (kN == 256) {
      consider({2, 2, true});
    } else {
      for (int cluster = 1; cluster <= kMostBlocks; ++cluster) {
        consider({2, cluster, false});
        consider({4, cluster, false});
      }
    }
    return best_;
  }

 private:
  void consider(const BlockKind& kind) {
    const int room = limits_.shared_bytes - kReservedShared;
    WgmmaPlan plan = {kind, 1, 0, make_wgmma_shape(product_, V, kN, kind, room, 1)};
    if (plan.shape.shares.each < 1 || plan.shape.slots < 3 || plan.shape.bytes > room) return;
    plan.resident = resident(kind, plan.shape.bytes);
    if (plan.resident < 1) return;
    plan.shape = make_wgmma_shape(product_, V, kN, kind, room, plan.resident);
    plan.us = predicted_us(plan, kBooks, kN, limits_.multiprocessors);
    if (best_.kind.groups == 0 || plan.us < best_.us) best_ = plan;
  }
  // Asked for once a device and kind, since that takes long; `bytes` of one kind hardly differ.
  int resident(const BlockKind& kind, int bytes) const {
    thread_local int known_device = -1, clusters[2][kMostBlocks + 1];
    if (known_device != device_) {
      std::fill_n(clusters[0], 2 * (kMostBlocks + 1), -1);
      known_device = device_;
    }
    int& known = clusters[kind.groups / 4][kind.cluster];
    if (known < 0)
      known = active_clusters(codebook_wgmma_kernel<T, V, kBooks, kN>,
                              {0, kind.groups * 128 + kProducerThreads, bytes, kind.cluster, false});
    return known;
  }

  const Product& product_;
  const DeviceLimits& limits_;
  int device_;
  WgmmaPlan best_;
};

template <typename T, int V, int kBooks, int kN>
const WgmmaPlan& plan_of(const Product& product, int device) {
  thread_local PlanCache<WgmmaPlan> known;
  return known.find(PlanKey(product, device, int(ceil_div(product.tokens, kN))),
                    [&] { return Planner<T, V, kBooks, kN>(product, device).best(); });
}

template <typename T, int V, int kBooks, int kN>
const char* launch(const Product& product, const WgmmaPlan& plan, cudaStream_t stream) {
  TileMap x;
  const auto& [kind, resident, us, shape] = plan;
  if (kind.groups == 0 || !make_tile_map(x, product, product.words * (4 * V), kN / shape.pair)) return kDoesNotFit;
  const LaunchConfig config = {shape.clusters * kind.cluster, kind.groups * 128 + kProducerThreads, shape.bytes,
                               kind.cluster, true};
  return launch_kernel(codebook_wgmma_kernel<T, V, kBooks, kN>, config, stream, product, shape, x);
}

// The best single launch: its tokens a block, 0 if there is none, and what it takes.
template <typename T, int V, int kBooks>
struct Choice {
  int tokens_a_block = 0;
  double us = 1e30;

  Choice(const Product& product, int device) {
    if (product.tokens <= 32) {
      consider<32>(product, device);
    } else {
      if (product.tokens <= 128) consider<64>(product, device);
      if (product.tokens > 64) consider<128>(product, device);
      if (product.tokens > 128) consider<256>(product, device);
    }
  }
  template <int kN>
  void consider(const Product& product, int device) {
    const WgmmaPlan& plan = plan_of<T, V, kBooks, kN>(product, device);
    if (plan.kind.groups == 0 || plan.us >= us) return;
    us = plan.us;
    tokens_a_block = kN;
  }
};

// Tokens [first, first + count) of a product.
template <typename T>
Product slice(Product product, int first, int count) {
  product.tokens = count;
  product.x = static_cast<const T*>(product.x) + first * product.x_row_stride;
  for (Segment& segment : product.segment) segment.y = static_cast<T*>(segment.y) + first * segment.out_features;
  return product;
}

template <typename T, int V, int kBooks>
const char* launch_once(const Product& product, int tokens_a_block, int device, cudaStream_t stream) {
  switch (tokens_a_block) {
    case 32:
      return launch<T, V, kBooks, 32>(product, plan_of<T, V, kBooks, 32>(product, device), stream);
    case 64:
      return launch<T, V, kBooks, 64>(product, plan_of<T, V, kBooks, 64>(product, device), stream);
    case 128:
      return launch<T, V, kBooks, 128>(product, plan_of<T, V, kBooks, 128>(product, device), stream);
    case 256:
      return launch<T, V, kBooks, 256>(product, plan_of<T, V, kBooks, 256>(product, device), stream);
  }
  return kDoesNotFit;
}

// In one launch, or in two where that is 4 % quicker: tokens that fill tiles, and the rest. 384 tokens of 28672 x 4096,
// m2v8: 172 us, by three tiles of 128 189; 640 tokens 275 and 307.
template <typename T, int V, int kBooks>
const char* launch_tokens(const Product& product, int device, cudaStream_t stream) {
  const auto best = [&](const Product& part) { return Choice<T, V, kBooks>(part, device); };
  const auto whole = best(product);
  int head = 0;
  double us = 0.96 * whole.us;
  for (const int tile : {128, 256, 512}) {
    const int first = (product.tokens - 1) / tile * tile;
    if (first == 0 || (tile == 128 && first > tile)) continue;
    const double both =
        best(slice<T>(product, 0, first)).us + best(slice<T>(product, first, product.tokens - first)).us;
    if (both >= us) continue;
    us = both;
    head = first;
  }
  if (head == 0) return launch_once<T, V, kBooks>(product, whole.tokens_a_block, device, stream);
  const Product first = slice<T>(product, 0, head), rest = slice<T>(product, head, product.tokens - head);
  const char* error = launch_once<T, V, kBooks>(first, best(first).tokens_a_block, device, stream);
  return error ? error : launch_once<T, V, kBooks>(rest, best(rest).tokens_a_block, device, stream);
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
