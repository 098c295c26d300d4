// 2 to 16 tokens: y = x Wᵀ with weights that go from a shared-memory codebook straight into tensor-core operands
// (codebook_table.cuh has their layout).
//
// The product is m16n8k16 with tokens as its 16 rows and 8 weight rows as columns, so the registers of a lookup are the
// B operand in order (the other way round costs moves). Of up to 8 tokens an A operand holds two k16 steps, one in each
// half of its rows; both have sums of their own, of which the other half is of no use. That halves the bytes of x.
//
// A tile is 32 rows, a chunk of K 8 (v = 4: two words a lane) or 4 lookups a row and codebook; an item is a tile's
// chunk, a turn one codebook of it. The items of a block are listed tile by tile, and each warp takes an equal part of
// the list, wherever that begins and ends in a tile: no two warps' shares differ by more than an item. A warp that
// starts a tile stores its sums at the tile's place; one that joins later stores them at a place of its own, and they
// are added in the order of warps. Between the first and the last barrier of a part of K no warp waits for another:
// each has a ring of its own for the codes and scales of its next turns.
//
// Scales multiply the fp32 sums of a turn when that has one scale a row (kScaleSums), and the weights before the
// product otherwise, which rounds scale*weight to 16 bits as a dense fp16 weight would be.
//
// The blocks of a cluster divide K; sums are added through distributed shared memory in the order of ranks: bit-equal
// between runs. Without clusters (before sm_90) a block has all K.
#pragma once
#include "codebook_table.cuh"
#include "cuda/ptx.cuh"
#include "element.cuh"
#include "mma_shape.h"
#include "product.h"

namespace codegemm::cuda {

// The part of a launch that a block computes at a time: tiles from `row` of a segment on, times chunks.
struct MmaPart {
  const Segment& segment;
  int64_t row;
  int tiles, first_chunk, chunks;
};

// A warp's share of a part: `left` turns, the first at this tile, chunk and codebook.
struct Walk {
  int tile, chunk, codebook, left;

  __device__ __forceinline__ Walk(const Product& p, const MmaPart& part, int warps, int warp) {
    const int items = part.tiles * part.chunks, each = (items + warps - 1) / warps, begin = warp * each;
    tile = begin / part.chunks;
    chunk = begin - tile * part.chunks;
    codebook = 0;
    left = max(0, min(each, items - begin)) * p.num_codebooks;
  }
  __device__ __forceinline__ void advance(const Product& p, const MmaPart& part) {
    --left;
    if (++codebook < p.num_codebooks) return;
    codebook = 0;
    if (++chunk < part.chunks) return;
    chunk = 0;
    ++tile;
  }
};

// A warp's ring: the codes and scales of its next turns on their way from memory by cp.async. Each lane copies four
// rows of a word, so that a quarter of a warp reads 128 neighbouring bytes: when each lane loads its own words, a
// quarter touches four lines and the load takes four times as long. Rows beyond N and words beyond K become zeros.
//
//     slot:  loads x (4 words x 8 places of four rows; rows 4g .. 4g+3 of word c are at place g ^ 2c: no conflicts)
//            scales: 32 rows (kScaleSums) or loads x 4 words x 32 rows
template <typename T, int V, int kTokens, bool kScaleSums>
struct Feed {
  static constexpr int kLoads = chunk_loads(V), kCodes = kLoads * 512, kSlots = ring_slots(V, kTokens);
  static constexpr int kSlot = slot_bytes(V, kScaleSums);
  const Product& p;
  const MmaPart& part;
  Walk at;                        // the next turn to be asked for
  uint32_t ring, target, source;  // the slots; where in one a lane puts codes, and where it takes its words from
  int slot = 0, lane;

  __device__ __forceinline__ Feed(const Product& product, const MmaPart& of, const Walk& start, uint32_t address,
                                  int lane_index)
      : p(product), part(of), at(start), ring(address), lane(lane_index) {
    target = lane / 8 * 128 + ((lane % 8) ^ (lane / 8 * 2)) * 16;
    source = lane % 4 * 128 + ((lane / 4) ^ (lane % 4 * 2)) * 16;
#pragma unroll
    for (int i = 0; i < kSlots - 1; ++i) ask();
  }

