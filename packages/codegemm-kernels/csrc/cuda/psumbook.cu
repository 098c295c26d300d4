// Launcher of the psumbook kernel: 2 dtypes x 3 vector lengths x (scales shared by two codebooks or not).
#include "psumbook.cuh"

#include <algorithm>

#include "kernels.h"
#include "launch.h"

namespace codegemm::cuda {
namespace {

constexpr int64_t kMostRows = 8192;  // of a range: 32 KB of sums
constexpr int kStages = 4;           // more of them do not help (docs/log.md, "CUDA kernels", sixth sweep)

// The largest cluster that K has work for: the more of the chip shares K, the more rows share a table. Clusters of 16
// leave 20 of an H200's 132 multiprocessors idle and are still the fastest at every shape measured.
template <typename T, int V, int kShare>
const char* launch(Product product, int device, cudaStream_t stream) {
  const auto kernel = psumbook_kernel<T, V, kShare>;
  const int units = (product.words + 7) / 8 * product.num_codebooks / kShare;
  int cluster = 2 * kMaxCluster, clusters = 0;
  while (clusters < 1 && cluster > 1) {
    cluster /= 2;
    if (units >= cluster) clusters = resident_clusters(kernel, kPsumbookThreads, device, cluster);
  }
  if (clusters < 1) return kDoesNotFit;
  const int64_t even = ceil_div(ceil_div(product.total_rows, clusters), 16) * 16;
  product.rows_per_range = int(std::min(even, kMostRows));
  const int limit = device_limits(device).shared_bytes - kReservedShared;
  PsumbookLayout layout;
  int stages = kStages;
  do {
    layout = make_psumbook_layout(product, kShare, cluster, stages);
  } while (layout.bytes > limit && --stages > 1);
  if (stages < 2) return kDoesNotFit;
  const int ranges = int(ceil_div(product.total_rows, product.rows_per_range));
  return launch_kernel(kernel, {ranges * cluster, kPsumbookThreads, layout.bytes, cluster, true}, stream, product,
                       layout);
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
