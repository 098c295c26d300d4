// Times tile constants and launch plans of the fast kernels against reading the same bytes. Needs nvcc and a GPU only:
//   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -Icsrc benchmarks/sweep.cu -o sweep && ./sweep
//   results.jsonl
#include <cmath>
#include <string>

#include "cuda/codebook_gemm.cuh"
#include "cuda/codebook_mma.cuh"
#include "cuda/psumbook.cuh"
#include "cuda/launch.h"
#include "cuda/tile_map.h"
#include "measure.cuh"

using namespace codegemm;
using namespace codegemm::cuda;
using bench::Buffer;

namespace {

constexpr size_t kPoolBytes = size_t(1) << 30;
constexpr int kSharedLimit = 227 * 1024;
std::vector<int> clusters_tried = {1, 2, 4, 8, 16}, stages_tried = {2, 3, 4, 6, 8};
using T = __half;

struct Data {
  Buffer<uint32_t> codes{kPoolBytes / 4};
  Buffer<T> codebooks{4 * 256 * 16}, scales{size_t(64) << 20}, x{512 * 32768}, y{512 * 65536};
  Buffer<uint32_t> never{1};
};

struct Problem {
  int rows, columns, m, v, g, tokens;
};

Gemm make_call(const Data& d, const Problem& q, int copy) {
  const size_t words = size_t(q.m) * q.columns / (4 * q.v) * q.rows;
  const size_t copies = std::max<size_t>(1, d.codes.count / words);
  const int64_t groups = q.g < 0 ? 1 : q.columns / q.g;
  const size_t scale_copies = std::max<size_t>(1, d.scales.count / (groups * q.rows));
  const Weight weight = {d.codes.data + copy % copies * words,
                         d.codebooks.data,
                         d.scales.data + copy % scale_copies * groups * q.rows,
                         q.m,
                         q.v,
                         groups,
                         q.rows,
                         q.columns,
                         DType::kFloat16};
  return {weight, d.x.data, q.columns, nullptr, d.y.data, q.tokens};
}

int copies_for(const Problem& q) {  // enough that nothing stays in the 60 MB of L2, at least 12 launches
  const double bytes = double(q.m) * q.columns / q.v * q.rows;
  return std::clamp(int(320e6 / bytes), 12, 60);
}

void report(FILE* out, const Problem& q, const char* kernel, const std::string& plan, double us, double stream) {
  std::fprintf(out,
               "{\"N\":%d,\"K\":%d,\"scheme\":\"m%dv%dg%d\",\"batch\":%d,\"kernel\":\"%s\",\"plan\":\"%s\",\"us\":%.2f,"
               "\"stream\":%.2f,\"ratio\":%.3f}\n",
               q.rows, q.columns, q.m, q.v, q.g, q.tokens, kernel, plan.c_str(), us, stream, us / stream);
  std::fflush(out);
}

template <int V, int kSlots, int kShare>
void time_psumbook(FILE* out, const Data& d, const Problem& q, double stream_us) {
  const auto kernel = psumbook_kernel<T, V, 1, kSlots, kShare, false>;
  for (int cluster : clusters_tried) {
    for (int stages : stages_tried) {
      Gemm call = make_call(d, q, 0);
      Product p = make_product(&call, 1);
      LaunchConfig config = {0, kPsumbookThreads, kSharedLimit - 2048, cluster, true};
      const int clusters = active_clusters(kernel, config);
      if (clusters == 0) continue;
      p.rows_per_range = int(ceil_div(ceil_div(q.rows, clusters), kWarpRows) * kWarpRows);
      PsumbookLayout layout = make_psumbook_layout(p, kShare, cluster, kSlots, stages, false);
      if (layout.bytes > kSharedLimit - 2048) layout = make_psumbook_layout(p, kShare, cluster, kSlots, stages, true);
      config.shared_bytes = layout.bytes;
      if (config.shared_bytes > kSharedLimit - 2048) continue;
      const int ranges = int(ceil_div(q.rows, p.rows_per_range));
      config.blocks = ranges * cluster;
      const double us = bench::graph_time(copies_for(q), 7, [&](int i, cudaStream_t stream) {
        Gemm c = make_call(d, q, i);
        Product product = make_product(&c, 1);
        product.rows_per_range = p.rows_per_range;
        bench::require(launch_kernel(kernel, config, stream, product, layout), "psumbook");
      });
      char plan[160];
      std::snprintf(plan, sizeof plan, "cluster %d stages %d tables %d ranges %d rows %d shared %d", cluster, stages,
                    kSlots, ranges, p.rows_per_range, layout.bytes);
      report(out, q, "psumbook", plan, us, stream_us);
    }
  }
}

template <int V, int kTokens>
void time_mma(FILE* out, const Data& d, const Problem& q, double stream_us) {
  const auto kernel = codebook_mma_kernel<T, V, kTokens, true>;
  for (int cluster : clusters_tried) {
    for (int warps : {8, 16}) {
      const int clusters =
          cluster == 1 ? 132 : active_clusters(kernel, {0, warps * 32, kSharedLimit - 2048, cluster, false});
      Gemm call = make_call(d, q, 0);
      Product p = make_product(&call, 1);
      MmaShape shape;
      if (!make_mma_shape(shape, p, {V, kTokens, true}, warps, cluster, clusters, kSharedLimit - 2048)) continue;
      const LaunchConfig config = {shape.clusters * cluster, warps * 32, shape.bytes, cluster, true};
      const double us = bench::graph_time(copies_for(q), 5, [&](int i, cudaStream_t stream) {
        Gemm c = make_call(d, q, i);
        Product product = make_product(&c, 1);
        product.rows_per_range = p.rows_per_range;
        bench::require(launch_kernel(kernel, config, stream, product, shape), "codebook_mma");
      });
      char plan[160];
      std::snprintf(plan, sizeof plan, "tokens %d cluster %d of %d warps %d ranges %d rows %d chunks %d of %d", kTokens,
                    cluster, clusters, warps, shape.first_range[kMaxSegments], p.rows_per_range, shape.staged_chunks,
                    shape.chunks.first(1));
      report(out, q, "mma", plan, us, stream_us);
    }
  }
}

template <int V, int kTiles, int kStrips>
void time_gemm(FILE* out, const Data& d, const Problem& q, double stream_us) {
  const auto kernel = codebook_gemm_kernel<T, V, kTiles, kStrips, V / 4>;
  for (int cluster = 1; cluster <= 16; ++cluster) {
    Gemm call = make_call(d, q, 0);
    Product p = make_product(&call, 1);
    const GemmShape shape = make_gemm_shape(p, V, 16 * kTiles, kStrips, cluster);
    const LaunchConfig config = {shape.first_block[kMaxSegments] * cluster, kGemmWarps * 32, shape.bytes, cluster,
                                 true};
    const int clusters = active_clusters(kernel, config);
    if (shape.stages.each < 1 || clusters < 1) continue;
    const double us = bench::graph_time(copies_for(q), 5, [&](int i, cudaStream_t stream) {
      Gemm c = make_call(d, q, i);
      Product product = make_product(&c, 1);
      product.rows_per_range = p.rows_per_range;
      bench::require(launch_kernel(kernel, config, stream, product, shape), "codebook_gemm");
    });
    char plan[160];
    std::snprintf(plan, sizeof plan, "tokens %d strips %d cluster %d of %d blocks %d stages %d", 16 * kTiles, kStrips,
                  cluster, clusters, config.blocks, shape.stages.first(1));
    report(out, q, "gemm", plan, us, stream_us);
  }
}

template <int V, int kBooks, int kN>
void time_wgmma(FILE* out, const Data& d, const Problem& q, double stream_us) {
  constexpr bool kPair = kN == 256;
  const auto kernel = codebook_wgmma_kernel<T, V, kBooks, kN>;
  for (int groups = 2; groups <= kMostGroups<kN>; groups += 2) {
    for (int cluster = kPair ? 2 : 1; cluster <= (kPair ? 2 : 8); ++cluster) {
      Gemm call = make_call(d, q, 0);
      const Product p = make_product(&call, 1);
      const BlockKind kind = {groups, cluster, kPair};
      WgmmaShape shape = make_wgmma_shape(p, V, kN, kind, kSharedLimit - 2048, 1);
      LaunchConfig config = {0, groups * 128 + kProducerThreads, shape.bytes, cluster, true};
      const int clusters = active_clusters(kernel, config);
      TileMap x;
      if (shape.shares.each < 1 || clusters < 1 || !make_tile_map(x, p, q.columns, kN / shape.pair)) continue;
      shape = make_wgmma_shape(p, V, kN, kind, kSharedLimit - 2048, clusters);
      config.blocks = shape.clusters * cluster;
      const double us = bench::graph_time(copies_for(q), 5, [&](int i, cudaStream_t stream) {
        Gemm c = make_call(d, q, i);
        bench::require(launch_kernel(kernel, config, stream, make_product(&c, 1), shape, x), "codebook_wgmma");
      });
      char plan[160];
      std::snprintf(plan, sizeof plan, "tokens %d groups %d cluster %d of %d items %d stages %d slots %d", kN, groups,
                    cluster, clusters, shape.items, shape.stages, shape.slots);
      report(out, q, "wgmma", plan, us, stream_us);
    }
  }
}

double stream_time(const Data& d, const Problem& q) {
  const size_t bytes = size_t(q.m) * q.columns / q.v * q.rows;
  double best = 1e9;
  for (int blocks : {132, 264, 528, 1056})
    best = std::min(best, bench::graph_time(copies_for(q), 7, [&](int i, cudaStream_t stream) {
                      bench::read_bytes<<<blocks, 512, 0, stream>>>(
                          reinterpret_cast<const uint4*>(make_call(d, q, i).weight.codes), bytes / 16, d.never.data);
                    }));
  return best;
}

template <int V>
void sweep_batches(FILE* out, const Data& d, Problem q, double stream) {
  q.tokens = 8;
  time_mma<V, 8>(out, d, q, stream);
  q.tokens = 16;
  time_mma<V, 16>(out, d, q, stream);
  q.tokens = 32;
  time_gemm<V, 2, 1>(out, d, q, stream);
  if (V == 8) time_gemm<V, 2, V == 8 ? 2 : 1>(out, d, q, stream);
  q.tokens = 64;
  time_gemm<V, 4, 1>(out, d, q, stream);
  if (V == 4) time_gemm<V, 4, V == 4 ? 2 : 1>(out, d, q, stream);
  time_wgmma<V, V / 4, 64>(out, d, q, stream);
  q.tokens = 32;
  time_wgmma<V, V / 4, 32>(out, d, q, stream);
  q.tokens = 128;
  time_wgmma<V, V / 4, 128>(out, d, q, stream);
  q.tokens = 512;
  time_wgmma<V, V / 4, 256>(out, d, q, stream);
}

// One plan of each kernel, to be run under a profiler.
void profile(FILE* out, const Data& d) {
  Problem q = {28672, 4096, 1, 4, 128, 1};
  clusters_tried = {8};
  stages_tried = {4};
  time_psumbook<4, 2, 1>(out, d, q, 1);
  q.tokens = 8;
  clusters_tried = {2};
  time_mma<4, 8>(out, d, q, 1);
  q.tokens = 64;
  time_gemm<4, 4, 2>(out, d, q, 1);
}

}  // namespace