  __device__ __forceinline__ void ask() {
    if (at.left > 0) {
      const uint32_t place = ring + slot * kSlot, n = uint32_t(part.segment.out_features);
      const int row = int(part.row) + at.tile * kTileRows, word = (part.first_chunk + at.chunk) * (4 * kLoads);
      const int lane_row = row + lane % 8 * 4;
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        const int lane_word = word + 4 * l + lane / 8;
        const uint32_t* codes =
            part.segment.codes + uint64_t(uint32_t(at.codebook * p.words + lane_word)) * n + lane_row;
        copy_16_or_zero(place + l * 512 + target, codes, lane_word < p.words && lane_row < int(n));
      }
      ask_scales(place + kCodes, static_cast<const T*>(part.segment.scales), row, word, n);
      at.advance(p, part);
    }
    commit_copies();
    slot = after(slot);
  }

  __device__ __forceinline__ void ask_scales(uint32_t place, const T* scales, int row, int word, uint32_t n) const {
    if constexpr (kScaleSums) {
      const uint32_t group = word / p.words_per_group;
      const int lane_row = row + lane * 8;
      if (lane < 4) copy_16_or_zero(place + lane * 16, scales + uint64_t(group) * n + lane_row, lane_row < int(n));
    } else {
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        const int lane_word = min(word + 4 * l + lane / 4, p.words - 1), lane_row = row + lane % 4 * 8;
        const uint32_t group = lane_word / p.words_per_group;
        if (lane < 16)
          copy_16_or_zero(place + l * 256 + lane * 16, scales + uint64_t(group) * n + lane_row, lane_row < int(n));
      }
    }
  }

  // Waits for the next turn and asks for another; returns the place of its codes.
  __device__ __forceinline__ uint32_t next() {
    wait_copies<kSlots - 2>();
    __syncwarp();  // all lanes' copies are there, and all lanes have left the slot that is filled next
    const int taken = after(slot);
    ask();
    return ring + taken * kSlot;
  }
  __device__ __forceinline__ static int after(int slot) { return slot + 1 == kSlots ? 0 : slot + 1; }
};

// Sums of a tile, value[j][..] of product j: rows 8c + j and 8c+4 + j of token g, then of token g + 8.
template <int kTokens>
struct TileSums {
  float value[4][kTokens / 4];

  // Product j += scale * turn's sums. scale: of rows 8c .. 8c+7. With 8 tokens odd k16 steps have sums of their own, in
  // the lower half of the operand's rows.
  __device__ __forceinline__ void add(int j, const float (&even)[4], const float (&odd)[4], const float2 (&scale)[4]) {
    const float low = j % 2 ? scale[j / 2].y : scale[j / 2].x, high = j % 2 ? scale[2 + j / 2].y : scale[2 + j / 2].x;
#pragma unroll
    for (int i = 0; i < kTokens / 4; ++i) {
      value[j][i] = fmaf(i % 2 ? high : low, even[i], value[j][i]);
      if constexpr (kTokens == 8) value[j][i] = fmaf(i % 2 ? high : low, odd[2 + i], value[j][i]);
    }
  }

  // Stores them at place[token][row], or adds them, and clears them.
  __device__ __forceinline__ void put(float* place, int pitch, bool add, int lane) {
#pragma unroll
    for (int i = 0; i < kTokens / 4; ++i) {
      float4* at = reinterpret_cast<float4*>(place + (i / 2 * 8 + lane / 4) * pitch + lane % 4 * 8 + i % 2 * 4);
      float4 sum = make_float4(value[0][i], value[1][i], value[2][i], value[3][i]);
      value[0][i] = value[1][i] = value[2][i] = value[3][i] = 0;
      if (add) add_to(sum, *at);
      *at = sum;
    }
  }
};

