// What the blocks of codebook_wgmma.cuh work through, and the warps that bring it: items, stages and slots.
#pragma once
#include "codebook_table.cuh"
#include "cuda/ptx.cuh"
#include "cuda/wgmma.cuh"
#include "product.h"
#include "ring.cuh"

namespace codegemm::cuda {

constexpr int kStageColumns = 64, kStageRowBytes = 2 * kStageColumns;
constexpr int kProducerThreads = 128;  // behind the warpgroups that multiply: four warps, a lane of each works

__host__ __device__ constexpr int words_of_stage(int v) { return kStageColumns / (4 * v); }

// Whether the kernel can compute a launch: half a stage must have one scale a row.
inline bool fits_wgmma(const Product& p, int vector_length) {
  const int words = vector_length <= 8 ? words_of_stage(vector_length) / 2 : 0;
  return words > 0 && p.num_codebooks <= 2 &&
         (int(p.words_per_group.value) % words == 0 || int(p.words_per_group.value) == p.words);
}

// How the blocks of a launch are made.
struct BlockKind {
  int groups, cluster;  // warpgroups that multiply, 64 rows each; blocks of a cluster
  bool pair;            // the blocks of a cluster, two, have neighbouring rows and share x; others divide K
};

// How a launch divides rows, tokens, K and shared memory. Row tiles do not cross segments. Tables are at the start of
// shared memory, the slots of the ring behind them; sums of other blocks later take the place of both.
//
// A cluster computes items, a row tile (a pair two) by a token tile each, one after another: cluster i has items i,
// i + clusters and so on. Where pairs would leave half the clusters or more without one in the last round, each of its
// row tiles is an item instead, and the blocks of a pair divide K too. Such an item is the last of its cluster.
struct WgmmaShape {
  int first_tile[kMaxSegments + 1];  // row tiles of a cluster before each segment
  int token_tiles, clusters;
  int whole, items;              // items whose K is not divided come first
  int pair;                      // row tiles of a cluster, 1 or 2
  int stages;                    // of K
  Shares shares;                 // of them, for the blocks that divide K
  int share;                     // groups of 8 tokens whose sums such a block adds and stores
  int scale_runs;                // scales a row and stage, 1 or 2
  int slots;                     // of the ring
  int x, weights, slot_weights;  // offsets of the slots of x, of codes and scales; bytes of one of the latter
  int barriers, bytes;
};

struct WgmmaBarriers {
  RingBarriers ring;
  uint64_t sums;
};

// For kinds that divide K among more than its stages shares.each is 0. As many slots as `shared_bytes` allow, up to
// kMaxStages; fewer than 3 are too few.
inline WgmmaShape make_wgmma_shape(const Product& p, int vector_length, int tokens, const BlockKind& kind,
                                   int shared_bytes, int most_clusters) {
  const auto ceil = [](int64_t n, int64_t unit) { return int((n + unit - 1) / unit); };
  WgmmaShape shape = {};
  const int rows = 64 * kind.groups;
  shape.pair = kind.pair ? 2 : 1;
  for (int i = 0; i < kMaxSegments; ++i)
    shape.first_tile[i + 1] =
        shape.first_tile[i] + (i < p.segments ? ceil(p.segment[i].out_features, rows * shape.pair) : 0);
  shape.token_tiles = ceil(p.tokens, tokens);
  shape.items = shape.whole = shape.first_tile[kMaxSegments] * shape.token_tiles;
  shape.clusters = shape.items < most_clusters ? shape.items : most_clusters;
  if (kind.pair) {
    const int rest = shape.items % most_clusters;
    if (2 * rest <= most_clusters) {
      shape.whole -= rest;
      shape.items += rest;
      shape.clusters = shape.items < most_clusters ? shape.items : most_clusters;
    }
  } else if (kind.cluster > 1) {
    shape.whole = 0;
    shape.clusters = shape.items;
  }
  const int words = words_of_stage(vector_length), group = int(p.words_per_group.value);
  shape.stages = ceil(p.words, words);
  shape.shares = {shape.stages / kind.cluster, shape.stages % kind.cluster};
  shape.share = ceil(tokens / 8, kind.cluster);
  shape.scale_runs = group % words == 0 || group == p.words ? 1 : 2;
  shape.slot_weights = rows * (p.num_codebooks * words * 4 + shape.scale_runs * 2);
  shape.x = p.num_codebooks * kTableBytes;
  const int slot = tokens * kStageRowBytes + shape.slot_weights, sums = (kind.cluster - 1) * shape.share * rows * 32;
  const int fit = (shared_bytes - shape.x - int(sizeof(WgmmaBarriers))) / slot;
  shape.slots = fit < kMaxStages ? fit : kMaxStages;
  shape.weights = shape.x + shape.slots * tokens * kStageRowBytes;
  const int ring = shape.weights + shape.slots * shape.slot_weights;
  shape.barriers = ring > sums ? ring : sums;
  shape.bytes = shape.barriers + int(sizeof(WgmmaBarriers));
  return shape;
}

// The part of an item that a block computes.
struct WgmmaTile {
  const Segment& segment;
  int64_t row;  // the first; those from out_features on are computed, of whatever lies in the slot, and not stored
  int token, rows, first_stage, last_stage;
  bool divides;  // K, with the other blocks of the cluster
};

template <int kN>
__device__ __forceinline__ WgmmaTile tile_of(const Product& p, const WgmmaShape& shape, int item, int rows, int rank) {
  const bool divides = item >= shape.whole;
  int half = shape.pair == 2 ? rank : 0;  // which row tile of a pair
  if (shape.pair == 2 && divides) {
    half = (item - shape.whole) % 2;
    item = shape.whole + (item - shape.whole) / 2;
  }
  const int row_tile = item / shape.token_tiles;
  int s = 0;
  while (row_tile >= shape.first_tile[s + 1]) ++s;
  return {p.segment[s],
          (int64_t(row_tile - shape.first_tile[s]) * shape.pair + half) * rows,
          (item - row_tile * shape.token_tiles) * kN,
          rows,
          divides ? shape.shares.first(rank) : 0,
          divides ? shape.shares.first(rank + 1) : shape.stages,
          divides};
}

// One lane of each producer warp: copies x, codes and scales of each stage into the next slot that is free. Every warp
// has every fourth run of codes, one scales too, and the last x, which alone is not a weight: it waits for the previous
// kernel. A single warp for all took 900 cycles a stage, twice what the products take. Blocks that share x bring half
// of its tokens each, for both.
template <typename T, int V, int kBooks, int kN>
struct StageProducer {
  static constexpr int kWords = words_of_stage(V), kAll = kBooks * kWords, kRuns = (kAll + 3) / 4;
  const Product& p;
  const WgmmaShape& shape;
  const Ring& ring;
  uint32_t shared;
  int rank, producer;

