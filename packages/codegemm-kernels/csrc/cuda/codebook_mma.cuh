// 1 to 64 tokens: y = x Wᵀ with weights that go from a shared-memory codebook straight into tensor-core operands.
//
// Every lane looks codes up in a copy of the codebook that lies in its own banks, so lookups have no bank conflicts
// whatever the codes are. A copy of entry e of codebook i is in the 128 bytes at e*256 + (i%2)*128, of table i/2:
//
//     v =  4   16 copies of  8 bytes                                  one lookup = 2 registers of an A operand
//     v =  8    8 copies of 16 bytes                                  one lookup = 4 registers, 2 steps of k16
//     v = 16    4 copies of elements 0..7, 4 copies of elements 8..15 one lookup = 2 loads, 4 steps of k16
//
// The address of a lookup is one byte permutation: code in byte 1, the lane's copy in byte 0.
//
// Codes and scales arrive through a ring of stages (ring.cuh): a stage has rows of row_warps tiles, stage_steps steps
// and all codebooks. A row of the box is 8 words longer than its rows, which makes the 16-byte reads conflict-free.
//
// A warp multiplies tiles of 32 rows. Lane l = 4g + c reads word 4s + c of rows 4g .. 4g+3 in step s (16 bytes), and
// byte b of the words is one (v = 4), two or four k16 steps of two m16n8k16 tiles: rows 4g, 4g+1 are the rows g, g+8
// of the first tile, rows 4g+2, 4g+3 of the second. That permutes K and the rows. The k order costs nothing, since x
// is laid out in shared memory as the B operands are read, once a block; the row order is undone when sums are stored.
//
// Scales multiply the fp32 sums of a step when the four words share a group (kScaleSums), and the weights before the
// product otherwise, which rounds scale*weight to 16 bits as a dense fp16 weight would be.
//
// The blocks of a cluster divide K, and so do k_warps warps of a block; sums are added through distributed shared
// memory in the order of ranks and warps: bit-equal between runs. Without clusters (before sm_90) a block has all K.
#pragma once
#include "cluster.cuh"
#include "element.cuh"
#include "product.h"
#include "ring.cuh"

