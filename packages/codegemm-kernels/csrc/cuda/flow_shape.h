// How a launch of codebook_flow.cuh divides K, rows and shared memory.
#pragma once
#include "codebook_table.cuh"
#include "product.h"

namespace codegemm::cuda {

constexpr int kFlowTokens = 8, kFlowWarps = 16, kFlowRows = 32, kFlowSlots = 3;
// Of a warp's sums of a tile, [token][row]: 16-byte stores of a quarter warp meet different banks.
constexpr int kFlowPitch = kFlowRows + 4, kFlowSums = kFlowTokens * kFlowPitch;

// Words of a unit of K: 128 columns of v = 4 and 8, 256 of v = 16. Units whose x a warp keeps, in 64 registers.
__host__ __device__ constexpr int unit_words(int v) { return v == 4 ? 8 : 4; }
__host__ __device__ constexpr int kept_units(int v) { return v == 16 ? 2 : 4; }
// What a turn takes in a warp's ring: codes of a unit, and scales of its rows.
__host__ __device__ constexpr int turn_bytes(int v) { return (unit_words(v) * 4 + 2) * kFlowRows; }
// Tables of 32 KB that a codebook takes.
__host__ __device__ constexpr int table_planes(int v) { return v == 8 ? 1 : 2; }

// How a launch divides K, rows and shared memory; chosen by the launcher. A block has the tables at the start of its
// dynamic shared memory.
struct FlowShape {
  int first_cluster[kMaxSegments + 1];  // of each segment; the number of clusters
  int tiles;                            // of 32 rows, of a cluster, at most
  Shares units;                         // of K, for the blocks of a cluster
  int section_tiles;                    // of a cluster, between two barriers
  int ring, partial, sums, bytes;       // offsets: warps' rings, their sums, the block's sums
};

// Gives each segment clusters of its own, at most `clusters`, so that none has more tiles than need be.
inline bool divide_tiles(FlowShape& shape, const Product& p, int clusters) {
  const auto ceil = [](int64_t n, int64_t unit) { return int((n + unit - 1) / unit); };
  if (clusters < p.segments) return false;
  for (shape.tiles = ceil(ceil(p.total_rows, kFlowRows), clusters);; ++shape.tiles) {
    shape.first_cluster[0] = 0;
    for (int i = 0; i < kMaxSegments; ++i)
      shape.first_cluster[i + 1] =
          shape.first_cluster[i] + (i < p.segments ? ceil(p.segment[i].out_features, kFlowRows * shape.tiles) : 0);
    if (shape.first_cluster[kMaxSegments] <= clusters) return true;
  }
}

// Divides a launch for clusters of `cluster` blocks, `clusters` of them at once. False if x does not fit into registers
// or `shared_bytes` do not suffice.
inline bool make_flow_shape(FlowShape& shape, const Product& p, int v, int cluster, int clusters, int shared_bytes) {
  const auto ceil = [](int64_t n, int64_t unit) { return int((n + unit - 1) / unit); };
  const int units = ceil(p.words, unit_words(v));
  shape.units = {units / cluster, units % cluster};
  shape.ring = p.num_codebooks * table_planes(v) * kTableBytes;
  shape.partial = shape.ring + kFlowWarps * kFlowSlots * turn_bytes(v);
  const int tile_bytes = (kFlowWarps + (cluster > 1)) * kFlowSums * 4;
  const int most = shared_bytes < shape.partial ? 0 : (shared_bytes - shape.partial) / tile_bytes;
  if (units < cluster || shape.units.first(1) > kFlowWarps * kept_units(v) || most < 1) return false;
  if (!divide_tiles(shape, p, clusters)) return false;
  shape.section_tiles = ceil(shape.tiles, ceil(shape.tiles, most));
  shape.sums = shape.partial + shape.section_tiles * kFlowWarps * kFlowSums * 4;
  shape.bytes = shape.partial + shape.section_tiles * tile_bytes;
  return true;
}

}  // namespace codegemm::cuda
