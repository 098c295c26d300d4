// 17 to 64 tokens: y = x Wᵀ as a matrix product on the tensor cores whose B operands are looked up
// (codebook_table.cuh).
//
// A warp has kStrips strips of 32 rows of W and all tokens, and its sums stay in registers for as long as its block
// works; x and codes stream. A block is 8 warps side by side; x goes through two buffers of shared memory, a stage of K
// in one while the next is read from the cache into registers. The first barrier of a stage is its last.
//
// The looked-up vectors of two codebooks, if their number is even, are added and multiplied by the row's scale before
// the product, which rounds as a dense fp16 weight would be rounded: with sums scaled instead, a second set of sums
// would not fit in registers.
//
// The blocks of a cluster divide K and add their sums through distributed shared memory in the order of their ranks.
#pragma once
#include "codebook_table.cuh"
#include "cuda/ptx.cuh"
#include "element.cuh"
#include "product.h"

namespace codegemm::cuda {

constexpr int kGemmWarps = 8;

__host__ __device__ constexpr int stage_steps(int v) { return v == 4 ? 2 : 1; }  // steps of four words

// Blocks of a multiprocessor: registers for two only with few sums and short vectors.
__host__ __device__ constexpr int gemm_blocks(int v, int tiles) { return v == 4 && tiles == 2 ? 2 : 1; }

// How a launch divides K and shared memory. Row blocks do not cross segments. Tables are at the start of shared memory.
struct GemmShape {
  int first_block[kMaxSegments + 1];  // row blocks before each segment
  Shares stages;                      // of K, for the blocks of a cluster
  int share_rows;                     // rows that each block of a cluster stores
  int x, bytes;                       // offset of the two buffers, later of sums[token][row]; the whole
};

inline GemmShape make_gemm_shape(Product& p, int vector_length, int tokens, int strips, int cluster) {
  const auto ceil = [](int64_t n, int64_t unit) { return (n + unit - 1) / unit; };
  GemmShape shape = {};
  p.rows_per_range = 32 * strips * kGemmWarps;
  for (int i = 0; i < kMaxSegments; ++i)
    shape.first_block[i + 1] =
        shape.first_block[i] + (i < p.segments ? int(ceil(p.segment[i].out_features, p.rows_per_range)) : 0);
  const int steps = stage_steps(vector_length), stages = int(ceil(p.words, 4 * steps));
  shape.stages = {stages / cluster, stages % cluster};
  shape.share_rows = int(ceil(p.rows_per_range, 4 * cluster)) * 4;
  shape.x = p.num_codebooks * kTableBytes;
  const int buffers = 2 * steps * 32 * vector_length * tokens, sums = tokens * (p.rows_per_range + 4) * 4;
  shape.bytes = shape.x + (buffers > sums ? buffers : sums);
  return shape;
}

// A thread's part of x of a stage, on its way to a buffer: one piece of 16 bytes (8 columns) of kItems pairs of tokens.
template <typename T, int V, int kTiles>
struct StagedX {
  static constexpr int kPieces = stage_steps(V) * 4 * (V / 2), kPairs = kGemmWarps * 32 / kPieces;  // pairs an item
  static constexpr int kItems = kTiles * 8 / kPairs;
  static_assert(kPairs % 8 == 0);
  const T* source;
  int64_t stride;
  int tokens, words;  // that are left from the thread's first token and word
  uint4 low[kItems], high[kItems];

  __device__ __forceinline__ StagedX(const Product& p, int stage) : stride(p.x_row_stride) {
    const int piece = threadIdx.x % kPieces, pair = threadIdx.x / kPieces, token = pair / 8 * 16 + pair % 8;
    const int word = stage * (4 * stage_steps(V)) + piece / (V / 2);
    source = static_cast<const T*>(p.x) + token * stride + word * (4 * V) + piece % (V / 2) * 8;
    tokens = p.tokens - token;
    words = p.words - word;
  }
  // The next stage's.
  __device__ __forceinline__ void load() {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      low[i] = high[i] = make_uint4(0, 0, 0, 0);
      const int token = i * (kPairs * 2);
      if (words > 0 && token < tokens) low[i] = load_fresh_16(source + token * stride);
      if (words > 0 && token + 8 < tokens) high[i] = load_fresh_16(source + (token + 8) * stride);
    }
    source += 16 * V * stage_steps(V);
    words -= 4 * stage_steps(V);
  }
  __device__ __forceinline__ void store(unsigned char* buffer) const {
    const int piece = threadIdx.x % kPieces, pair = threadIdx.x / kPieces, word = piece / (V / 2), c = word % 4;
    const int place = piece % (V / 2) ^ (V == 16 ? c / 2 : 0), operand = (word / 4 * V + place * 2) * kTiles + pair / 8;
    unsigned char* target = buffer + operand * 512 + ((pair % 8 * 4 + c) * 16 ^ swizzle(place));
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      unsigned char* tile = target + i * (kPairs / 8) * 512;
      *reinterpret_cast<uint4*>(tile) = make_uint4(low[i].x, high[i].x, low[i].y, high[i].y);
      *reinterpret_cast<uint4*>(tile + kTiles * 512) = make_uint4(low[i].z, high[i].z, low[i].w, high[i].w);
    }
  }
};