// A warp's share of a part.
template <typename T, int V, int kTokens, bool kScaleSums>
struct Multiplier {
  static constexpr int kLoads = chunk_loads(V), kOperands = kLoads * operands_of_step<V, kTokens>();
  Feed<T, V, kTokens, kScaleSums> feed;
  Walk at;
  uint32_t x, table;  // addresses of the lane's first A operand of the part, and of its copy of entry 0
  float *sums, *joined;
  bool add, joins;  // to what sums has; the tile that another warp has started
  TileSums<kTokens> total;
  uint4 operands[kOperands];

  __device__ __forceinline__ void turn() {
    const uint32_t place = feed.next();
    const uint32_t chunk_x = x + at.chunk * (kOperands * 512);
    if (at.codebook == 0) {
#pragma unroll
      for (int i = 0; i < kOperands; ++i)
        operands[i] = load_shared<uint4>((chunk_x ^ swizzle(kTokens == 8 ? i % (V / 2) : i % V / 2)) + i * 512);
    }
    multiply(place, table + at.codebook * kTableBytes);
    const int tile = at.tile;
    at.advance(feed.p, feed.part);
    if (at.left > 0 && at.tile == tile) return;
    if (joins)
      total.put(joined, kTilePitch, false, feed.lane);
    else
      total.put(sums + tile * kTileRows, feed.p.rows_per_range + 4, add, feed.lane);
    joins = false;
  }

  __device__ __forceinline__ void multiply(uint32_t place, uint32_t entries) {
    constexpr int kSteps = V / 4, kSets = kTokens == 8 ? 2 : 1;  // k16 steps of a lookup; of sums
    float sum[kSets][4][4];
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const uint4 codes = load_shared<uint4>(place + l * 512 + feed.source);
      uint2 scales;
      if constexpr (!kScaleSums)
        scales = load_shared<uint2>(place + feed.kCodes + l * 256 + feed.lane % 4 * 64 + feed.lane / 4 * 8);
#pragma unroll
      for (int byte = 0; byte < 4; ++byte) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          uint32_t weight[V / 2];
          look_up<V>(weight, j == 0 ? codes.x : j == 1 ? codes.y : j == 2 ? codes.z : codes.w, byte, entries);
          if constexpr (!kScaleSums) {
#pragma unroll
            for (int e = 0; e < V / 2; ++e) weight[e] = multiply_pairs<T>(weight[e], doubled_scale(scales, j));
          }
#pragma unroll
          for (int s = 0; s < kSteps; ++s) {
            const int step = (l * 4 + byte) * kSteps + s;
            if constexpr (!kScaleSums)
              mma_k16<T>(total.value[j], operands[step], weight[2 * s], weight[2 * s + 1]);
            else if (step < kSets)
              mma_k16_first<T>(sum[step % kSets][j], operands[step / kSets], weight[2 * s], weight[2 * s + 1]);
            else
              mma_k16<T>(sum[step % kSets][j], operands[step / kSets], weight[2 * s], weight[2 * s + 1]);
          }
        }
      }
    }
    if constexpr (kScaleSums) {
      const uint4 scales = load_shared<uint4>(place + feed.kCodes + feed.lane % 4 * 16);
      const float2 pair[4] = {unpack_pair<T>(scales.x), unpack_pair<T>(scales.y), unpack_pair<T>(scales.z),
                              unpack_pair<T>(scales.w)};
#pragma unroll
      for (int j = 0; j < 4; ++j) total.add(j, sum[0][j], sum[kSets - 1][j], pair);
    }
  }
};

