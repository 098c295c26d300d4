// 17 tokens and more on Hopper: y = x Wᵀ by warpgroup products (wgmma) whose A operands, 64 rows of W, are looked up
// in a shared-memory codebook (codebook_table.cuh) and whose B operand is x as it is stored.
//
// A block is 2 or 4 warpgroups of 64 rows of W each, and kN tokens; sums stay in registers. K goes by in stages of 64
// columns, whose x, codes and scales four further warps copy into slots of a ring (ring.cuh), x with the tensor copy
// engine. A slot is given back in the middle of the next stage, when the products that read it have ended
// without being waited for.
//
// Lane 4g + c of a warp has rows 2g and 2g+1 of its 16: they are rows g and g+8 of the products, so that their codes
// are neighbours. Of a k16 step it needs columns 2c, 2c+1 and 2c+8, 2c+9, each one word of an entry: lookups are of 4
// bytes, and a lane always reads bank `lane`.
//
//     v = 4   a word of codes is a step: bytes c/2 and 2 + c/2, word c%2 of their entries
//     v = 8   a word of codes is two steps: bytes 0, 1 and then 2, 3; word c of their entries
//
// Entries of two codebooks are added and multiplied by the row's scale before the product, which rounds as a dense
// weight would be rounded. Half a stage has one scale a row (fits_wgmma).
//
// The blocks of a cluster divide K and add their sums through distributed shared memory in the order of their ranks.
#pragma once
#include "codebook_table.cuh"
#include "cuda/ptx.cuh"
#include "cuda/wgmma.cuh"
#include "element.cuh"
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

// How a launch divides rows, tokens, K and shared memory. Row tiles do not cross segments. Tables are at the start of
// shared memory; sums[token][row] later take the place of everything.
struct WgmmaShape {
  int first_tile[kMaxSegments + 1];  // row tiles before each segment
  int token_tiles;                   // a cluster's number: row tile * token_tiles + token tile
  Shares stages;                     // of K, for the blocks of a cluster
  int share_rows;                    // rows that each block of a cluster stores
  int scale_runs;                    // scales a row and stage, 1 or 2
  int slots;                         // of the ring
  int x, weights, slot_weights;      // offsets of the slots of x, of codes and scales; bytes of one of the latter
  int barriers, bytes;
};

// With as many slots as `shared_bytes` allow, up to kMaxStages; fewer than 3 are too few.
inline WgmmaShape make_wgmma_shape(Product& p, int vector_length, int tokens, int groups, int cluster,
                                   int shared_bytes) {
  const auto ceil = [](int64_t n, int64_t unit) { return int((n + unit - 1) / unit); };
  WgmmaShape shape = {};
  const int rows = p.rows_per_range = 64 * groups;
  for (int i = 0; i < kMaxSegments; ++i)
    shape.first_tile[i + 1] = shape.first_tile[i] + (i < p.segments ? ceil(p.segment[i].out_features, rows) : 0);
  shape.token_tiles = ceil(p.tokens, tokens);
  const int words = words_of_stage(vector_length), stages = ceil(p.words, words);
  shape.stages = {stages / cluster, stages % cluster};
  shape.share_rows = ceil(rows, 4 * cluster) * 4;
  shape.x = p.num_codebooks * kTableBytes;
  const int group = int(p.words_per_group.value);
  shape.scale_runs = group % words == 0 || group == p.words ? 1 : 2;
  shape.slot_weights = rows * (p.num_codebooks * words * 4 + shape.scale_runs * 2);
  const int slot = tokens * kStageRowBytes + shape.slot_weights, sums = tokens * (rows + 4) * 4;
  const int fit = (shared_bytes - shape.x - int(sizeof(RingBarriers))) / slot;
  shape.slots = fit < kMaxStages ? fit : kMaxStages;
  shape.weights = shape.x + shape.slots * tokens * kStageRowBytes;
  const int ring = shape.weights + shape.slots * shape.slot_weights;
  shape.barriers = ring > sums ? ring : sums;
  shape.bytes = shape.barriers + int(sizeof(RingBarriers));
  return shape;
}

// The part of a launch that a block computes.
struct WgmmaTile {
  const Segment& segment;
  int64_t row;  // the first
  int token, rows, first_stage, last_stage;
};

// One lane of each producer warp: copies x, codes and scales of each stage into the next slot that is free. Every warp
// has every fourth run of codes, one scales too, and the last x, which alone is not a weight: it waits for the previous
// kernel. A single warp for all took 900 cycles a stage, twice what the products take.
template <typename T, int V, int kBooks, int kN>
struct StageProducer {
  static constexpr int kWords = words_of_stage(V), kAll = kBooks * kWords, kRuns = (kAll + 3) / 4;
  const Product& p;
  const WgmmaShape& shape;
  const WgmmaTile& tile;
  const Ring& ring;
  uint32_t shared;

