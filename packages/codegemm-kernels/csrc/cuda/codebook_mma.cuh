// 2 to 64 tokens: y = x Wᵀ with weights that go from a shared-memory codebook straight into tensor-core operands.
//
// Every lane looks codes up in a copy of the codebook that lies in its own banks, so lookups have no bank conflicts
// whatever the codes are. The copies of an entry are the 128 bytes at 128 e of its codebook's table of 32 KB:
//
//     v =  4   16 copies of  8 bytes                                  one lookup = the B operand of one k16 step
//     v =  8    8 copies of 16 bytes                                  one lookup = two steps
//     v = 16    4 copies of elements 0..7, 4 copies of elements 8..15 one lookup = two loads, four steps
//
// The address of a lookup, table + 128 code + 16 copy, is one dp4a.
//
// Codes and scales arrive through a ring of stages (ring.cuh): a stage has rows of row_warps tiles, stage_steps steps
// and all codebooks. A row of the box is 8 words longer than its rows, which makes the 16-byte reads conflict-free.
//
// The product is m16n8k16 with 16 tokens as rows and 8 weight rows as columns, so that the registers of a lookup are
// the operand in order (the other way round costs four moves a product). A warp multiplies tiles of 32 weight rows,
// kQuads of them for one read of x. Lane l = 4g + c reads word 4s + c of rows 4g .. 4g+3 of a tile in step s (16
// bytes), looks up byte b, and row 4g + j becomes column g of product j. That permutes K and the rows. The k order
// costs nothing, since x is laid out in shared memory as the A operands are read, once a block; the row order is undone
// when sums are stored.
//
// Scales multiply the fp32 sums of a step when the four words share a group (kScaleSums), and the weights before the
// product otherwise, which rounds scale*weight to 16 bits as a dense fp16 weight would be.
//
// The blocks of a cluster divide K, and so do k_warps warps of a block; sums are added through distributed shared
// memory in the order of ranks and warps: bit-equal between runs. Without clusters (before sm_90) a block has all K.
#pragma once
#include "cuda/ptx.cuh"
#include "element.cuh"
#include "product.h"
#include "ring.cuh"

