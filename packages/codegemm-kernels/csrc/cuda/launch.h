// Launching a kernel with its shared memory, cluster and dependent-launch attributes set.
#pragma once
#include <cuda_runtime.h>

#include <set>
#include <utility>

#include "device.h"

namespace codegemm::cuda {

constexpr int kReservedShared = 2048;  // a block's static shared memory (barriers, alignment)

struct LaunchConfig {
  int blocks;
  int threads;
  int shared_bytes;
  int cluster;     // blocks a cluster; 1 before sm_90
  bool dependent;  // may start before the previous kernel of the stream has ended (sm_90 and later)
};

// Raises the kernel's limits to those of the current device, once a kernel and device; null or the failure. Launches
// take turns (bindings.cpp), so nothing guards what is known here.
template <typename... Parameters>
const char* prepare_kernel(void (*kernel)(Parameters...)) {
  static std::set<std::pair<void (*)(Parameters...), int>> prepared;
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return DeviceGuard::describe(status);
  if (prepared.count({kernel, device})) return nullptr;
  const DeviceLimits& limits = device_limits(device);
  status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_bytes - kReservedShared);
  if (status == cudaSuccess)  // several blocks a multiprocessor where they fit
    status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (limits.capability >= 90)  // more than 8 blocks: where that is refused, no such cluster is resident
    DeviceGuard::describe(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  if (status == cudaSuccess) prepared.insert({kernel, device});
  return DeviceGuard::describe(status);
}

template <typename... Parameters>
const char* launch_kernel(void (*kernel)(Parameters...), const LaunchConfig& config, cudaStream_t stream,
                          const Parameters&... parameters) {
  if (const char* error = prepare_kernel(kernel)) return error;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(config.blocks);
  launch.blockDim = dim3(config.threads);
  launch.dynamicSmemBytes = config.shared_bytes;
  launch.stream = stream;
  launch.attrs = attributes;
  if (config.cluster > 1) {
    attributes[launch.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[launch.numAttrs++].val.clusterDim = {unsigned(config.cluster), 1, 1};
  }
  if (config.dependent) {
    attributes[launch.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[launch.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  return DeviceGuard::describe(cudaLaunchKernelEx(&launch, kernel, parameters...));
}

// Clusters of this size and shared memory that fit on the device at once; 0 if the kernel cannot run.
template <typename... Parameters>
int active_clusters(void (*kernel)(Parameters...), const LaunchConfig& config) {
  if (prepare_kernel(kernel)) return 0;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(config.cluster), 1, 1};
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(config.cluster * 256);
  launch.blockDim = dim3(config.threads);
  launch.dynamicSmemBytes = config.shared_bytes;
  launch.attrs = &attribute;
  launch.numAttrs = 1;
  int clusters = 0;
  const cudaError_t status = cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch);
  return DeviceGuard::describe(status) ? 0 : clusters;
}

// Clusters of a size that run at once with one block a multiprocessor, each with nearly all shared memory; asked for
// once a kernel and device. On an H200 15 of 8, 30 of 4 and 66 of 2: not every part of the chip divides by 4.
template <typename... Parameters>
int resident_clusters(void (*kernel)(Parameters...), int threads, int device, int cluster) {
  struct Known {
    void (*kernel)(Parameters...);
    int device, cluster, clusters;
  };
  thread_local Known known[64];
  thread_local int count = 0;
  for (int i = 0; i < count; ++i)
    if (known[i].kernel == kernel && known[i].device == device && known[i].cluster == cluster) return known[i].clusters;
  const DeviceLimits& limits = device_limits(device);
  int clusters = limits.multiprocessors;
  if (cluster > 1)
    clusters = active_clusters(kernel, {0, threads, limits.shared_bytes - kReservedShared, cluster, false});
  if (count < 64) known[count++] = {kernel, device, cluster, clusters};
  return clusters;
}

}  // namespace codegemm::cuda
