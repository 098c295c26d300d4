// The functions of csrc/cuda/ptx.cuh for fibers on a CPU: same names, same meaning.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>

#include "fibers.h"

#undef __launch_bounds__
#undef __grid_constant__
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (emulation::Index{emulation::current->index})
#define blockIdx (emulation::Index{emulation::current->block->index})
#define blockDim (emulation::Index{emulation::current->block->threads})
#define CODEGEMM_DYNAMIC_SHARED(name) \
  unsigned char* const name = emulation::current->block->shared + emulation::kStaticBytes
#define CODEGEMM_SHARED(type, name) type& name = *reinterpret_cast<type*>(emulation::current->block->shared)

namespace emulation {
struct Index {
  int x;
};
inline unsigned char* at(uint32_t address, size_t bytes) {
  const uint32_t rank = address >> 24, offset = (address & 0xffffff) - kSharedBase;
  if (rank >= cluster->blocks.size()) fail("an address of no block");
  Block& block = cluster->blocks[rank];
  if (offset + bytes > size_t(kStaticBytes + block.shared_bytes)) fail("an access beyond dynamic shared memory");
  if (bytes <= 16 && offset % bytes) fail("a misaligned access of shared memory");
  return block.shared + offset;
}
inline Barrier& barrier_at(uint32_t address) {
  return current->block->barriers[reinterpret_cast<const uint64_t*>(at(address, 8))];
}
}  // namespace emulation

inline void __syncwarp() { emulation::meet("__syncwarp", nullptr, 0); }
inline void __syncthreads() {
  emulation::arrive_and_wait(emulation::current->block->named[0], emulation::current->block->threads);
}
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  word = emulation::meet("__shfl_xor_sync", &word, 1)[(emulation::current->index % 32) ^ mask][0];
  std::memcpy(&value, &word, 4);
  return value;
}
inline float __uint_as_float(uint32_t word) {
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return word;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }

namespace codegemm::cuda {

using std::max;
using std::min;
constexpr int kMaxCluster = 16;

inline uint32_t shared_address(const void* pointer) {
  const emulation::Block& block = *emulation::current->block;
  return uint32_t(block.rank) << 24 |
         uint32_t(static_cast<const unsigned char*>(pointer) - block.shared + emulation::kSharedBase);
}
inline int cluster_rank() { return emulation::current->block->rank; }
inline int cluster_size() { return emulation::cluster->size; }
inline int cluster_index() { return emulation::cluster->index; }
inline int warp_index() {
  emulation::meet("warp_index", nullptr, 0);
  return emulation::current->index / 32;
}
inline void cluster_sync() {
  __syncwarp();
  emulation::arrive_and_wait(emulation::cluster->barrier, int(emulation::cluster->threads.size()));
}
inline void cluster_sync_relaxed() { cluster_sync(); }
inline void add_to(float& sum, float part) { sum += part; }
inline void add_to(float4& sum, float4 part) {
  sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
}
template <typename Value>
Value sum_over_cluster(uint32_t address, int size) {
  Value sum = {};
  for (int rank = 0; rank < size; ++rank) {
    Value part;
    std::memcpy(&part, emulation::at((address & 0xffffff) | uint32_t(rank) << 24, sizeof part), sizeof part);
    add_to(sum, part);
  }
  return sum;
}
inline void allow_next_kernel() {}
inline void wait_for_previous_kernel() {}

inline void init_barrier(uint32_t barrier, int count) { emulation::barrier_at(barrier).expected = count; }
inline void fence_barriers() {}
inline void arrive(uint32_t barrier) {
  emulation::Barrier& b = emulation::barrier_at(barrier);
  ++b.arrived;
  if (b.arrived > b.expected) emulation::fail("more arrivals than the barrier counts");
  emulation::complete(b);
}
inline void wait(uint32_t barrier, uint32_t parity) {
  const emulation::Barrier& b = emulation::barrier_at(barrier);
  while (b.generation % 2 == parity) emulation::wait_while(b.generation, b.generation);
}
inline void expect_bytes(uint32_t barrier, int bytes) {
  emulation::barrier_at(barrier).bytes += bytes;
  arrive(barrier);
}
inline bool elect_lane() {
  emulation::meet("elect_lane", nullptr, 0);
  return emulation::current->index % 32 == 0;
}
inline void copy_bulk(uint32_t target, const unsigned char* source, int bytes, uint32_t barrier) {
  if (bytes % 16 || target % 16 || reinterpret_cast<uintptr_t>(source) % 16) emulation::fail("a misaligned bulk copy");
  emulation::Barrier* b = &emulation::barrier_at(barrier);
  emulation::cluster->copies.push_back([=] {
    std::memcpy(emulation::at(target, bytes), source, bytes);
    b->bytes -= bytes;
    if (b->bytes == 0) emulation::complete(*b);
  });
}
template <typename T>
void copy_16_or_zero(uint32_t target, const T* source, bool copies) {
  if (copies && reinterpret_cast<uintptr_t>(source) % 16) emulation::fail("a misaligned copy");
  unsigned char* place = emulation::at(target, 16);
  emulation::current->group.push_back([=] { copies ? std::memcpy(place, source, 16) : std::memset(place, 0, 16); });
}
inline void finish(std::vector<std::function<void()>>& group) {
  for (const auto& copy : group) copy();
  group.clear();
}
// At random a group arrives at once, or as late as it may.
inline void commit_copies() {
  auto& groups = emulation::current->groups;
  groups.push_back(std::move(emulation::current->group));
  emulation::current->group.clear();
  if (emulation::cluster->random() % 2) finish(groups.back());
}
template <int kGroups>
void wait_copies() {
  auto& groups = emulation::current->groups;
  while (groups.size() > kGroups) {
    finish(groups.front());
    groups.erase(groups.begin());
  }
}
template <typename T>
uint32_t load_fresh(const T* pair) {
  uint32_t value;
  std::memcpy(&value, pair, 4);
  return value;
}
template <typename T>
uint4 load_fresh_16(const T* source) {
  if (reinterpret_cast<uintptr_t>(source) % 16) emulation::fail("a misaligned load");
  uint4 value;
  std::memcpy(&value, source, 16);
  return value;
}
template <typename Words, typename T>
Words load_weight(const T* source) {
  if (reinterpret_cast<uintptr_t>(source) % sizeof(Words)) emulation::fail("a misaligned load");
  Words value;
  std::memcpy(&value, source, sizeof(Words));
  return value;
}
inline void consumer_sync(int threads) {
  __syncwarp();
  emulation::arrive_and_wait(emulation::current->block->named[1], threads);
}

inline uint32_t from_lane(uint32_t value, int lane) { return emulation::meet("from_lane", &value, 1)[lane][0]; }
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i) & 15;
    uint32_t byte = uint32_t((uint64_t(b) << 32 | a) >> (8 * (nibble & 7))) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}