namespace codegemm::cuda {

constexpr int kMmaTileRows = 32;
constexpr int kMmaTableBytes = 64 * 1024;

// How a launch divides K, rows and shared memory; chosen by the launcher. A block has the codebook tables at the start
// of its dynamic shared memory, then the ring, x of chunk_steps steps, and 8*kTokenTiles x (rows_per_range + 4) sums.
struct MmaShape {
  int k_warps;      // warps that divide the steps of a stage; the others divide its rows
  int stage_rows;   // 32 a warp in the direction of rows
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
inline bool make_mma_shape(MmaShape& shape, Product& p, int vector_length, int token_tiles, int warps, int cluster,
                           int clusters, int k_warps, int steps_a_warp, int shared_bytes) {
  const auto round_up = [](int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; };
  const int steps = (p.words + 3) / 4, slice = (steps + cluster - 1) / cluster;
  const int x_bytes = vector_length / 2 * token_tiles * 512, column_bytes = 8 * token_tiles * 4;
  const int tables = (p.num_codebooks + 1) / 2 * kMmaTableBytes;
  shape.k_warps = k_warps;
  shape.stage_rows = kMmaTileRows * (warps / k_warps);
  shape.stage_steps = k_warps * steps_a_warp;
  const int groups = (shape.stage_steps * 4 - 1) / int(p.words_per_group.value) + 2;
  shape.stage_bytes = p.num_codebooks * shape.stage_steps * 16 * (shape.stage_rows + 8) + groups * shape.stage_rows * 2;
  const int room = shared_bytes - tables - 2 * shape.stage_bytes;
  shape.chunk_steps = slice;
  if (slice * x_bytes > room - column_bytes * (kMmaTileRows + 4))
    shape.chunk_steps = room / 2 / x_bytes / shape.stage_steps * shape.stage_steps;
  if (room < 0 || (shape.chunk_steps < 1 && slice > 0)) return false;
  const int64_t even = round_up((p.total_rows + clusters - 1) / clusters, kMmaTileRows);
  const int64_t most = ((room - shape.chunk_steps * x_bytes) / column_bytes - 4) / kMmaTileRows * kMmaTileRows;
  if (most < kMmaTileRows) return false;
  const int64_t passes = (even + most - 1) / most;
  p.rows_per_range = int(round_up((even + passes - 1) / passes, kMmaTileRows));
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
  for (int i = threadIdx.x; i < num_codebooks * 256 * 8; i += consumers) {
    const int codebook = i / 2048, entry = i / 8 % 256, chunk = i % 8;
    const T* source = codebooks + (codebook * 256 + entry) * V;
    uint4 value;
    if constexpr (V == 4) {
      const uint2 half = *reinterpret_cast<const uint2*>(source);
      value = make_uint4(half.x, half.y, half.x, half.y);
    } else {
      value = *reinterpret_cast<const uint4*>(source + (V == 16 ? chunk / 4 * 8 : 0));
    }
    *reinterpret_cast<uint4*>(tables + codebook / 2 * kMmaTableBytes + entry * 256 + codebook % 2 * 128 + chunk * 16) =
        value;
  }
}

// Lays x of steps [first_step, last_step) out as B operands: 16 bytes for lane 4*token + c hold 8 elements of a word.
template <typename T, int V, int kTokenTiles>
__device__ __forceinline__ void stage_x(uint4* staged, const Product& p, int first_step, int last_step, int consumers) {
  constexpr int kChunks = V / 2;  // 8-element chunks of a word
  const int chunks = (last_step - first_step) * 4 * kChunks;
  for (int token = 0; token < 8 * kTokenTiles; ++token) {
    const T* x = static_cast<const T*>(p.x) + token * p.x_row_stride + int64_t(first_step) * 16 * V;
    for (int i = threadIdx.x; i < chunks; i += consumers) {
      const int step = i / (4 * kChunks), c = i / kChunks % 4;
      int chunk = i % kChunks;
      if (V == 16) chunk ^= c / 2;  // lanes c = 2, 3 take the upper half of an entry first
      const bool inside = token < p.tokens && (first_step + step) * 4 + c < p.words;
      staged[((step * kChunks + chunk) * kTokenTiles + token / 8) * 32 + token % 8 * 4 + c] =
          inside ? *reinterpret_cast<const uint4*>(x + i * 8) : make_uint4(0, 0, 0, 0);
    }
  }
}

// The codes of one step and codebook for a lane, and the scales of its four rows.
struct MmaItem {
  uint4 codes;
  uint2 scales;
};

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

// Adds the product of one item to sum[row tile][token tile].
template <typename T, int V, int kTokenTiles, bool kScaleWeights>
__device__ __forceinline__ void multiply_item(float (&sum)[2][kTokenTiles][4], const MmaItem& item,
                                              const unsigned char* table, const uint4* x, uint32_t copy) {
  using Pair2 = typename Pair<T>::type;
  constexpr int kPairs = V / 2;  // registers of a looked-up vector
  const uint32_t words[4] = {item.codes.x, item.codes.y, item.codes.z, item.codes.w};
  Pair2 scale[4];
  if constexpr (kScaleWeights) {
    const uint32_t doubled[4] = {permute_bytes(item.scales.x, 0, 0x1010), permute_bytes(item.scales.x, 0, 0x3232),
                                 permute_bytes(item.scales.y, 0, 0x1010), permute_bytes(item.scales.y, 0, 0x3232)};
#pragma unroll
    for (int r = 0; r < 4; ++r) scale[r] = *reinterpret_cast<const Pair2*>(&doubled[r]);
  }
#pragma unroll
  for (int byte = 0; byte < 4; ++byte) {
    uint32_t weight[4][kPairs];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const unsigned char* entry = table + permute_bytes(words[r], copy, 0x5504 | byte << 4);
      if constexpr (V == 4) {
        *reinterpret_cast<uint2*>(weight[r]) = *reinterpret_cast<const uint2*>(entry);
      } else {
        *reinterpret_cast<uint4*>(weight[r]) = *reinterpret_cast<const uint4*>(entry);
        if constexpr (V == 16)
          *reinterpret_cast<uint4*>(weight[r] + 4) =
              *reinterpret_cast<const uint4*>(table + permute_bytes(words[r], copy ^ 64, 0x5504 | byte << 4));
      }
      if constexpr (kScaleWeights) {
#pragma unroll
        for (int e = 0; e < kPairs; ++e) weight[r][e] = scale_pair(weight[r][e], scale[r]);
      }
    }
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int k = 0; k < kPairs; k += 2) {
        const int pair = byte * kPairs + k;  // of the word's 2V, in B order
        const uint4 operand = x[(pair / 4 * kTokenTiles + t) * 32];
        const uint32_t b0 = pair % 4 ? operand.z : operand.x, b1 = pair % 4 ? operand.w : operand.y;
        mma_k16<T>(sum[0][t], {weight[0][k], weight[1][k], weight[0][k + 1], weight[1][k + 1]}, b0, b1);
        mma_k16<T>(sum[1][t], {weight[2][k], weight[3][k], weight[2][k + 1], weight[3][k + 1]}, b0, b1);
      }
    }
  }
}

