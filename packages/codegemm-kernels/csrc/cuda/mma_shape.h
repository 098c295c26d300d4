// How a launch of codebook_mma.cuh divides K, rows and shared memory.
#pragma once
#include "codebook_table.cuh"
#include "product.h"

namespace codegemm::cuda {

constexpr int kMmaWarps = 16, kTileRows = 32, kTilePitch = kTileRows + 4;

__host__ __device__ constexpr int chunk_loads(int v) { return v == 4 ? 2 : 1; }  // words a lane, row and codebook

// Slots of a warp's ring, one more than the turns whose codes are on their way. Two turns of v = 4 are 32 KB a
// multiprocessor, what memory needs to be kept busy; x of 16 tokens leaves room for one.
__host__ __device__ constexpr int ring_slots(int v, int tokens) { return (v == 4 ? 3 : 4) - (tokens == 16 ? 1 : 0); }
// What a turn takes there: codes, and scales of the rows or of each row's words.
__host__ __device__ constexpr int slot_bytes(int v, bool scale_sums) {
  return chunk_loads(v) * (scale_sums ? 512 : 768) + (scale_sums ? 64 : 0);
}

// An instance of the kernel, as its launcher needs to know it.
struct MmaKernel {
  int vector_length, tokens;  // 8 or 16
  bool scale_sums;
};

// How a launch divides K, rows and shared memory; chosen by the launcher. Ranges do not cross segments. A block has
// the tables at the start of its dynamic shared memory.
struct MmaShape {
  int first_range[kMaxSegments + 1];  // of each segment; the number of ranges
  int clusters;                       // cluster i computes range i, i + clusters, ...
  Shares chunks;                      // of K, for the blocks of a cluster
  int staged_chunks;                  // whose x is in shared memory at a time
  int share_rows;                     // rows of a range that each block of a cluster stores
  int ring, joined, x, sums, bytes;   // offsets: of warps' rings, sums of warps that join a tile, x, sums[token][row]
};

// Divides a launch for clusters of `cluster` blocks of `warps` warps, `clusters` of them at once, and sets
// p.rows_per_range. False if K is too short for the cluster or `shared_bytes` do not suffice.
inline bool make_mma_shape(MmaShape& shape, Product& p, const MmaKernel& kernel, int warps, int cluster, int clusters,
                           int shared_bytes) {
  const auto ceil = [](int64_t n, int64_t unit) { return (n + unit - 1) / unit; };
  const int v = kernel.vector_length, tokens = kernel.tokens, loads = chunk_loads(v);
  const int chunks = int(ceil(p.words, 4 * loads)), chunk_x = loads * (tokens == 8 ? v / 2 : v) * 512;
  if (chunks < cluster) return false;
  shape.chunks = {chunks / cluster, chunks % cluster};
  shape.ring = p.num_codebooks * kTableBytes;
  shape.joined = shape.ring + warps * ring_slots(v, tokens) * slot_bytes(v, kernel.scale_sums);
  shape.x = shape.joined + warps * tokens * kTilePitch * 4;
  const int slice = shape.chunks.first(1), room = shared_bytes - shape.x;
  const int with_all_x = ((room - slice * chunk_x) / (4 * tokens) - 4) / kTileRows;  // tiles of a range
  const int with_half = (room / 2 / (4 * tokens) - 4) / kTileRows;                   // x staged in parts
  const int most = with_all_x > 0 ? with_all_x : with_half;
  if (room < 0 || most < 1) return false;
  int64_t tiles = 0;
  for (int i = 0; i < p.segments; ++i) tiles += ceil(p.segment[i].out_features, kTileRows);
  const int64_t passes = ceil(ceil(tiles, clusters), most);
  int64_t range_tiles = ceil(tiles, passes * clusters);
  for (;; ++range_tiles) {  // the last range of each segment may be short, so it may take a few more tiles
    shape.first_range[0] = 0;
    for (int i = 0; i < kMaxSegments; ++i)
      shape.first_range[i + 1] =
          shape.first_range[i] + (i < p.segments ? int(ceil(p.segment[i].out_features, range_tiles * kTileRows)) : 0);
    if (range_tiles == most || shape.first_range[kMaxSegments] <= passes * clusters) break;
  }
  p.rows_per_range = int(range_tiles) * kTileRows;
  const int ranges = shape.first_range[kMaxSegments], sums = tokens * (p.rows_per_range + 4) * 4;
  shape.clusters = clusters < ranges ? clusters : ranges;
  shape.share_rows = int(ceil(p.rows_per_range, 4 * cluster)) * 4;
  shape.staged_chunks = slice < (room - sums) / chunk_x ? slice : (room - sums) / chunk_x;
  if (shape.staged_chunks < 1) return false;
  shape.sums = shape.x + shape.staged_chunks * chunk_x;
  shape.bytes = shape.sums + sums;
  return true;
}

}  // namespace codegemm::cuda
