// The tiles of a block of codebook_flow.cuh, and the rings that bring its warps their codes and scales.
#pragma once
#include "cuda/ptx.cuh"
#include "flow_shape.h"
#include "product.h"

namespace codegemm::cuda {

// The tiles of a cluster: tile, tile + clusters, ...; `end` is the first of the next segment.
struct TileWalk {
  int tile, end, segment = -1;

  __device__ __forceinline__ explicit TileWalk(const FlowShape& shape) : tile(cluster_index()) { find(shape); }
  __device__ __forceinline__ void find(const FlowShape& shape) {
    do end = ++segment < kMaxSegments ? shape.first_tile[segment + 1] : 0x7fffffff;
    while (tile >= end);
  }
  __device__ __forceinline__ bool more() const { return segment < kMaxSegments; }
  // True if the next tile is one of another segment, or none.
  __device__ __forceinline__ bool advance(const FlowShape& shape) {
    tile += shape.clusters;
    if (tile < end) return false;
    find(shape);
    return true;
  }
  __device__ __forceinline__ int row(const FlowShape& shape) const {
    return (tile - shape.first_tile[segment]) * kFlowRows;
  }
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
  const FlowShape& shape;
  WarpShare share;
  uint32_t ring, target;               // addresses: the ring, and where a lane puts its first codes
  TileWalk next;                       // to be asked for
  const uint32_t* codes = nullptr;     // what the lane copies next
  int n = 0, row = 0, words_left = 0;  // rows of the segment; the lane's row; words from its own on
  int unit = 0, codebook = 0, slot = 0;

  __device__ __forceinline__ FlowFeed(const Product& product, const FlowShape& of, const WarpShare& mine,
                                      uint32_t address, int lane)
      : p(product), shape(of), share(mine), ring(address), next(of) {
    target = ring + lane / 8 * 128 + (V == 4 ? lane % 8 ^ lane / 8 * 2 : lane % 8) * 16;
    if (share.units == 0) next.segment = kMaxSegments;
    find(lane);
#pragma unroll 1
    for (int i = 0; i < kFlowSlots - 1; ++i) ask(i, lane);
  }

  __device__ __forceinline__ void find(int lane) {
    if (!next.more()) return;
    const Segment& s = p.segment[next.segment];
    const int word = share.first * unit_words(V) + lane / 8;
    n = int(s.out_features);
    row = next.row(shape) + lane % 8 * 4;
    words_left = p.words - word;
    codes = s.codes + int64_t(word) * n + row;
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
      advance(lane);
    }
    commit_copies();
  }

  __device__ __forceinline__ void advance(int lane) {
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
    row += shape.clusters * kFlowRows;
    codes += shape.clusters * kFlowRows - int64_t(n) * (share.units * unit_words(V));
    if (next.advance(shape)) find(lane);
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