// The codes of a strip of 32 rows and a stage on their way, of one codebook, and the rows' scales there. Lane l has
// word l/8 of each step and rows 4(l%8) .. +3: neighbouring bytes for each quarter of a warp (codebook_mma.cuh).
template <typename T, int V>
struct StageCodes {
  uint4 words[stage_steps(V)];
  uint2 scales[stage_steps(V)];

  __device__ __forceinline__ void load(const Product& p, const Segment& segment, int row, int stage, int codebook,
                                       int lane) {
    const uint32_t n = uint32_t(segment.out_features);
#pragma unroll
    for (int s = 0; s < stage_steps(V); ++s) {
      const int word = min((stage * stage_steps(V) + s) * 4 + lane / 8, p.words - 1);  // beyond K x is zero
      const uint32_t group = word / p.words_per_group;
      words[s] = load_weight<uint4>(segment.codes + uint64_t(uint32_t(codebook * p.words + word)) * n + row);
      scales[s] = load_weight<uint2>(static_cast<const T*>(segment.scales) + uint64_t(group) * n + row);
    }
  }
  // Those of word c and rows 4g .. 4g+3.
  __device__ __forceinline__ StageCodes taken(int lane) const {
    const int from = lane % 4 * 8 + lane / 4;
    StageCodes result;
#pragma unroll
    for (int s = 0; s < stage_steps(V); ++s) {
      result.words[s] = make_uint4(from_lane(words[s].x, from), from_lane(words[s].y, from),
                                   from_lane(words[s].z, from), from_lane(words[s].w, from));
      result.scales[s] = make_uint2(from_lane(scales[s].x, from), from_lane(scales[s].y, from));
    }
    return result;
  }
};

// The weights that byte `byte` of a stage's codes stand for: sum over codebooks times scale, for each of four rows.
template <typename T, int V, int kBooks>
__device__ __forceinline__ void look_up_sums(uint32_t (&weight)[4][V / 2], const StageCodes<T, V> (&codes)[kBooks],
                                             int byte, uint32_t table) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < kBooks; ++i) {
      const uint4 word = codes[i].words[byte / 4];
      uint32_t entry[V / 2];
      look_up<V>(entry,
                 j == 0   ? word.x
                 : j == 1 ? word.y
                 : j == 2 ? word.z
                          : word.w,
                 byte % 4, table + i * kTableBytes);
#pragma unroll
      for (int e = 0; e < V / 2; ++e) weight[j][e] = i == 0 ? entry[e] : add_pairs<T>(weight[j][e], entry[e]);
    }
    const uint32_t scale = doubled_scale(codes[0].scales[byte / 4], j);
#pragma unroll
    for (int e = 0; e < V / 2; ++e) weight[j][e] = multiply_pairs<T>(weight[j][e], scale);
  }
}

// The codes of all strips of a warp in one turn: kBooks codebooks from `codebook` on, in one stage.
template <typename T, int V, int kStrips, int kBooks>
struct TurnCodes {
  StageCodes<T, V> strip[kStrips][kBooks];

  __device__ __forceinline__ void load(const Product& p, const Segment& segment, const int (&row)[kStrips], int stage,
                                       int codebook, int lane) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
#pragma unroll
      for (int i = 0; i < kBooks; ++i) strip[s][i].load(p, segment, row[s], stage, codebook + i, lane);
    }
  }
  __device__ __forceinline__ TurnCodes taken(int lane) const {
    TurnCodes result;
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
#pragma unroll
      for (int i = 0; i < kBooks; ++i) result.strip[s][i] = strip[s][i].taken(lane);
    }
    return result;
  }
};

// A warp's sums: of product j of a strip and tile of 16 tokens, as mma.m16n8k16 leaves them.
template <typename T, int V, int kTiles, int kStrips>
struct GemmSums {
  float value[kStrips][4][kTiles][4];

