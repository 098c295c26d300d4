// The tiles of a block of codebook_flow.cuh, and the rings that bring its warps their codes and scales.
#pragma once
#include "cuda/ptx.cuh"
#include "flow_shape.h"
#include "product.h"

namespace codegemm::cuda {

// The rows of a cluster, a tile at a time: the clusters of a segment take turns.
struct TileWalk {
  int segment = 0, row, step, rows;  // rows of the segment

  __device__ __forceinline__ TileWalk(const Product& p, const FlowShape& shape) {
    const int cluster = cluster_index();
    while (cluster >= shape.first_cluster[segment + 1]) ++segment;
    row = (cluster - shape.first_cluster[segment]) * kFlowRows;
    step = (shape.first_cluster[segment + 1] - shape.first_cluster[segment]) * kFlowRows;
    rows = int(p.segment[segment].out_features);
  }
  __device__ __forceinline__ bool more() const { return row < rows; }
  __device__ __forceinline__ void advance() { row += step; }
};

// What a warp multiplies of every tile: units of K.
struct WarpShare {
  int first, units;
};

// A warp's ring of turns, one unit and codebook of a tile each, filled by cp.async. Each lane copies four rows of a
// word, so that a quarter of a warp reads 128 neighbouring bytes; what lies beyond N and K becomes zeros. The warp
// itself asks for a turn when it has left its slot, so no warp waits for another.
//
//     slot:  codes: words x 8 places of four rows; v = 4: rows 4g .. 4g+3 of word w are at place g ^ 2 (w % 4)
//            scales of 32 rows, with the first codebook
template <typename T, int V>
struct FlowFeed {
  static constexpr int kLoads = unit_words(V) / 4, kCodes = kLoads * 512, kSlot = turn_bytes(V);
  const Product& p;
  WarpShare share;
  uint32_t ring, target;   // addresses: the ring, and where a lane puts its first codes
  TileWalk next;           // to be asked for
  const uint32_t* codes;   // what the lane copies next
  int n, row, words_left;  // rows of the segment; the lane's row; words from its own on
  int unit = 0, codebook = 0, slot = 0;

  __device__ __forceinline__ FlowFeed(const Product& product, const TileWalk& walk, const WarpShare& mine,
                                      uint32_t address, int lane)
      : p(product), share(mine), ring(address), next(walk), n(walk.rows) {
    target = ring + lane / 8 * 128 + (V == 4 ? lane % 8 ^ lane / 8 * 2 : lane % 8) * 16;
    if (share.units == 0) next.row = n;
    const int word = share.first * unit_words(V) + lane / 8;
    row = walk.row + lane % 8 * 4;
    words_left = p.words - word;
    codes = p.segment[walk.segment].codes + int64_t(word) * n + row;
#pragma unroll 1
    for (int i = 0; i < kFlowSlots - 1; ++i) ask(i, lane);
  }

  __device__ __forceinline__ void ask(int into, int lane) {
    if (next.more()) {
#pragma unroll
      for (int l = 0; l < kLoads; ++l)
        copy_16_or_zero(target + into * kSlot + l * 512, codes + int64_t(n) * (4 * l), 4 * l < words_left && row < n);
      if (lane < 4 && codebook == 0) {  // rows 8 lane .. 8 lane + 7 of the tile
        const int group = (share.first + unit) * unit_words(V) / p.words_per_group, from = row + lane * 4;
        copy_16_or_zero(ring + into * kSlot + kCodes + lane * 16,
                        static_cast<const T*>(p.segment[next.segment].scales) + int64_t(n) * group + from, from < n);
      }
      advance();
    }
    commit_copies();
  }

  __device__ __forceinline__ void advance() {
    if (++codebook < p.num_codebooks) {
      codes += int64_t(n) * p.words;
      return;
    }
    codes += int64_t(n) * (unit_words(V) - (p.num_codebooks - 1) * p.words);
    words_left -= unit_words(V);
    codebook = 0;
    if (++unit < share.units) return;
    unit = 0;
    words_left += share.units * unit_words(V);
    row += next.step;
    codes += next.step - int64_t(n) * (share.units * unit_words(V));
    next.advance();
  }

  // Waits for the next turn and asks for another; returns the offset of its slot.
  __device__ __forceinline__ int take(int lane) {
    const int taken = slot;
    wait_copies<kFlowSlots - 2>();
    __syncwarp();  // all lanes' copies are there, and all lanes have left the slot before, which is filled next
    ask(taken == 0 ? kFlowSlots - 1 : taken - 1, lane);
    slot = taken + 1 == kFlowSlots ? 0 : taken + 1;
    return taken * kSlot;
  }
};

}  // namespace codegemm::cuda
