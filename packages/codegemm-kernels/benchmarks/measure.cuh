// What the programs of this folder share: random matrices on the GPU, the exact product in fp64, graph-replay times.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "codegemm.h"
#include "cuda/element.cuh"

namespace bench {

inline void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}
inline void require(const char* failure, const char* what) {
  if (!failure) return;
  std::fprintf(stderr, "%s: %s\n", what, failure);
  std::exit(1);
}

// Device memory that lives until the program ends or `release`.
template <typename T>
struct Buffer {
  T* data = nullptr;
  size_t count = 0;
  explicit Buffer(size_t n) : count(n) {
    if (n) require(cudaMalloc(&data, n * sizeof(T)), "cudaMalloc");
  }
  ~Buffer() { cudaFree(data); }
  Buffer(const Buffer&) = delete;
};

__device__ __forceinline__ uint32_t hash(uint64_t i) {
  i = (i ^ (i >> 30)) * 0xbf58476d1ce4e5b9ull;
  i = (i ^ (i >> 27)) * 0x94d049bb133111ebull;
  return uint32_t((i ^ (i >> 31)) >> 16);
}

__global__ void fill_words(uint32_t* out, size_t n, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x)
    out[i] = hash(i + (seed << 40) + 1);
}

// center + width * (sum of four uniforms of variance 1): nearly normal.
template <typename T>
__global__ void fill_floats(T* out, size_t n, uint64_t seed, float center, float width) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
    float sum = 0;
    for (int k = 0; k < 4; ++k) sum += hash(4 * i + k + (seed << 40) + 1) * (1.0f / 4294967296.0f) - 0.5f;
    out[i] = codegemm::cuda::from_float<T>(center + width * sum * 1.7320508f);
  }
}

// Exact product and the size sum|w||x| + |bias| of each output, in fp64: one thread an output.
template <typename T>
__global__ void exact_gemm(codegemm::Gemm call, double* exact, double* size) {
  using codegemm::cuda::to_float;
  const codegemm::Weight& w = call.weight;
  const int64_t index = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (index >= call.rows * w.out_features) return;
  const int64_t token = index / w.out_features, row = index % w.out_features, v = w.vector_length;
  const int64_t words = w.in_features / (4 * v), group = w.in_features / w.num_groups;
  const T* x = static_cast<const T*>(call.x) + token * call.x_row_stride;
  double sum = 0, magnitude = 0;
  for (int64_t k = 0; k < w.in_features; ++k) {
    const int64_t vector = k / v;
    double weight = 0;
    for (int i = 0; i < w.num_codebooks; ++i) {
      const uint32_t code = (w.codes[(i * words + vector / 4) * w.out_features + row] >> (8 * (vector % 4))) & 255;
      weight += to_float(static_cast<const T*>(w.codebooks)[(i * 256 + code) * v + k % v]);
    }
    weight *= to_float(static_cast<const T*>(w.scales)[k / group * w.out_features + row]);
    const double product = weight * to_float(x[k]);
    sum += product;
    magnitude += fabs(product);
  }
  const double bias = call.bias ? to_float(static_cast<const T*>(call.bias)[row]) : 0.0f;
  exact[index] = sum + bias;
  size[index] = magnitude + fabs(bias);
}

struct Errors {
  double norm;     // |y - exact| / |exact|, Euclidean norms
  double largest;  // largest |y - exact| / (sum |w||x| + |bias|)
};

template <typename T>
Errors compare(const codegemm::Gemm& call) {
  const size_t n = call.rows * call.weight.out_features;
  Buffer<double> exact(n), size(n);
  exact_gemm<T><<<(n + 127) / 128, 128>>>(call, exact.data, size.data);
  std::vector<double> e(n), s(n);
  std::vector<T> y(n);
  require(cudaMemcpy(e.data(), exact.data, n * 8, cudaMemcpyDeviceToHost), "exact product");
  require(cudaMemcpy(s.data(), size.data, n * 8, cudaMemcpyDeviceToHost), "exact product");
  require(cudaMemcpy(y.data(), call.y, n * sizeof(T), cudaMemcpyDeviceToHost), "y");
  double error = 0, norm = 0, largest = 0;
  for (size_t i = 0; i < n; ++i) {
    const double difference = double(float(y[i])) - e[i];
    error += difference * difference;
    norm += e[i] * e[i];
    largest = std::max(largest, !(difference == difference) ? INFINITY : std::abs(difference) / s[i]);
  }
  return {!(error == error) ? INFINITY : std::sqrt(error / norm), largest};
}

// Microseconds a launch: `launch(i, stream)` for i = 0 .. launches-1 captured in one graph, median of its replays.
inline double graph_time(int launches, int replays, const std::function<void(int, cudaStream_t)>& launch) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cudaEvent_t start, stop;
  require(cudaStreamCreate(&stream), "stream");
  require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < launches; ++i) launch(i, stream);
  require(cudaStreamEndCapture(stream, &graph), "capture");
  require(cudaGraphInstantiate(&executable, graph, 0), "graph");
  require(cudaEventCreate(&start), "event");
  require(cudaEventCreate(&stop), "event");
  std::vector<float> times;
  for (int i = 0; i < replays + 2; ++i) {
    require(cudaEventRecord(start, stream), "event");
    require(cudaGraphLaunch(executable, stream), "replay");
    require(cudaEventRecord(stop, stream), "event");
    require(cudaEventSynchronize(stop), "replay");
    float ms;
    require(cudaEventElapsedTime(&ms, start, stop), "event");
    if (i >= 2) times.push_back(ms * 1000 / launches);
  }
  std::sort(times.begin(), times.end());
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  return times[times.size() / 2];
}

// Reads n bytes and does nothing else: what a kernel that has to see every code cannot beat.
__global__ void __launch_bounds__(512) read_bytes(const uint4* data, size_t n, uint32_t* never) {
  uint32_t mix = 0;
  const size_t step = size_t(gridDim.x) * blockDim.x;
  size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x;
  for (; i + 3 * step < n; i += 4 * step) {
    uint4 word[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) word[k] = __ldcs(data + i + k * step);
#pragma unroll
    for (int k = 0; k < 4; ++k) mix |= word[k].x & word[k].y & word[k].z & word[k].w;
  }
  for (; i < n; i += step) mix |= data[i].x & data[i].y & data[i].z & data[i].w;
  if (mix == 0x12345678u) *never = mix;
}

}  // namespace bench
