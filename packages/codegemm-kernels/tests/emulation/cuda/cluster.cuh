// The functions of csrc/cuda/cluster.cuh for fibers on a CPU.
#pragma once
#include "cuda/ptx.cuh"

namespace codegemm::cuda {

inline void cluster_arrive() {
  __syncwarp();
  emulation::Barrier& barrier = emulation::cluster->barrier;
  emulation::current->arrival = barrier.generation;
  barrier.expected = int(emulation::cluster->threads.size());
  ++barrier.arrived;
  emulation::complete(barrier);
}
inline void cluster_wait() {
  __syncwarp();
  emulation::wait_while(emulation::cluster->barrier.generation, emulation::current->arrival);
}
inline void wait_cluster(uint32_t barrier, uint32_t parity) { wait(barrier, parity); }
inline uint32_t address_in_rank(uint32_t address, int rank) { return (address & 0xffffff) | uint32_t(rank) << 24; }
inline void send_async(uint32_t target, float4 value, uint32_t barrier) {
  if (emulation::cluster->size == 1) emulation::fail("st.async in a launch without clusters: an illegal instruction");
  emulation::Block& block = emulation::cluster->blocks[barrier >> 24];
  emulation::Barrier* b = &block.barriers[reinterpret_cast<const uint64_t*>(emulation::at(barrier, 8))];
  emulation::cluster->copies.push_back([=] {
    std::memcpy(emulation::at(target, 16), &value, 16);
    b->bytes -= 16;
    if (b->bytes == 0) emulation::complete(*b);
  });
}

}  // namespace codegemm::cuda