// total += scale * step, row by row, and step = 0.
template <typename T, int kTokenTiles>
__device__ __forceinline__ void scale_sums(float (&total)[2][kTokenTiles][4], float (&step)[2][kTokenTiles][4],
                                           uint2 scales) {
  const float2 scale[2] = {unpack_pair<T>(scales.x), unpack_pair<T>(scales.y)};
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        total[tile][t][i] = fmaf(i < 2 ? scale[tile].x : scale[tile].y, step[tile][t][i], total[tile][t][i]);
        step[tile][t][i] = 0;
      }
    }
  }
}

// Stores the sums of a tile, or adds them, at sums[token][row], and clears them.
template <int kTokenTiles>
__device__ __forceinline__ void put_sums(float* sums, int pitch, float (&total)[2][kTokenTiles][4], bool add, int rows,
                                         int lane) {
#pragma unroll
  for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float4* place = reinterpret_cast<float4*>(sums + (t * 8 + lane % 4 * 2 + j) * pitch + lane / 4 * 4);
      float4 value = make_float4(total[0][t][j], total[0][t][2 + j], total[1][t][j], total[1][t][2 + j]);
      if (add && lane / 4 * 4 < rows) {
        const float4 old = *place;
        value = make_float4(value.x + old.x, value.y + old.y, value.z + old.z, value.w + old.w);
      }
      if (lane / 4 * 4 < rows) *place = value;
      total[0][t][j] = total[0][t][2 + j] = total[1][t][j] = total[1][t][2 + j] = 0;
    }
  }
}

// A part of a launch that one block computes: rows [row, row + rows) of a segment times steps [first_step, last_step).
struct MmaPart {
  int64_t row;
  int rows, first_step, last_step;
};

// The producer warp: fills the ring with a part, row blocks outside, steps inside.
template <typename T>
__device__ __forceinline__ void fill_part(RingBarriers& ring, RingPlace& at, unsigned char* stages, const Product& p,
                                          const MmaShape& shape, const Segment& segment, const MmaPart& part,
                                          int lane) {
  const int64_t n = segment.out_features;
  const int pitch = (shape.stage_rows + 8) * 4, book_bytes = shape.stage_steps * 4 * pitch;
  for (int row = 0; row < part.rows; row += shape.stage_rows) {
    const int rows = min(shape.stage_rows, part.rows - row);
    for (int step = part.first_step; step < part.last_step; step += shape.stage_steps) {
      unsigned char* stage = stages + at.stage * shape.stage_bytes;
      const int word = step * 4, words = min(min(shape.stage_steps, part.last_step - step) * 4, p.words - word);
      const int group = word / p.words_per_group, groups = (word + words - 1) / p.words_per_group - group + 1;
      begin_fill(ring, at, rows * (4 * words * p.num_codebooks + 2 * groups), lane);
      for (int i = 0; i < p.num_codebooks; ++i)
        copy_runs(
            ring, at, stage + i * book_bytes, pitch,
            reinterpret_cast<const unsigned char*>(segment.codes + (int64_t(i) * p.words + word) * n + part.row + row),
            n * 4, words, rows * 4, lane);
      copy_runs(
          ring, at, stage + p.num_codebooks * book_bytes, shape.stage_rows * 2,
          reinterpret_cast<const unsigned char*>(static_cast<const T*>(segment.scales) + group * n + part.row + row),
          n * 2, groups, rows * 2, lane);
      end_fill(ring, at);
      at.advance(shape.stages);
    }
  }
}

