// The instructions of the fast kernels that C++ has no words for, one function each: clusters, barriers and copies in
// shared memory, dependent launches, tensor cores. Kernels include this file as "cuda/ptx.cuh" so that the emulation of
// tests/emulation, which runs the same kernel sources on a CPU, can put its own in front.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// A block's dynamic shared memory as bytes, and one static variable there.
#define CODEGEMM_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define CODEGEMM_SHARED(type, name) __shared__ type name

namespace codegemm::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define CODEGEMM_HAS_CLUSTERS 1
#else
#define CODEGEMM_HAS_CLUSTERS 0
#endif

constexpr int kMaxCluster = 16;

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ int cluster_rank() {
#if CODEGEMM_HAS_CLUSTERS
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
#else
  return 0;
#endif
}

__device__ __forceinline__ int cluster_size() {
#if CODEGEMM_HAS_CLUSTERS
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return int(size);
#else
  return 1;
#endif
}

__device__ __forceinline__ int cluster_index() {
#if CODEGEMM_HAS_CLUSTERS
  uint32_t index;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return int(index);
#else
  return blockIdx.x;
#endif
}

// Index of the warp in its block, known to the compiler to be the same in all lanes: branches on it then leave uniform
// registers usable (a lookup is LDS [R+UR+imm]; without this each needs an addition of its own).
__device__ __forceinline__ int warp_index() { return __shfl_sync(~0u, int(threadIdx.x / 32), 0); }

// Barrier over the threads of a cluster that also makes their shared-memory writes visible to each other.
__device__ __forceinline__ void cluster_sync() {
  __syncwarp();
#if CODEGEMM_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The same without publishing memory, which costs a fence over the whole GPU: enough where a block only says that it
// has read what it needs.
__device__ __forceinline__ void cluster_sync_relaxed() {
  __syncwarp();
#if CODEGEMM_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// What lies at `address` (a shared-memory address of this block) in the same place of block `rank` of the cluster.
__device__ __forceinline__ uint32_t address_in_rank(uint32_t address, int rank) {
#if CODEGEMM_HAS_CLUSTERS
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
#else
  return address;
#endif
}
__device__ __forceinline__ void load_from_rank(float& value, uint32_t address, int rank) {
#if CODEGEMM_HAS_CLUSTERS
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address_in_rank(address, rank)) : "memory");
#else
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
#endif
}
__device__ __forceinline__ void load_from_rank(float4& value, uint32_t address, int rank) {
#if CODEGEMM_HAS_CLUSTERS
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address_in_rank(address, rank))
               : "memory");
#else
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address)
               : "memory");
#endif
}

__device__ __forceinline__ void add_to(float& sum, float part) { sum += part; }
__device__ __forceinline__ void add_to(float4& sum, float4 part) {
  sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
}

// What lies at a shared-memory address, summed over the blocks of the cluster in rank order.
template <typename Value>
__device__ __forceinline__ Value sum_over_cluster(uint32_t address, int size) {
  constexpr int kAtOnce =
      sizeof(Value) == 4 ? kMaxCluster : 4;  // loads before the first sum: their latency is paid once
  Value sum = {};
#pragma unroll
  for (int first = 0; first < kMaxCluster; first += kAtOnce) {
    if (first > 0 && first >= size) break;
    Value part[kAtOnce] = {};
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r)
      if (first + r < size) load_from_rank(part[r], address, first + r);
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) add_to(sum, part[r]);
  }
  return sum;
}

// Barriers are named by their shared-memory addresses: from pointers the compiler works them out again at every use.
__device__ __forceinline__ void init_barrier(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// After all barriers of a block have been initialised.
__device__ __forceinline__ void fence_barriers() {
#if CODEGEMM_HAS_CLUSTERS
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}

// Waits for the end of the phase of this parity. A fresh barrier counts as having ended a phase of parity 1.
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
#if CODEGEMM_HAS_CLUSTERS
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
#else
    done = 1;  // psumbook.cuh is for sm_90 and later
#endif
  }
}

// One thread announces `bytes` that will arrive at the barrier, and arrives.
__device__ __forceinline__ void expect_bytes(uint32_t barrier, int bytes) {
#if CODEGEMM_HAS_CLUSTERS
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;\n}" ::"r"(barrier),
               "r"(bytes)
               : "memory");