  __device__ __forceinline__ void run(const TileMap& x, int producer) const {
    const int64_t n = tile.segment.out_features;
    const int count = int(min(int64_t(tile.rows), n - tile.row));
    const unsigned char* source[kRuns];
    int word[kRuns];
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const int run = producer + 4 * i;
      word[i] = run < kAll ? tile.first_stage * kWords + run % kWords : p.words;  // none
      source[i] = reinterpret_cast<const unsigned char*>(tile.segment.codes +
                                                         (int64_t(run / kWords) * p.words + word[i]) * n + tile.row);
    }
    if (producer == 3) wait_for_previous_kernel();
    uint32_t phase = 1;
    for (int stage = tile.first_stage, slot = 0; stage < tile.last_stage; ++stage) {
      const uint32_t barrier = ring.full(slot), place = shared + shape.weights + slot * shape.slot_weights;
      wait(ring.empty(slot), phase);
      if (producer == 0) {
        const int words = kBooks * min(kWords, p.words - stage * kWords);
        expect_bytes(barrier, kN * kStageRowBytes + count * (words * 4 + shape.scale_runs * 2));
      }
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        if (word[i] < p.words) copy_bulk(place + (producer + 4 * i) * tile.rows * 4, source[i], count * 4, barrier);
        word[i] += kWords;
        source[i] += kWords * 4 * n;
      }
      if (producer == 2) copy_scales(place + tile.rows * kAll * 4, stage, count, barrier);
      if (producer == 3)
        copy_tile(shared + shape.x + slot * (kN * kStageRowBytes), x, stage * kStageColumns, tile.token, barrier);
      if (++slot == shape.slots) {
        slot = 0;
        phase ^= 1;
      }
    }
  }
  __device__ __forceinline__ void copy_scales(uint32_t place, int stage, int count, uint32_t barrier) const {
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

// How a lane looks up its words of the weights of half a stage.
template <typename T, int V, int kBooks>
struct WeightLookup {
  static constexpr int kWords = words_of_stage(V);
  uint32_t table, selector;  // of v = 4

  __device__ __forceinline__ WeightLookup(uint32_t shared, int lane)
      : table(shared + lane * 4), selector(row_selector(0) << (lane % 4 / 2 * 8)) {
    keep(table);
    keep(selector);
  }
  // Byte of a step that has columns 2c, 2c+1 (part 0) or 2c+8, 2c+9 of a lane.
  __device__ __forceinline__ uint32_t byte(int step, int part) const {
    return V == 4 ? selector << (16 * part) : row_selector(2 * step + part);
  }
  // weight[step]: A operands of half a stage.
  __device__ __forceinline__ void half_stage(uint32_t (&weight)[2][4], const uint2 (&codes)[kBooks][kWords],
                                             uint32_t scales, int half) const {
    const uint32_t scale[2] = {permute_bytes(scales, 0, 0x1010), permute_bytes(scales, 0, 0x3232)};
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = i % 2, part = i / 2;
        uint32_t sum = 0;
#pragma unroll
        for (int book = 0; book < kBooks; ++book) {
          const uint2 word = codes[book][V == 4 ? half * 2 + step : half];
          const uint32_t entry =
              load_shared<uint32_t>(row_address(row ? word.y : word.x, byte(step, part), table) + book * kTableBytes);
          sum = book == 0 ? entry : add_pairs<T>(sum, entry);
        }
        weight[step][i] = multiply_pairs<T>(sum, scale[row]);
      }
    }
  }
};