// A consumer warp: its tiles of a part, added to sums[token][row of the part], or stored if `add` is false.
template <typename T, int V, int kTokenTiles, bool kScaleSums>
__device__ __forceinline__ void multiply_part(RingBarriers& ring, RingPlace& at, const unsigned char* shared,
                                              const Product& p, const MmaShape& shape, const MmaPart& part,
                                              int chunk_first, float* sums, bool add, int consumers) {
  const int lane = threadIdx.x % 32, k_warp = threadIdx.x / 32 % shape.k_warps;
  const int tile = threadIdx.x / 32 / shape.k_warps * kMmaTileRows, pitch = shape.stage_rows + 8;
  const int book_bytes = shape.stage_steps * 16 * pitch, sums_pitch = p.rows_per_range + 4;
  const uint32_t copy = V == 4   ? lane % 16 * 8
                        : V == 8 ? lane % 8 * 16
                                 : lane / 2 % 2 * 64 + (lane / 4 % 2 * 2 + lane % 2) * 16;
  const uint4* x = reinterpret_cast<const uint4*>(shared + shape.x) + lane;
  float total[2][kTokenTiles][4] = {}, step_sum[2][kTokenTiles][4] = {};
  for (int row = 0; row < part.rows; row += shape.stage_rows) {
    for (int step = part.first_step; step < part.last_step; step += shape.stage_steps) {
      const unsigned char* stage = shared + shape.ring + at.stage * shape.stage_bytes;
      const unsigned char* codes = stage + (lane % 4 * pitch + tile + lane / 4 * 4) * 4;
      const unsigned char* scales = stage + p.num_codebooks * book_bytes + (tile + lane / 4 * 4) * 2;
      const int first_group = step * 4 / p.words_per_group;
      wait(&ring.full[at.stage], at.phase);
      for (int s = k_warp; s < shape.stage_steps && row + tile < part.rows; s += shape.k_warps) {
        if (step + s >= part.last_step) break;
        const int group = min((step + s) * 4 + lane % 4, p.words - 1) / p.words_per_group;
        MmaItem item;
        item.scales = *reinterpret_cast<const uint2*>(scales + (group - first_group) * shape.stage_rows * 2);
        for (int i = 0; i < p.num_codebooks; ++i) {
          item.codes = *reinterpret_cast<const uint4*>(codes + i * book_bytes + s * 16 * pitch);
          multiply_item<T, V, kTokenTiles, !kScaleSums>(
              kScaleSums ? step_sum : total, item, shared + i / 2 * kMmaTableBytes + i % 2 * 128,
              x + (step + s - chunk_first) * (V / 2 * kTokenTiles * 32), copy);
        }
        if (kScaleSums) scale_sums<T>(total, step_sum, item.scales);
      }
      __syncwarp();
      if (lane == 0) arrive(&ring.empty[at.stage]);
      at.advance(shape.stages);
    }
    for (int k = 0; k < shape.k_warps; ++k) {  // in this order: the sums do not depend on which warp is faster
      if (k == k_warp)
        put_sums<kTokenTiles>(sums + row + tile, sums_pitch, total, add || k > 0, part.rows - row - tile, lane);
      if (shape.k_warps > 1) consumer_sync(consumers);
    }
  }
}

// Adds the sums of all blocks of the cluster, in rank order, and stores this block's share of the rows.
template <typename T>
__device__ __forceinline__ void reduce_tokens(const Product& p, const float* sums, int share, int64_t first,
                                              int64_t last) {
  const int rank = cluster_rank(), size = cluster_size(), pitch = p.rows_per_range + 4;
  for (int i = threadIdx.x; i < share; i += blockDim.x) {
    const int64_t row = first + rank * share + i;
    if (row >= last) break;
    int s = 0;
    while (s + 1 < p.segments && row >= p.segment[s + 1].first_row) ++s;
    const Segment& segment = p.segment[s];
    const int64_t n = row - segment.first_row;
    const float bias = segment.bias ? to_float(static_cast<const T*>(segment.bias)[n]) : 0.0f;
    for (int token = 0; token < p.tokens; ++token) {
      const uint32_t address = shared_address(sums + token * pitch + rank * share + i);
      float part[kMaxCluster];  // all loads first: their latency is paid once
#pragma unroll
      for (int r = 0; r < kMaxCluster; ++r) part[r] = r < size ? load_from_rank(address, r) : 0.0f;
      float sum = 0;
#pragma unroll
      for (int r = 0; r < kMaxCluster; ++r) sum += part[r];
      static_cast<T*>(segment.y)[token * segment.out_features + n] = from_float<T>(sum + bias);
    }
  }
}

// kWarps consumer warps and a producer.
template <typename T, int V, int kTokenTiles, bool kScaleSums, int kWarps>
__global__ void __launch_bounds__(kWarps * 32 + 32, 1)
    codebook_mma_kernel(const __grid_constant__ Product p, const __grid_constant__ MmaShape shape) {
  constexpr int kConsumers = kWarps * 32;
  extern __shared__ __align__(1024) unsigned char mma_shared[];
  __shared__ RingBarriers ring;
  float* sums = reinterpret_cast<float*>(mma_shared + shape.sums);
  const int lane = threadIdx.x % 32;
  const bool producer = threadIdx.x >= kConsumers;
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
          fill_part<T>(ring, at, mma_shared + shape.ring, p, shape, segment, part, lane);
          continue;
        }
        if (chunk != staged_step) {
          if (staged_step >= 0) consumer_sync(kConsumers);  // the warps have finished with the previous x
          stage_x<T, V, kTokenTiles>(reinterpret_cast<uint4*>(mma_shared + shape.x), p, chunk, part.last_step,
                                     kConsumers);
          staged_step = chunk;
        }
        consumer_sync(kConsumers);
        multiply_part<T, V, kTokenTiles, kScaleSums>(ring, at, mma_shared, p, shape, part, chunk, sums + (from - first),
                                                     chunk != slice_first, kConsumers);
      }
    }
    cluster_sync();
    reduce_tokens<T>(p, sums, shape.share_rows, first, last);
    cluster_sync();  // no block overwrites its sums, or leaves, while another reads them
  }
}

}  // namespace codegemm::cuda