namespace codegemm::cuda {

// Tiles of 32 rows that a warp multiplies at once: two where registers suffice for it.
__host__ __device__ constexpr int mma_quads(int v, int tokens) { return v == 4 && tokens <= 32 ? 2 : 1; }
constexpr int kMmaTableBytes = 256 * 128;  // of a codebook

// How a launch divides K, rows and shared memory; chosen by the launcher. A block has the codebook tables at the start
// of its dynamic shared memory, then the ring, x of chunk_steps steps, and kTokens x (rows_per_range + 4) sums.
struct MmaShape {
  int k_warps;      // warps that divide the steps of a stage; the others divide its rows
  int stage_rows;   // tile_rows a warp in the direction of rows
  int stage_steps;  // a multiple of k_warps
  int stages, stage_bytes;
  int chunk_steps;  // steps of K whose x is in shared memory at a time
  int num_ranges;   // ranges of rows_per_range rows; cluster i computes range i, i + clusters, ...
  int clusters;
  int share_rows;            // rows of a range that each block of a cluster stores
  int ring, x, sums, bytes;  // offsets; the whole
  Shares steps;              // of the blocks of a cluster
};

// Divides a launch for clusters of `cluster` blocks, `clusters` of them at once, and sets p.rows_per_range. False if
// `shared_bytes` do not suffice for two stages, one step of x and one tile of sums.
inline bool make_mma_shape(MmaShape& shape, Product& p, int vector_length, int tokens, int warps, int cluster,
                           int clusters, int k_warps, int steps_a_warp, int shared_bytes) {
  const auto round_up = [](int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; };
  const int tile_rows = 32 * mma_quads(vector_length, tokens);
  const int steps = (p.words + 3) / 4, slice = (steps + cluster - 1) / cluster;
  const int x_bytes = 32 * vector_length * tokens, column_bytes = 4 * tokens;
  const int tables = p.num_codebooks * kMmaTableBytes;
  shape.k_warps = k_warps;
  shape.stage_rows = tile_rows * (warps / k_warps);
  shape.stage_steps = k_warps * steps_a_warp;
  const int groups = (shape.stage_steps * 4 - 1) / int(p.words_per_group.value) + 2;
  shape.stage_bytes = p.num_codebooks * shape.stage_steps * 16 * (shape.stage_rows + 8) + groups * shape.stage_rows * 2;
  const int room = shared_bytes - tables - 2 * shape.stage_bytes;
  const int x_room = room - column_bytes * (tile_rows + 4);  // with the sums of one tile
  shape.chunk_steps = slice;
  if (slice * x_bytes > x_room) {
    shape.chunk_steps = room / 2 / x_bytes / shape.stage_steps * shape.stage_steps;
    if (shape.chunk_steps == 0 && shape.stage_steps * x_bytes <= x_room) shape.chunk_steps = shape.stage_steps;
  }
  if (room < 0 || (shape.chunk_steps < 1 && slice > 0)) return false;
  const int64_t even = round_up((p.total_rows + clusters - 1) / clusters, tile_rows);
  const int64_t most = ((room - shape.chunk_steps * x_bytes) / column_bytes - 4) / tile_rows * tile_rows;
  if (most < tile_rows) return false;
  const int64_t passes = (even + most - 1) / most;
  p.rows_per_range = int(round_up((even + passes - 1) / passes, tile_rows));
  shape.num_ranges = int((p.total_rows + p.rows_per_range - 1) / p.rows_per_range);
  shape.clusters = clusters < shape.num_ranges ? clusters : shape.num_ranges;
  shape.share_rows = (p.rows_per_range + cluster - 1) / cluster;
  shape.steps = {steps / cluster, steps % cluster};
  const int rest = shape.chunk_steps * x_bytes + column_bytes * (p.rows_per_range + 4);
  shape.stages = (shared_bytes - tables - rest) / shape.stage_bytes;
  if (shape.stages > kMaxStages) shape.stages = kMaxStages;
  shape.ring = tables;
  shape.x = shape.ring + shape.stages * shape.stage_bytes;
  shape.sums = shape.x + shape.chunk_steps * x_bytes;
  shape.bytes = shape.sums + column_bytes * (p.rows_per_range + 4);
  return true;
}

// Copies the codebooks of a segment into the layout above.
template <typename T, int V>
__device__ __forceinline__ void copy_codebooks(unsigned char* tables, const T* codebooks, int num_codebooks,
                                               int consumers) {
#pragma unroll 4
  for (int i = threadIdx.x; i < num_codebooks * 256 * 8; i += consumers) {
    const int entry = i / 8, chunk = i % 8;
    const T* source = codebooks + entry * V;
    uint4 value;
    if constexpr (V == 4) {
      const uint2 half = *reinterpret_cast<const uint2*>(source);
      value = make_uint4(half.x, half.y, half.x, half.y);
    } else {
      value = *reinterpret_cast<const uint4*>(source + (V == 16 ? chunk / 4 * 8 : 0));
    }
    *reinterpret_cast<uint4*>(tables + entry * 128 + chunk * 16) = value;
  }
}

// Lays x of steps [first_step, last_step) out as A operands, zero beyond the tokens and words there are: 16 bytes for
// each lane, k16 step (V a step of 16V columns) and tile of 16 tokens. A warp moves the 8 columns of a word that make
// two such operands at a time.
template <typename T, int V, int kTokens>
__device__ __forceinline__ void stage_x(unsigned char* staged, const Product& p, int first_step, int last_step,
                                        int warps, int warp, int lane) {
  constexpr int kChunks = V / 2, kTiles = kTokens / 16;  // 8-column chunks of a word; tiles of tokens
  const T* x = static_cast<const T*>(p.x);
  const int c = lane % 4, swap = V == 16 ? c / 2 : 0;  // lanes c = 2, 3 look up the upper half of an entry first
  const int items = (last_step - first_step) * (kChunks * kTiles);
#pragma unroll 4
  for (int item = warp; item < items; item += warps) {
    const int step = item / (kChunks * kTiles), chunk = item / kTiles % kChunks, tile = item % kTiles;
    const int word = (first_step + step) * 4 + c, token = tile * 16 + lane / 4;
    const T* source = x + token * p.x_row_stride + word * (4 * V) + (chunk ^ swap) * 8;
    uint4 low = make_uint4(0, 0, 0, 0), high = low;
    if (word < p.words && token < p.tokens) low = *reinterpret_cast<const uint4*>(source);
    if (word < p.words && token + 8 < p.tokens) high = *reinterpret_cast<const uint4*>(source + 8 * p.x_row_stride);
    uint4* place = reinterpret_cast<uint4*>(staged + (((step * V + chunk * 2) * kTiles + tile) * 32 + lane) * 16);
    place[0] = make_uint4(low.x, high.x, low.y, high.y);
    place[kTiles * 32] = make_uint4(low.z, high.z, low.w, high.w);
  }
}

__device__ __forceinline__ uint32_t scale_pair(uint32_t pair, __half2 scale) {
  const __half2 product = __hmul2(*reinterpret_cast<const __half2*>(&pair), scale);
  return *reinterpret_cast<const uint32_t*>(&product);
}
__device__ __forceinline__ uint32_t scale_pair(uint32_t pair, __nv_bfloat162 scale) {
  const __nv_bfloat162 product = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&pair), scale);
  return *reinterpret_cast<const uint32_t*>(&product);
}