// The other warps: the sums of a lane's two rows and all tokens, as product_k16 leaves them.
template <typename T, int V, int kBooks, int kN>
__device__ __forceinline__ void multiply_stages(float (&sum)[kN / 2], const WgmmaShape& shape, const WgmmaTile& tile,
                                                const Ring& ring, uint32_t shared, int row, int lane) {
  const WeightLookup<T, V, kBooks> lookup(shared, lane);
  uint32_t lane_codes = shared + shape.weights + row * 4;
  uint32_t lane_scales = shared + shape.weights + kBooks * words_of_stage(V) * tile.rows * 4 + row * 2;
  keep(lane_codes);
  keep(lane_scales);
  const bool gives_back = lane == 0;
  const int next_scales = (shape.scale_runs - 1) * tile.rows * 2;
  RingPlace at;
  settle(sum);
  for (int stage = tile.first_stage; stage < tile.last_stage; ++stage) {
    const uint32_t offset = at.stage * shape.slot_weights;
    const uint64_t x = tile_descriptor(shared + shape.x + at.stage * (kN * kStageRowBytes));
    wait(ring.full(at.stage), at.phase);
    uint2 codes[kBooks][words_of_stage(V)];
#pragma unroll
    for (int i = 0; i < kBooks; ++i) {
#pragma unroll
      for (int w = 0; w < words_of_stage(V); ++w)
        codes[i][w] = load_shared<uint2>(lane_codes + offset + (i * words_of_stage(V) + w) * tile.rows * 4);
    }
    const uint32_t scales[2] = {load_shared<uint32_t>(lane_scales + offset),
                                load_shared<uint32_t>(lane_scales + offset + next_scales)};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t weight[2][4];
      wait_products<1>();
      if (half == 1 && stage > tile.first_stage && gives_back)  // the products of the stage before have ended
        arrive(ring.empty(at.stage == 0 ? shape.slots - 1 : at.stage - 1));
      lookup.half_stage(weight, codes, scales[half], half);
      begin_products();
      product_k16<T, kN>(sum, weight[0], x + half * 4);
      product_k16<T, kN>(sum, weight[1], x + half * 4 + 2);
      commit_products();
    }
    at.advance(shape.slots);
  }
  wait_products<0>();
  settle(sum);
}

// Sums of the block's rows, then, over the cluster, y: the warpgroups' part of the kernel.
template <typename T, int V, int kBooks, int kN>
__device__ __forceinline__ void multiply_tile(const Product& p, const WgmmaShape& shape, const WgmmaTile& tile,
                                              const Ring& ring, unsigned char* shared, int warp, int lane) {
  const int row = warp * 16 + lane / 4 * 2, pitch = tile.rows + 4;  // row: the lane's first in the tile
  float sum[kN / 2] = {};
  multiply_stages<T, V, kBooks, kN>(sum, shape, tile, ring, shared_address(shared), row, lane);
  consumer_sync(tile.rows * 2);  // nobody reads tables and slots any more
  float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int i = 0; i < kN / 4; ++i)  // rows 2g, 2g+1 of a token
    *reinterpret_cast<float2*>(sums + (i / 2 * 8 + lane % 4 * 2 + i % 2) * pitch + row) =
        make_float2(sum[i / 2 * 4 + i % 2], sum[i / 2 * 4 + 2 + i % 2]);
  cluster_sync();
  wait_for_previous_kernel();
  reduce_tokens<T>(p, tile.segment, sums, shape.share_rows, tile.row, tile.token, min(kN, p.tokens - tile.token),
                   tile.rows * 2);
  cluster_sync_relaxed();  // no block leaves while another reads its sums
}

template <typename T, int V, int kBooks, int kN>
__global__ void __launch_bounds__(4 * 128 + kProducerThreads, 1)
    codebook_wgmma_kernel(const __grid_constant__ Product p, const __grid_constant__ WgmmaShape shape,
                          const __grid_constant__ TileMap x) {
  CODEGEMM_DYNAMIC_SHARED(wgmma_shared);
  const int warp = warp_index(), rank = cluster_rank(), rows = (blockDim.x - kProducerThreads) / 2;
  const int row_tile = cluster_index() / shape.token_tiles;
  int s = 0;
  while (row_tile >= shape.first_tile[s + 1]) ++s;
  const WgmmaTile tile = {p.segment[s],
                          int64_t(row_tile - shape.first_tile[s]) * rows,
                          (cluster_index() - row_tile * shape.token_tiles) * kN,
                          rows,
                          shape.stages.first(rank),
                          shape.stages.first(rank + 1)};
  const Ring ring(*reinterpret_cast<const RingBarriers*>(wgmma_shared + shape.barriers));
  allow_next_kernel();
  if (threadIdx.x == 0) init_ring(ring, shape.slots, rows / 16);
  copy_codebooks<T, V>(wgmma_shared, static_cast<const T*>(tile.segment.codebooks), kBooks);
  __syncthreads();
  if (warp < rows / 16) {
    if constexpr (kN == 128) take_registers<112>();  // of the 96 a thread that the block starts with
    multiply_tile<T, V, kBooks, kN>(p, shape, tile, ring, wgmma_shared, warp, threadIdx.x % 32);
  } else {
    if constexpr (kN == 128) leave_registers<24>();
    if (elect_lane())
      StageProducer<T, V, kBooks, kN>{p, shape, tile, ring, shared_address(wgmma_shared)}.run(x, warp - rows / 16);
    cluster_sync();
    cluster_sync_relaxed();
  }
}

}  // namespace codegemm::cuda
