// The functions of csrc/cuda/wgmma.cuh for fibers on a CPU. A group of products reads B and writes its sums at once or,
// at random, as late as it may.
#pragma once
#include "cuda/cluster.cuh"
#include "cuda/ptx.cuh"

namespace codegemm::cuda {

inline void begin_products() { emulation::meet("begin_products", nullptr, 0); }
inline void commit_products() {
  auto& groups = emulation::current->product_groups;
  groups.push_back(std::move(emulation::current->products));
  emulation::current->products.clear();
  if (emulation::cluster->random() % 2) {
    for (auto& group : groups) finish(group);
  }
}
template <int kGroups>
void wait_products() {
  auto& groups = emulation::current->product_groups;
  while (groups.size() > kGroups) {
    finish(groups.front());
    groups.erase(groups.begin());
  }
}
template <int kCount>
void settle(float (&)[kCount]) {}

inline uint64_t tile_descriptor(uint32_t address) { return (address & 0x3ffff) >> 4; }

template <int kCount>
void take_registers() {}
template <int kCount>
void leave_registers() {}

struct TileMap {
  const uint16_t* matrix;
  int64_t stride;
  int columns, rows, tile_rows;
};
inline void prefetch_map(const TileMap&) {}
inline void copy_tile_here(emulation::Block& block, uint32_t target, const TileMap& x, int column, int row,
                           uint32_t barrier) {
  if (target % 1024) emulation::fail("a misaligned tile");
  const uint32_t rank = uint32_t(block.rank) << 24;
  emulation::Barrier* b =
      &block.barriers[reinterpret_cast<const uint64_t*>(emulation::at((barrier & 0xffffff) | rank, 8))];
  emulation::cluster->copies.push_back([=] {
    for (int r = 0; r < x.tile_rows; ++r) {
      for (int c = 0; c < 64; ++c) {
        const bool inside = row + r < x.rows && column + c < x.columns;
        const uint16_t value = inside ? x.matrix[(row + r) * x.stride + column + c] : 0;
        uint32_t place = ((target & 0xffffff) + r * 128 + c * 2) | rank;
        place ^= (place >> 7 & 7) << 4;
        std::memcpy(emulation::at(place, 2), &value, 2);
      }
    }
    b->bytes -= x.tile_rows * 128;
    emulation::complete(*b);
  });
}
inline void copy_tile(uint32_t target, const TileMap& x, int column, int row, uint32_t barrier) {
  copy_tile_here(*emulation::current->block, target, x, column, row, barrier);
}
inline void copy_tile_to_pair(uint32_t target, const TileMap& x, int column, int row, uint32_t barrier) {
  if (emulation::cluster->size != 2) emulation::fail("a copy to the two blocks of a cluster of another size");
  for (emulation::Block& block : emulation::cluster->blocks) copy_tile_here(block, target, x, column, row, barrier);
}
inline void arrive_if(uint32_t barrier, uint32_t mode) {
  if (mode == 0) return;
  if (mode == 1 && barrier >> 24 != uint32_t(emulation::current->block->rank)) emulation::fail("a barrier elsewhere");
  emulation::Block& block = emulation::cluster->blocks[barrier >> 24];
  emulation::Barrier& b = block.barriers[reinterpret_cast<const uint64_t*>(emulation::at(barrier, 8))];
  ++b.arrived;
  if (b.arrived > b.expected) emulation::fail("more arrivals than the barrier counts");
  emulation::complete(b);
}

template <typename T, int kN>
void product_k16(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b) {
  struct Operand {
    uint32_t words[32][4];
  };
  Operand operand;
  const auto lanes = emulation::meet("product_k16", a, 4);
  for (int l = 0; l < 32; ++l) std::memcpy(operand.words[l], lanes[l], 16);
  const int lane = emulation::current->index % 32;
  const uint32_t start = uint32_t(b) << 4 | uint32_t(emulation::current->block->rank) << 24;
  float* sums = d;
  emulation::current->products.push_back([=] {
    for (int i = 0; i < kN / 2; ++i) {
      const int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) {
        uint32_t place = start + column * 128 + k / 2 * 4;
        place ^= (place >> 7 & 7) << 4;
        uint32_t word;
        std::memcpy(&word, emulation::at(place, 4), 4);
        sums[i] +=
            half_of<T>(operand.words[row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row / 8], k % 2) * half_of<T>(word, k % 2);
      }
    }
  });
}

}  // namespace codegemm::cuda