template <typename T>
struct Pair;
template <>
struct Pair<__half> {
  using type = __half2;
};
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
};

// sum[row][tile] += A operands of k16 step `k` of the four words (0 .. V-1) times the weights [row][pair],
// [row][pair+1].
template <typename T, int kTiles, int kPairs>
__device__ __forceinline__ void multiply_step(float (*sum)[kTiles][4], const uint4 (&operands)[kTiles],
                                              const uint32_t (&weight)[4][kPairs], int pair) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const uint32_t operand[4] = {operands[t].x, operands[t].y, operands[t].z, operands[t].w};
#pragma unroll
    for (int r = 0; r < 4; ++r) mma_k16<T>(sum[r][t], operand, weight[r][pair], weight[r][pair + 1]);
  }
}

// Adds the product of one step and codebook to sum[row of the lane's quads][tile of tokens]. codes: address of the
// first quad's, the others 128 bytes on; scales: of the quads, used if kScaleWeights; table and x: addresses of the
// lane's copy of entry 0 and of its first A operand.
template <typename T, int V, int kTokens, bool kScaleWeights, int kQuads>
__device__ __forceinline__ void multiply_item(float (&sum)[4 * kQuads][kTokens / 16][4], uint32_t codes,
                                              const uint2 (&scales)[kQuads], uint32_t table, uint32_t x) {
  using Pair2 = typename Pair<T>::type;
  constexpr int kTiles = kTokens / 16;
  uint32_t words[kQuads][4];
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad)
    *reinterpret_cast<uint4*>(words[quad]) = load_shared<uint4>(codes + quad * 128);
#pragma unroll
  for (int byte = 0; byte < 4; ++byte) {
    uint4 operands[V / 4][kTiles];
#pragma unroll
    for (int s = 0; s < V / 4; ++s) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
        operands[s][t] = load_shared<uint4>(x + ((byte * (V / 4) + s) * kTiles + t) * 512);
    }
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      uint32_t weight[4][V / 2];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t entry = row_address(words[quad][r], row_selector(byte), table);
        if constexpr (V == 4) {
          *reinterpret_cast<uint2*>(weight[r]) = load_shared<uint2>(entry);
        } else {
          *reinterpret_cast<uint4*>(weight[r]) = load_shared<uint4>(entry);
          if constexpr (V == 16) *reinterpret_cast<uint4*>(weight[r] + 4) = load_shared<uint4>(entry ^ 64);
        }
        if constexpr (kScaleWeights) {
          const uint32_t doubled = permute_bytes(r < 2 ? scales[quad].x : scales[quad].y, 0, r % 2 ? 0x3232 : 0x1010);
#pragma unroll
          for (int e = 0; e < V / 2; ++e)
            weight[r][e] = scale_pair(weight[r][e], *reinterpret_cast<const Pair2*>(&doubled));
        }
      }