// Adds the sums of the warps that joined tiles late to the tiles' places, in the order of warps: a warp a tile.
template <int kTokens>
__device__ __forceinline__ void add_joined(const Product& p, const MmaPart& part, float* sums, const float* joined,
                                           int warps, int warp, int lane) {
  const int items = part.tiles * part.chunks, each = (items + warps - 1) / warps, pitch = p.rows_per_range + 4;
  for (int tile = warp; tile < part.tiles; tile += warps) {
    const int first = tile * part.chunks / each + 1, last = (tile * part.chunks + part.chunks - 1) / each;
    for (int i = lane; i < (first > last ? 0 : p.tokens * (kTileRows / 4)); i += 32) {
      const int token = i / (kTileRows / 4), row = i % (kTileRows / 4) * 4;
      float4* place = reinterpret_cast<float4*>(sums + token * pitch + tile * kTileRows + row);
      float4 sum = *place;
      for (int w = first; w <= last; ++w)
        add_to(sum, *reinterpret_cast<const float4*>(joined + (w * kTokens + token) * kTilePitch + row));
      *place = sum;
    }
  }
}

template <typename T, int V, int kTokens, bool kScaleSums>
__global__ void __launch_bounds__(kMmaWarps * 32, 1)
    codebook_mma_kernel(const __grid_constant__ Product p, const __grid_constant__ MmaShape shape) {
  static_assert(kScaleSums || kTokens == 16);
  CODEGEMM_DYNAMIC_SHARED(mma_shared);
  constexpr int kSteps = chunk_loads(V);
  const int lane = threadIdx.x % 32, warp = warp_index(), warps = blockDim.x / 32, rank = cluster_rank();
  const int slice_first = shape.chunks.first(rank), slice_last = shape.chunks.first(rank + 1);
  float* sums = reinterpret_cast<float*>(mma_shared + shape.sums);
  float* joined = reinterpret_cast<float*>(mma_shared + shape.joined);
  uint32_t x = shared_address(mma_shared + shape.x) + lane * 16;
  uint32_t table = shared_address(mma_shared) + copy_of_lane<V>(lane);
  const uint32_t ring =
      shared_address(mma_shared + shape.ring) + warp * (ring_slots(V, kTokens) * slot_bytes(V, kScaleSums));
  keep(x);
  keep(table);
  allow_next_kernel();

  int copied_segment = -1, staged_chunk = -1;
  for (int range = cluster_index(); range < shape.first_range[kMaxSegments]; range += shape.clusters) {
    int s = 0;
    while (range >= shape.first_range[s + 1]) ++s;
    const Segment& segment = p.segment[s];
    const int64_t first = int64_t(range - shape.first_range[s]) * p.rows_per_range;
    const int rows = int(min(int64_t(p.rows_per_range), segment.out_features - first));
    for (int chunk = slice_first; chunk < slice_last; chunk += shape.staged_chunks) {
      const MmaPart part = {segment, first, (rows + kTileRows - 1) / kTileRows, chunk,
                            min(shape.staged_chunks, slice_last - chunk)};
      const Walk walk(p, part, warps, warp);
      Multiplier<T, V, kTokens, kScaleSums> product = {
          {p, part, walk, ring, lane}, walk,          x, table, sums, joined + warp * (kTokens * kTilePitch),
          chunk != slice_first,        walk.chunk > 0};
      if (copied_segment >= 0) __syncthreads();  // the warps have finished with the previous part
      if (s != copied_segment) {
        copy_codebooks<T, V>(mma_shared, static_cast<const T*>(segment.codebooks), p.num_codebooks);
        if (copied_segment < 0) wait_for_previous_kernel();  // codes and codebooks are weights: only x needs the wait
        copied_segment = s;
      }
      if (chunk != staged_chunk) {
        stage_x<T, V, kTokens>(mma_shared + shape.x, p, chunk * kSteps, (chunk + part.chunks) * kSteps, warps, warp,
                               lane);
        staged_chunk = chunk;
      }
      __syncthreads();
      while (product.at.left > 0) product.turn();
      wait_copies<0>();
      __syncthreads();
      add_joined<kTokens>(p, part, sums, joined, warps, warp, lane);
    }
    cluster_sync();
    reduce_tokens<T>(p, segment, sums, shape.share_rows, first, 0, p.tokens, blockDim.x);
    cluster_sync_relaxed();  // no block overwrites its sums, or leaves, while another reads them
  }
}

}  // namespace codegemm::cuda
