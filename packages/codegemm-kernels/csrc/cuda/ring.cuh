// A ring of shared-memory stages that one producer warp fills and the other warps of the block empty. Code words come
// in runs of neighbouring rows, so a stage is a box of (words x rows) copied run by run: by the bulk copy engine from
// sm_90 on, by 16-byte cp.async before. Reading boxes with plain loads instead, 16 bytes a lane, costs 2 to 4 times the
// requests (a quarter warp touches 8 words) and keeps too few bytes in flight: 1.4 to 1.8 TB/s on an H200.
#pragma once
#include "cluster.cuh"

namespace codegemm::cuda {

constexpr int kMaxStages = 8;

// The barriers of a ring, in shared memory. full: one phase a filled stage. empty: one phase a stage all warps left.
struct RingBarriers {
  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];
};

// Position in the ring: stage and the parity of the phase it is in.
struct RingPlace {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

__device__ __forceinline__ void init_barrier(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// One thread sets the ring up; a block barrier must follow.
__device__ __forceinline__ void init_ring(RingBarriers& ring, int stages, int consumer_warps) {
  for (int s = 0; s < stages; ++s) {
    init_barrier(&ring.full[s], CODEGEMM_HAS_CLUSTERS ? 1 : 32);
    init_barrier(&ring.empty[s], consumer_warps);
  }
#if CODEGEMM_HAS_CLUSTERS
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
  const uint32_t address = shared_address(barrier);
  uint32_t done = 0;
  while (!done) {
#if CODEGEMM_HAS_CLUSTERS
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(address), "r"(parity)
                 : "memory");
#else
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(address), "r"(parity)
                 : "memory");
#endif
  }
}

// True in one lane of a converged warp, and known to the compiler to be.
__device__ __forceinline__ bool elect_lane() {
#if CODEGEMM_HAS_CLUSTERS
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected;
#else
  return threadIdx.x % 32 == 0;
#endif
}

// Producer warp: waits until the stage is empty and announces `bytes`; then any number of copy_runs; then end_fill.
__device__ __forceinline__ void begin_fill(RingBarriers& ring, const RingPlace& at, int bytes, int lane) {
  wait(&ring.empty[at.stage], at.phase ^ 1);
#if CODEGEMM_HAS_CLUSTERS
  if (lane == 0)
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;\n}" ::"r"(
                     shared_address(&ring.full[at.stage])),
                 "r"(bytes)
                 : "memory");
#endif
}

// Copies `runs` runs of `bytes` bytes (a multiple of 16): run i from source + i*source_step to target + i*target_step.
// One lane issues the bulk copies, chosen by elect.sync: under `lane == 0` or with a run a lane the compiler wraps each
// copy in a loop over lanes, 140 cycles a copy, which alone held the kernels at 1.4 to 1.6 TB/s.
__device__ __forceinline__ void copy_runs(RingBarriers& ring, const RingPlace& at, unsigned char* target,
                                          int target_step, const unsigned char* source, int64_t source_step, int runs,
                                          int bytes, int lane) {
#if CODEGEMM_HAS_CLUSTERS
  if (!elect_lane()) return;
  const uint32_t barrier = shared_address(&ring.full[at.stage]);
  uint32_t address = shared_address(target);
  for (int i = 0; i < runs; ++i) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address),
        "l"(source), "r"(bytes), "r"(barrier)
        : "memory");
    address += target_step;
    source += source_step;
  }
#else
  for (int i = 0; i < runs; ++i)
    for (int b = lane * 16; b < bytes; b += 512)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(target + i * target_step + b)),
                   "l"(source + i * source_step + b)
                   : "memory");
#endif
}

__device__ __forceinline__ void end_fill(RingBarriers& ring, const RingPlace& at) {
#if CODEGEMM_HAS_CLUSTERS
  __syncwarp();
#else
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&ring.full[at.stage]))
               : "memory");
#endif
}

// Barrier over the consumer warps only.
__device__ __forceinline__ void consumer_sync(int threads) {
  __syncwarp();
  asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
}

}  // namespace codegemm::cuda