int main(int argc, char** argv) {
  FILE* out = argc > 1 ? std::fopen(argv[1], "w") : stdout;
  const bool batches = argc > 2;
  Data d;
  bench::fill_words<<<1024, 256>>>(d.codes.data, d.codes.count, 1);
  bench::fill_floats<T><<<1024, 256>>>(d.codebooks.data, d.codebooks.count, 2, 0.0f, 0.5f);
  bench::fill_floats<T><<<1024, 256>>>(d.scales.data, d.scales.count, 3, 0.02f, 0.005f);
  bench::fill_floats<T><<<1024, 256>>>(d.x.data, d.x.count, 4, 0.0f, 1.0f);
  bench::require(cudaDeviceSynchronize(), "random data");
  if (argc > 2 && std::string(argv[2]) == "profile") {
    profile(out, d);
    return 0;
  }
  const int shapes[][2] = {{28672, 4096}, {4096, 4096}, {4096, 14336}, {57344, 8192},
                           {8192, 28672}, {6144, 4096}, {8192, 8192},  {10240, 8192}};
  for (const auto& s : shapes) {
    Problem q = {s[0], s[1], 1, 4, 128, 1};
    const double stream = stream_time(d, q);
    report(out, q, "stream", "", stream, stream);
    time_psumbook<4, 2, 1>(out, d, q, stream);
    time_psumbook<4, 4, 1>(out, d, q, stream);
    if (batches) sweep_batches<4>(out, d, q, stream);
    q = {s[0], s[1], 2, 8, 128, 1};
    time_psumbook<8, 2, 2>(out, d, q, stream);
    time_psumbook<8, 4, 2>(out, d, q, stream);
    if (batches) sweep_batches<8>(out, d, q, stream);
  }
  return 0;
}