#endif
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

// Copies a run of `bytes` (a multiple of 16, both addresses too) to shared memory; its arrival counts at the barrier.
__device__ __forceinline__ void copy_bulk(uint32_t target, const unsigned char* source, int bytes, uint32_t barrier) {
#if CODEGEMM_HAS_CLUSTERS
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
               "l"(source), "r"(bytes), "r"(barrier)
               : "memory");
#endif
}

// Copies 16 bytes a thread, or writes zeros and reads nothing. The copies since the last commit are a group;
// wait_copies returns when all but the last kGroups groups of the thread have arrived.
template <typename T>
__device__ __forceinline__ void copy_16_or_zero(uint32_t target, const T* source, bool copies) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(copies ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Two 16-bit numbers from global memory, not from the first-level cache: they may be younger than this kernel.
template <typename T>
__device__ __forceinline__ uint32_t load_fresh(const T* pair) {
  uint32_t value;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(value) : "l"(pair) : "memory");
  return value;
}

// 16 bytes of x, likewise.
template <typename T>
__device__ __forceinline__ uint4 load_fresh_16(const T* source) {
  uint4 value;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(source)
               : "memory");
  return value;
}

// 8 or 16 bytes of a weight: constant, and used once, so that the first-level cache is better left alone.
template <typename Words, typename T>
__device__ __forceinline__ Words load_weight(const T* source) {
  Words value;
  if constexpr (sizeof(Words) == 8)
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(source));
  else
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(source));
  return value;
}

// Barrier over the consumer warps only.
__device__ __forceinline__ void consumer_sync(int threads) {
  __syncwarp();
  asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
}

// Programmatic dependent launch: the next kernel of the stream may start its prologue; and: everything the previous
// kernels wrote is visible from here on. Without the launch attribute both do nothing.
__device__ __forceinline__ void allow_next_kernel() {
#if CODEGEMM_HAS_CLUSTERS
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if CODEGEMM_HAS_CLUSTERS
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The value of another lane of the warp.
__device__ __forceinline__ uint32_t from_lane(uint32_t value, int lane) { return __shfl_sync(~0u, value, lane); }

// Byte permutation: nibble i of `selector` picks byte i of the result from a (0..3) and b (4..7); +8 picks copies of
// that byte's sign bit.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}

// base + 128 * (byte of `codes` that `selector` names): the address of a table row of 128 bytes in one instruction.
__device__ __forceinline__ uint32_t row_address(uint32_t codes, uint32_t selector, uint32_t base) {
  return __dp4a(codes, selector, base);
}
__device__ __forceinline__ constexpr uint32_t row_selector(uint32_t byte) { return 128u << (8 * byte); }

// Hides where a value comes from, so that the compiler keeps it instead of computing it again in a loop.
__device__ __forceinline__ void keep(uint32_t& value) { asm("" : "+r"(value)); }

// The larger of each of the two 16-bit integers of a word; the largest of a warp.
__device__ __forceinline__ uint32_t larger_pair(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }
__device__ __forceinline__ uint32_t largest_in_warp(uint32_t value) { return __reduce_max_sync(~0u, value); }

// What lies at a shared-memory address.
template <typename T>
__device__ __forceinline__ T load_shared(uint32_t address) {
  return *static_cast<const T*>(__cvta_shared_to_generic(address));
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory: lane 8i + r names row r of matrix i, 16 bytes; lane 4g + c
// receives elements 2c and 2c + 1 of row g of each.
__device__ __forceinline__ void load_matrices(uint32_t (&matrix)[4], uint32_t address) {
  asm("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
      : "r"(address));
}

// d += a b for a 16 x 16 and 16 x 8 tile; fp16 or bf16 in, fp32 sums.
template <typename T>
__device__ __forceinline__ void mma_k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_k16<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                       uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <typename T>
__device__ __forceinline__ void mma_k16(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  const uint32_t words[4] = {a.x, a.y, a.z, a.w};
  mma_k16<T>(d, words, b0, b1);
}

// d = a b: no register has to be cleared before.
template <typename T>
__device__ __forceinline__ void mma_k16_first(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_k16_first<__half>(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "f"(0.0f));
}
template <>
__device__ __forceinline__ void mma_k16_first<__nv_bfloat16>(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "f"(0.0f));
}

}  // namespace codegemm::cuda
