// A ring of shared-memory stages that the producer warps of psumbook.cuh fill and the other warps of the block empty.
// Code words come in runs of neighbouring rows, so a stage is a box of (words x rows) copied run by run by the bulk
// copy engine (sm_90 and later). Reading boxes with plain loads instead, 16 bytes a lane, costs 2 to 4 times the
// requests (a quarter warp touches 8 words) and keeps too few bytes in flight: 1.4 to 1.8 TB/s on an H200.
#pragma once
#include "cuda/ptx.cuh"

namespace codegemm::cuda {

constexpr int kMaxStages = 8;
constexpr int kProducerWarps = 2;  // a copy takes a warp 65 cycles to issue, a stage has 8 to 16 of them

// What the barriers of a ring take of shared memory.
struct RingBarriers {
  uint64_t barrier[2 * kMaxStages];
};

// The barriers of a ring by address. full: one phase a filled stage. empty: one phase a stage all warps left.
struct Ring {
  uint32_t barriers;
  __device__ __forceinline__ explicit Ring(const RingBarriers& storage) : barriers(shared_address(&storage)) {
    keep(barriers);
  }
  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + stage * 8; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return barriers + (kMaxStages + stage) * 8; }
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

// One thread sets the ring up; a block barrier must follow.
__device__ __forceinline__ void init_ring(const Ring& ring, int stages, int consumer_warps) {
  for (int s = 0; s < stages; ++s) {
    init_barrier(ring.full(s), 1);
    init_barrier(ring.empty(s), consumer_warps);
  }
  fence_barriers();
}

// Producer warps: wait until the stage is empty, and the first announces `bytes`; then any number of copy_runs; then
// end_fill. The other warps' bytes may arrive before they are announced: the phase cannot end before the announcement.
__device__ __forceinline__ void begin_fill(const Ring& ring, const RingPlace& at, int bytes, int producer, int lane) {
  wait(ring.empty(at.stage), at.phase ^ 1);
  if (producer == 0 && lane == 0) expect_bytes(ring.full(at.stage), bytes);
  __syncwarp();
}

// Copies `runs` runs of `bytes` bytes (a multiple of 16): run i from source + i*source_step to target + i*target_step;
// each producer warp every kProducerWarps-th of them. One lane issues the bulk copies, chosen by elect.sync: under
// `lane == 0` or with a run a lane the compiler wraps each copy in a loop over lanes, 140 cycles a copy, which alone
// held the kernels at 1.4 to 1.6 TB/s.
__device__ __forceinline__ void copy_runs(const Ring& ring, const RingPlace& at, unsigned char* target, int target_step,
                                          const unsigned char* source, int64_t source_step, int runs, int bytes,
                                          int producer) {
  uint32_t address = shared_address(target) + producer * target_step;
  source += producer * source_step;
  if (!elect_lane()) return;
  const uint32_t barrier = ring.full(at.stage);
  for (int i = producer; i < runs; i += kProducerWarps) {
    copy_bulk(address, source, bytes, barrier);
    address += kProducerWarps * target_step;
    source += kProducerWarps * source_step;
  }
}

__device__ __forceinline__ void end_fill() { __syncwarp(); }

}  // namespace codegemm::cuda
