// Launcher of the psumbook kernel: 2 dtypes x 3 vector lengths x (2 or 4 tables at a time) x (scales shared by two
// codebooks or not) x (one scale a word of codes or not); for two tokens without v = 16 and without a scale a word.
#include "psumbook.cuh"

#include <algorithm>

#include "kernels.h"
#include "launch.h"

namespace codegemm::cuda {
namespace {

constexpr int kMostRows = 8192;  // of a range: 32 KB of sums

// Four tables at a time where a block has more than two slots and the ring keeps 4 stages beside them, else two; sums
// received in a place of their own unless that leaves less than 6 stages.
bool choose_layout(PsumbookLayout& layout, const Product& product, int share, int cluster, bool four, int limit) {
  const struct {
    int chunk, least_stages;
    bool late;
  } tried[] = {{4, 4, false}, {2, 6, false}, {2, 2, true}};
  for (const auto& t : tried) {
    if (t.chunk == 4 && !four) continue;
    for (int stages = kMaxStages; stages >= t.least_stages; --stages) {
      layout = make_psumbook_layout(product, share, cluster, t.chunk, stages, t.late);
      if (layout.bytes <= limit) return true;
    }
  }
  return false;
}

// The largest cluster that K has work for: the more of the chip shares K, the more rows share a table. Clusters of 16
// leave 20 of an H200's 132 multiprocessors idle and are still the fastest at every shape measured.
template <typename T, int V, int kTokens, int kShare, bool kApart>
const char* launch(Product product, int device, cudaStream_t stream) {
  constexpr int kMostSlots = V == 16 ? 2 : 4;
  const auto two = psumbook_kernel<T, V, kTokens, 2, kShare, kApart>;
  const auto four = psumbook_kernel<T, V, kTokens, kMostSlots, kShare, kApart>;
  const int units = (product.words + 7) / 8 * product.num_codebooks / kShare;
  int cluster = 2 * kMaxCluster, clusters = 0;
  while (clusters < 1 && cluster > 1) {
    cluster /= 2;
    if (units >= cluster) clusters = resident_clusters(two, kPsumbookThreads, device, cluster);
  }
  if (clusters < 1) return kDoesNotFit;
  const bool apart = divide_rows(product, clusters, kMostRows);
  PsumbookLayout layout;
  const bool many = kMostSlots == 4 && ceil_div(units, cluster) * kShare > 2;
  if (!choose_layout(layout, product, kShare, cluster, many, device_limits(device).shared_bytes - kReservedShared))
    return kDoesNotFit;
  layout.ranges = make_ranges(product, apart);
  const int ranges = layout.ranges.first[layout.ranges.parts];
  return launch_kernel(layout.chunk == 4 ? four : two,
                       {ranges * cluster, kPsumbookThreads, layout.bytes, cluster, true}, stream, product, layout);
}

template <typename T, int V>
const char* launch_scheme(const Product& product, int device, cudaStream_t stream) {
  const bool even = product.num_codebooks % 2 == 0;  // pairs of codebooks share a scale
  const int groups = stage_groups(product);  // 8: one a word, so that the two words of a lane have different scales
  if (groups == 0) return kDoesNotFit;
  if (product.tokens == 2) {
    if constexpr (V < 16) {
      if (groups == 8) return kDoesNotFit;
      return even ? launch<T, V, 2, 2, false>(product, device, stream)
                  : launch<T, V, 2, 1, false>(product, device, stream);
    }
    return kDoesNotFit;
  }
  if (groups == 8)
    return even ? launch<T, V, 1, 2, true>(product, device, stream) : launch<T, V, 1, 1, true>(product, device, stream);
  return even ? launch<T, V, 1, 2, false>(product, device, stream) : launch<T, V, 1, 1, false>(product, device, stream);
}

template <typename T>
const char* launch_length(const Product& product, int vector_length, int device, cudaStream_t stream) {
  switch (vector_length) {
    case 4:
      return launch_scheme<T, 4>(product, device, stream);
    case 8:
      return launch_scheme<T, 8>(product, device, stream);
    default:
      return launch_scheme<T, 16>(product, device, stream);
  }
}

}  // namespace

const char* psumbook_gemm(const Gemm* calls, int count, int device, cudaStream_t stream) {
  const Product product = make_product(calls, count);
  const int v = calls[0].weight.vector_length;
  return calls[0].weight.dtype == DType::kFloat16 ? launch_length<__half>(product, v, device, stream)
                                                  : launch_length<__nv_bfloat16>(product, v, device, stream);
}

}  // namespace codegemm::cuda
