// Launcher of the psumbook kernel: 2 dtypes x 3 vector lengths x (scales shared by two codebooks or not).
#include "psumbook.cuh"

#include <algorithm>

#include "kernels.h"
#include "launch.h"

namespace codegemm::cuda {
namespace {

constexpr int kQuads = 1, kThreads = kPsumbookThreads;
constexpr int64_t kMostRows = 8192;   // of a range: 32 KB of sums
constexpr int64_t kManyRows = 16384;  // from here clusters of 8, below 16: docs/log.md, "CUDA kernels", third sweep

template <typename T, int V, int kShare, int kSlots>
const char* launch(Product product, int cluster, int clusters, int device, cudaStream_t stream) {
  const int64_t even = ceil_div(ceil_div(product.total_rows, clusters), 16) * 16;
  product.rows_per_range = int(std::min(even, kMostRows));
  const int limit = device_limits(device).shared_bytes - kReservedShared;
  PsumbookLayout layout;
  int stages = kMaxStages;
  do {
    layout = make_psumbook_layout(product, V, kShare, kSlots, kQuads, cluster, stages);
  } while (layout.bytes > limit && --stages > 1);
  if (stages < 2) return kDoesNotFit;
  const int ranges = int(ceil_div(product.total_rows, product.rows_per_range));
  return launch_kernel(psumbook_kernel<T, V, kShare, kSlots, kQuads>,
                       {ranges * cluster, kThreads, layout.bytes, cluster, true}, stream, product, layout);
}

// The larger a cluster, the more rows share a table, and the fewer multiprocessors the chip can give to clusters.
template <typename T, int V, int kShare>
const char* launch(const Product& product, int device, cudaStream_t stream) {
  const int units = (product.words + 7) / 8 * product.num_codebooks / kShare;
  for (int cluster = product.total_rows < kManyRows ? 16 : 8; cluster > 0; cluster /= 2) {
    const auto kernel = psumbook_kernel<T, V, kShare, 2, kQuads>;
    const int clusters = units < cluster ? 0 : resident_clusters(kernel, kThreads, device, cluster);
    if (clusters < 1) continue;
    if (ceil_div(units, cluster) * kShare > 2) {  // two rounds of two slots: better one of four
      const char* error = launch<T, V, kShare, 4>(product, cluster, clusters, device, stream);
      if (error != kDoesNotFit) return error;
    }
    return launch<T, V, kShare, 2>(product, cluster, clusters, device, stream);
  }
  return kDoesNotFit;
}

template <typename T>
const char* launch_scheme(const Product& product, int vector_length, int device, cudaStream_t stream) {
  const bool even = product.num_codebooks % 2 == 0;  // pairs of codebooks share a scale
  switch (vector_length) {
    case 4:
      return even ? launch<T, 4, 2>(product, device, stream) : launch<T, 4, 1>(product, device, stream);
    case 8:
      return even ? launch<T, 8, 2>(product, device, stream) : launch<T, 8, 1>(product, device, stream);
    default:
      return even ? launch<T, 16, 2>(product, device, stream) : launch<T, 16, 1>(product, device, stream);
  }
}

}  // namespace

const char* psumbook_gemm(const Gemm* calls, int count, int device, cudaStream_t stream) {
  const Product product = make_product(calls, count);
  const int v = calls[0].weight.vector_length;
  return calls[0].weight.dtype == DType::kFloat16 ? launch_scheme<__half>(product, v, device, stream)
                                                  : launch_scheme<__nv_bfloat16>(product, v, device, stream);
}

}  // namespace codegemm::cuda