  // += x times the weights of a turn. buffer: address of the lane's first A operand of the stage.
  template <int kBooks>
  __device__ __forceinline__ void multiply(const TurnCodes<T, V, kStrips, kBooks>& codes, uint32_t buffer,
                                           uint32_t table) {
#pragma unroll
    for (int byte = 0; byte < 4 * stage_steps(V); ++byte) {
      uint32_t weight[kStrips][4][V / 2];
#pragma unroll
      for (int s = 0; s < kStrips; ++s) look_up_sums<T, V, kBooks>(weight[s], codes.strip[s], byte, table);
#pragma unroll
      for (int k = 0; k < V / 4; ++k) {
        const int step = byte * (V / 4) + k;  // of 16 columns
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const uint4 operand = load_shared<uint4>((buffer ^ swizzle(step % V / 2)) + (step * kTiles + t) * 512);
#pragma unroll
          for (int s = 0; s < kStrips; ++s) {
#pragma unroll
            for (int j = 0; j < 4; ++j)
              mma_k16<T>(value[s][j][t], operand, weight[s][j][2 * k], weight[s][j][2 * k + 1]);
          }
        }
      }
    }
  }

  // Stores them at place[token][row].
  __device__ __forceinline__ void put(float* place, int pitch, int lane) const {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          *reinterpret_cast<float4*>(place + (t * 16 + i / 2 * 8 + lane / 4) * pitch + s * 32 + lane % 4 * 8 +
                                     i % 2 * 4) =
              make_float4(value[s][0][t][i], value[s][1][t][i], value[s][2][t][i], value[s][3][t][i]);
      }
    }
  }
};

template <typename T, int V, int kTiles, int kStrips, int kBooks>
__global__ void __launch_bounds__(kGemmWarps * 32, gemm_blocks(V, kTiles))
    codebook_gemm_kernel(const __grid_constant__ Product p, const __grid_constant__ GemmShape shape) {
  CODEGEMM_DYNAMIC_SHARED(gemm_shared);
  constexpr int kBuffer = stage_steps(V) * V * kTiles * 512;
  const int lane = threadIdx.x % 32, warp = warp_index(), rank = cluster_rank();
  int segment_index = 0;
  while (cluster_index() >= shape.first_block[segment_index + 1]) ++segment_index;
  const Segment& segment = p.segment[segment_index];
  const int64_t first = int64_t(cluster_index() - shape.first_block[segment_index]) * p.rows_per_range;
  const int first_stage = shape.stages.first(rank), last_stage = shape.stages.first(rank + 1);
  int row[kStrips];
#pragma unroll
  for (int s = 0; s < kStrips; ++s)  // beyond N nothing is stored
    row[s] = int(min(first + (warp * kStrips + s) * 32 + lane % 8 * 4, segment.out_features - 4));
  uint32_t x = shared_address(gemm_shared + shape.x) + lane * 16;
  uint32_t table = shared_address(gemm_shared) + copy_of_lane<V>(lane);
  keep(x);
  keep(table);
  allow_next_kernel();

  GemmSums<T, V, kTiles, kStrips> total = {};
  TurnCodes<T, V, kStrips, kBooks> next;
  next.load(p, segment, row, first_stage, 0, lane);
  copy_codebooks<T, V>(gemm_shared, static_cast<const T*>(segment.codebooks), p.num_codebooks);
  wait_for_previous_kernel();  // codes and codebooks are weights: only x needs the wait
  StagedX<T, V, kTiles> staged(p, first_stage);
  staged.load();
  staged.store(gemm_shared + shape.x);
  __syncthreads();
  for (int stage = first_stage; stage < last_stage; ++stage) {
    const int filled = (stage - first_stage) % 2 * kBuffer;
    if (stage + 1 < last_stage) staged.load();
    for (int codebook = 0; codebook < p.num_codebooks; codebook += kBooks) {
      const TurnCodes<T, V, kStrips, kBooks> codes = next.taken(lane);
      const bool last = codebook + kBooks == p.num_codebooks;
      if (!last || stage + 1 < last_stage) next.load(p, segment, row, stage + last, last ? 0 : codebook + kBooks, lane);
      total.multiply(codes, x + filled, table + codebook * kTableBytes);
    }
    if (stage + 1 < last_stage) staged.store(gemm_shared + shape.x + (kBuffer - filled));
    __syncthreads();
  }
  float* sums = reinterpret_cast<float*>(gemm_shared + shape.x);
  total.put(sums + warp * (32 * kStrips), p.rows_per_range + 4, lane);
  cluster_sync();
  reduce_tokens<T>(p, segment, sums, shape.share_rows, first, 0, p.tokens, blockDim.x);
  cluster_sync_relaxed();  // no block leaves while another reads its sums
}

}  // namespace codegemm::cuda