#pragma unroll
      for (int s = 0; s < V / 4; ++s) multiply_step<T>(sum + 4 * quad, operands[s], weight, 2 * s);
    }
  }
}

// total += scale * step, and step = 0, for the sums of one quad. scales: of rows 8c .. 8c+7 of the tile, those of the
// lane's sums.
template <typename T, int kTiles>
__device__ __forceinline__ void scale_sums(float (*total)[kTiles][4], float (*step)[kTiles][4], uint4 scales) {
  const float2 pair[4] = {unpack_pair<T>(scales.x), unpack_pair<T>(scales.y), unpack_pair<T>(scales.z),
                          unpack_pair<T>(scales.w)};
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const float low = r % 2 ? pair[r / 2].y : pair[r / 2].x, high = r % 2 ? pair[2 + r / 2].y : pair[2 + r / 2].x;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        total[r][t][i] = fmaf(i % 2 ? high : low, step[r][t][i], total[r][t][i]);
        step[r][t][i] = 0;
      }
    }
  }
}

// Stores the sums of a tile of 32 rows, or adds them, at sums[token][row], and clears them. `rows`: how many exist.
template <int kTiles>
__device__ __forceinline__ void put_sums(float* sums, int pitch, float (*total)[kTiles][4], bool add, int rows,
                                         int lane) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane % 4 * 8 + i % 2 * 4;
      float4* place = reinterpret_cast<float4*>(sums + (t * 16 + i / 2 * 8 + lane / 4) * pitch + row);
      float4 value = make_float4(total[0][t][i], total[1][t][i], total[2][t][i], total[3][t][i]);
      total[0][t][i] = total[1][t][i] = total[2][t][i] = total[3][t][i] = 0;
      if (row >= rows) continue;
      if (add) {
        const float4 old = *place;
        value = make_float4(value.x + old.x, value.y + old.y, value.z + old.z, value.w + old.w);
      }
      *place = value;
    }
  }
}

// A part of a launch that one block computes: rows [row, row + rows) of a segment times steps [first_step, last_step).
struct MmaPart {
  int64_t row;
  int rows, first_step, last_step;
};

// The producer warps: fill the ring with a part, row blocks outside, steps inside.
template <typename T>
__device__ __forceinline__ void fill_part(const Ring& ring, RingPlace& at, unsigned char* stages, const Product& p,
                                          const MmaShape& shape, const Segment& segment, const MmaPart& part,
                                          int producer, int lane) {
  const int64_t n = segment.out_features;
  const int pitch = (shape.stage_rows + 8) * 4, book_bytes = shape.stage_steps * 4 * pitch;
  for (int row = 0; row < part.rows; row += shape.stage_rows) {
    const int rows = min(shape.stage_rows, part.rows - row);
    for (int step = part.first_step; step < part.last_step; step += shape.stage_steps) {
      unsigned char* stage = stages + at.stage * shape.stage_bytes;
      const int word = step * 4, words = min(min(shape.stage_steps, part.last_step - step) * 4, p.words - word);
      const int group = word / p.words_per_group, groups = (word + words - 1) / p.words_per_group - group + 1;
      begin_fill(ring, at, rows * (4 * words * p.num_codebooks + 2 * groups), producer, lane);
      for (int i = 0; i < p.num_codebooks; ++i)
        copy_runs(
            ring, at, stage + i * book_bytes, pitch,
            reinterpret_cast<const unsigned char*>(segment.codes + (int64_t(i) * p.words + word) * n + part.row + row),
            n * 4, words, rows * 4, producer, lane);
      copy_runs(
          ring, at, stage + p.num_codebooks * book_bytes, shape.stage_rows * 2,
          reinterpret_cast<const unsigned char*>(static_cast<const T*>(segment.scales) + group * n + part.row + row),
          n * 2, groups, rows * 2, producer, lane);
      end_fill(ring, at);
      at.advance(shape.stages);
    }
  }
}