  // All items of the cluster; `rows`: of a row tile.
  __device__ __forceinline__ void run(const TileMap& x, int rows) const {
    RingPlace at;
    if (producer == 3) wait_for_previous_kernel();
    for (int item = cluster_index(); item < shape.items; item += shape.clusters)
      copy_item(x, tile_of<kN>(p, shape, item, rows, rank), at);
  }
  __device__ __forceinline__ void copy_item(const TileMap& x, const WgmmaTile& tile, RingPlace& at) const {
    const int64_t n = tile.segment.out_features;
    const int count = int(max(int64_t(0), min(int64_t(tile.rows), n - tile.row)));
    const unsigned char* source[kRuns];
    int word[kRuns];
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const int run = producer + 4 * i;
      word[i] = tile.first_stage * kWords + run % kWords;
      source[i] = reinterpret_cast<const unsigned char*>(tile.segment.codes +
                                                         (int64_t(run / kWords) * p.words + word[i]) * n + tile.row);
    }
    for (int stage = tile.first_stage; stage < tile.last_stage; ++stage) {
      const uint32_t barrier = ring.full(at.stage), place = shared + shape.weights + at.stage * shape.slot_weights;
      wait(ring.empty(at.stage), at.phase ^ 1);
      if (producer == 0) expect_bytes(barrier, kN * kStageRowBytes + count * (kAll * 4 + shape.scale_runs * 2));
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        // Words beyond K are the last one again: x is zero there, and zero times a weight that is one is zero.
        const unsigned char* from = word[i] < p.words ? source[i] : source[i] - (word[i] - p.words + 1) * 4 * n;
        if (producer + 4 * i < kAll && count > 0)
          copy_bulk(place + (producer + 4 * i) * tile.rows * 4, from, count * 4, barrier);
        word[i] += kWords;
        source[i] += kWords * 4 * n;
      }
      if (producer == 2 && count > 0) copy_scales(place + tile.rows * kAll * 4, tile, stage, count, barrier);
      if (producer == 3) copy_x(shared + shape.x + at.stage * (kN * kStageRowBytes), x, tile, stage, barrier);
      at.advance(shape.slots);
    }
  }
  __device__ __forceinline__ void copy_x(uint32_t place, const TileMap& x, const WgmmaTile& tile, int stage,
                                         uint32_t barrier) const {
    const int column = stage * kStageColumns, half = kN / 2;  // a pair's map has tiles of half the tokens
    if (shape.pair == 1) {
      copy_tile(place, x, column, tile.token, barrier);
    } else if (tile.divides) {
      copy_tile(place, x, column, tile.token, barrier);
      copy_tile(place + half * kStageRowBytes, x, column, tile.token + half, barrier);
    } else {
      copy_tile_to_pair(place + rank * half * kStageRowBytes, x, column, tile.token + rank * half, barrier);
    }
  }
  __device__ __forceinline__ void copy_scales(uint32_t place, const WgmmaTile& tile, int stage, int count,
                                              uint32_t barrier) const {
    const T* scales = static_cast<const T*>(tile.segment.scales) + tile.row;
#pragma unroll
    for (int run = 0; run < 2; ++run) {
      const int group = min(stage * kWords + run * (kWords / 2), p.words - 1) / p.words_per_group;
      if (run < shape.scale_runs)
        copy_bulk(place + run * tile.rows * 2,
                  reinterpret_cast<const unsigned char*>(scales + group * tile.segment.out_features), count * 2,
                  barrier);
    }
  }
};

}  // namespace codegemm::cuda
