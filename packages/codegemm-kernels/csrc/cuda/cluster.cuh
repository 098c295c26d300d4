// How the blocks of a cluster send each other data. Included as "cuda/cluster.cuh", as ptx.cuh is.
#pragma once
#include "cuda/ptx.cuh"

namespace codegemm::cuda {

// The two halves of cluster_sync_relaxed.
__device__ __forceinline__ void cluster_arrive() {
  __syncwarp();
#if CODEGEMM_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
  __syncwarp();
#if CODEGEMM_HAS_CLUSTERS
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// The same as wait, for what other blocks of the cluster write.
__device__ __forceinline__ void wait_cluster(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
#if CODEGEMM_HAS_CLUSTERS
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
#else
    done = 1;
#endif
  }
}

// Writes 16 bytes to shared memory of a block of the cluster; their arrival counts at a barrier there. Addresses are
// of address_in_rank.
__device__ __forceinline__ void send_async(uint32_t target, float4 value, uint32_t barrier) {
#if CODEGEMM_HAS_CLUSTERS
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(target),
      "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(barrier)
      : "memory");
#endif
}

}  // namespace codegemm::cuda