// A consumer warp: its tiles of a part, added to sums[token][row of the part], or stored if `add` is false.
template <typename T, int V, int kTokens, bool kScaleSums>
__device__ __forceinline__ void multiply_part(const Ring& ring, RingPlace& at, const unsigned char* shared,
                                              const Product& p, const MmaShape& shape, const MmaPart& part,
                                              int chunk_first, float* sums, bool add, int consumers) {
  constexpr int kQuads = mma_quads(V, kTokens), kTiles = kTokens / 16;
  const int lane = threadIdx.x % 32, warp = warp_index(), k_warp = warp % shape.k_warps;
  const int tile = warp / shape.k_warps * (32 * kQuads), pitch = shape.stage_rows + 8;
  const int step_bytes = 16 * pitch, book_bytes = shape.stage_steps * step_bytes, sums_pitch = p.rows_per_range + 4;
  const uint32_t copy = V == 4   ? lane % 16 * 8
                        : V == 8 ? lane % 8 * 16
                                 : lane / 2 % 2 * 64 + (lane / 4 % 2 * 2 + lane % 2) * 16;
  uint32_t x = shared_address(shared + shape.x) + lane * 16, tables = shared_address(shared) + copy;
  uint32_t lane_codes = shared_address(shared + shape.ring) + (lane % 4 * pitch + tile + lane / 4 * 4) * 4;
  uint32_t lane_scales = shared_address(shared + shape.ring) + p.num_codebooks * book_bytes +
                         (tile + (kScaleSums ? lane % 4 * 8 : lane / 4 * 4)) * 2;
  keep(x);
  keep(tables);
  keep(lane_codes);
  keep(lane_scales);
  float total[4 * kQuads][kTiles][4] = {}, step_sum[4 * kQuads][kTiles][4] = {};
  for (int row = 0; row < part.rows; row += shape.stage_rows) {
    const int rows = part.rows - row - tile;  // from the warp's first
    for (int step = part.first_step; step < part.last_step; step += shape.stage_steps) {
      const uint32_t stage = at.stage * shape.stage_bytes;
      const int first_group = step * 4 / p.words_per_group;
      const int last = rows > 0 ? min(shape.stage_steps, part.last_step - step) : 0;
      wait(ring.full(at.stage), at.phase);
      for (int s = k_warp; s < last; s += shape.k_warps) {
        const int word = (step + s) * 4;  // with kScaleSums the four words of a step share a group
        const int group = (kScaleSums ? word : min(word + lane % 4, p.words - 1)) / p.words_per_group - first_group;
        const uint32_t scales = lane_scales + stage + group * (shape.stage_rows * 2);
        uint2 quad_scales[kQuads] = {};
        if constexpr (!kScaleSums) {
#pragma unroll
          for (int quad = 0; quad < kQuads; ++quad) quad_scales[quad] = load_shared<uint2>(scales + quad * 64);
        }
        uint32_t codes = lane_codes + stage + s * step_bytes, table = tables;
        const uint32_t step_x = x + (step + s - chunk_first) * (32 * V * kTokens);
#pragma unroll 1
        for (int i = 0; i < p.num_codebooks; ++i) {
          multiply_item<T, V, kTokens, !kScaleSums, kQuads>(kScaleSums ? step_sum : total, codes, quad_scales, table,
                                                            step_x);
          codes += book_bytes;
          table += kMmaTableBytes;
        }
        if constexpr (kScaleSums) {
#pragma unroll
          for (int quad = 0; quad < kQuads; ++quad)
            scale_sums<T>(total + 4 * quad, step_sum + 4 * quad, load_shared<uint4>(scales + quad * 64));
        }
      }
      __syncwarp();
      if (lane == 0) arrive(ring.empty(at.stage));
      at.advance(shape.stages);
    }
    for (int k = 0; k < shape.k_warps; ++k) {  // in this order: the sums do not depend on which warp is faster
      if (k == k_warp) {
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad)
          put_sums(sums + row + tile + 32 * quad, sums_pitch, total + 4 * quad, add || k > 0, rows - 32 * quad, lane);
      }
      if (shape.k_warps > 1) consumer_sync(consumers);
    }
  }
}