inline uint32_t row_address(uint32_t codes, uint32_t selector, uint32_t base) {
  for (int i = 0; i < 4; ++i) base += (codes >> (8 * i) & 255) * (selector >> (8 * i) & 255);
  return base;
}
constexpr uint32_t row_selector(uint32_t byte) { return 128u << (8 * byte); }
inline void keep(uint32_t&) {}
template <typename T>
T load_shared(uint32_t address) {
  if (address >> 24 != uint32_t(emulation::current->block->rank)) emulation::fail("a local load from another block");
  T value;
  std::memcpy(&value, emulation::at(address, sizeof(T)), sizeof(T));
  return value;
}

inline void load_matrices(uint32_t (&matrix)[4], uint32_t address) {
  const auto lanes = emulation::meet("load_matrices", &address, 1);
  const int lane = emulation::current->index % 32;
  for (int i = 0; i < 4; ++i) std::memcpy(&matrix[i], emulation::at(lanes[8 * i + lane / 4][0], 16) + lane % 4 * 4, 4);
}

template <typename T>
float half_of(uint32_t word, int i) {
  T value;
  const uint16_t bits = uint16_t(word >> (16 * i));
  std::memcpy(&value, &bits, 2);
  return float(value);
}

// m16n8k16: operands as the PTX manual lays them out over lane = 4g + c.
template <typename T>
void multiply(float (&d)[4], const uint32_t* words) {
  const auto lanes = emulation::meet("mma k16", words, 6);
  const int lane = emulation::current->index % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    float sum = d[i];
    for (int k = 0; k < 16; ++k) {
      const int c = k % 8 / 2, half = k / 8;
      const uint32_t a = lanes[row % 8 * 4 + c][half * 2 + row / 8], b = lanes[column * 4 + c][4 + half];
      sum += half_of<T>(a, k % 2) * half_of<T>(b, k % 2);
    }
    d[i] = sum;
  }
}
template <typename T>
void mma_k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  multiply<T>(d, words);
}

inline uint32_t larger_pair(uint32_t a, uint32_t b) {
  return max(a & 0xffff, b & 0xffff) | max(a >> 16, b >> 16) << 16;
}
inline uint32_t largest_in_warp(uint32_t value) {
  const auto lanes = emulation::meet("largest_in_warp", &value, 1);
  for (int lane = 0; lane < 32; ++lane) value = max(value, lanes[lane][0]);
  return value;
}
template <typename T>
void mma_k16(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  const uint32_t words[6] = {a.x, a.y, a.z, a.w, b0, b1};
  multiply<T>(d, words);
}
template <typename T>
void mma_k16_first(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  d[0] = d[1] = d[2] = d[3] = 0;
  mma_k16<T>(d, a, b0, b1);
}

}  // namespace codegemm::cuda