// Adds the sums of all blocks of the cluster, in rank order, and stores this block's share of the rows: a warp a token.
template <typename T>
__device__ __forceinline__ void reduce_tokens(const Product& p, const float* sums, int share, int64_t first,
                                              int64_t last) {
  const int rank = cluster_rank(), size = cluster_size(), pitch = p.rows_per_range + 4;
  const int lane = threadIdx.x % 32, begin = rank * share;
  const int end = int(min(int64_t(min(begin + share, p.rows_per_range)), last - first));
  for (int token = threadIdx.x / 32; token < p.tokens; token += blockDim.x / 32) {
    for (int i = begin + lane; i < end; i += 32) {
      const float sum = sum_over_cluster(shared_address(sums + token * pitch + i), size);
      const Segment& segment = segment_of(p, first + i);
      const int64_t n = first + i - segment.first_row;
      const float bias = segment.bias ? to_float(static_cast<const T*>(segment.bias)[n]) : 0.0f;
      static_cast<T*>(segment.y)[token * segment.out_features + n] = from_float<T>(sum + bias);
    }
  }
}

// kWarps consumer warps and the producers.
template <typename T, int V, int kTokens, bool kScaleSums, int kWarps>
__global__ void __launch_bounds__((kWarps + kProducerWarps) * 32, 1)
    codebook_mma_kernel(const __grid_constant__ Product p, const __grid_constant__ MmaShape shape) {
  constexpr int kConsumers = kWarps * 32;
  CODEGEMM_DYNAMIC_SHARED(mma_shared);
  CODEGEMM_SHARED(RingBarriers, barriers);
  const Ring ring(barriers);
  float* sums = reinterpret_cast<float*>(mma_shared + shape.sums);
  const int lane = threadIdx.x % 32;
  const int warp = warp_index();
  const bool producer = warp >= kWarps;
  const int slice_first = shape.steps.first(cluster_rank()), slice_last = shape.steps.first(cluster_rank() + 1);
  if (threadIdx.x == kConsumers) init_ring(ring, shape.stages, kWarps);
  __syncthreads();
  allow_next_kernel();

  RingPlace at;
  int copied_segment = -1, staged_step = -1;
  for (int range = cluster_index(); range < shape.num_ranges; range += shape.clusters) {
    const int64_t first = int64_t(range) * p.rows_per_range, last = min(first + p.rows_per_range, p.total_rows);
    for (int s = 0; s < p.segments; ++s) {
      const Segment& segment = p.segment[s];
      const int64_t from = max(first, segment.first_row), to = min(last, segment.first_row + segment.out_features);
      if (from >= to) continue;
      if (!producer && s != copied_segment) {
        if (copied_segment >= 0) consumer_sync(kConsumers);  // the warps have finished with the previous codebooks
        copy_codebooks<T, V>(mma_shared, static_cast<const T*>(segment.codebooks), p.num_codebooks, kConsumers);
        if (copied_segment < 0) wait_for_previous_kernel();  // codes and codebooks are weights: only x needs the wait
        copied_segment = s;
      }
      for (int chunk = slice_first; chunk == slice_first || chunk < slice_last; chunk += shape.chunk_steps) {
        const MmaPart part = {from - segment.first_row, int(to - from), chunk,
                              min(chunk + shape.chunk_steps, slice_last)};
        if (producer) {
          fill_part<T>(ring, at, mma_shared + shape.ring, p, shape, segment, part, warp - kWarps, lane);
          continue;
        }
        if (chunk != staged_step) {
          if (staged_step >= 0) consumer_sync(kConsumers);  // the warps have finished with the previous x
          stage_x<T, V, kTokens>(mma_shared + shape.x, p, chunk, part.last_step, kWarps, warp, lane);
          staged_step = chunk;
        }
        consumer_sync(kConsumers);
        multiply_part<T, V, kTokens, kScaleSums>(ring, at, mma_shared, p, shape, part, chunk, sums + (from - first),
                                                 chunk != slice_first, kConsumers);
      }
    }
    cluster_sync();
    reduce_tokens<T>(p, sums, shape.share_rows, first, last);
    cluster_sync_relaxed();  // no block overwrites its sums, or leaves, while another reads them
  }
}

}  // namespace codegemm::cuda
