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
// A warp multiplies tiles of 32 rows. Lane l = 4g + c loads word 4s + c of rows 4g .. 4g+3 in step s (16 bytes), and
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

namespace codegemm::cuda {

constexpr int kMmaTileRows = 32;
constexpr int kMmaPrefetch = 4;  // 16-byte code loads in flight a lane
constexpr int kMmaTableBytes = 64 * 1024;

// How the launch divides shared memory and warps; chosen by the launcher.
struct MmaShape {
  int k_warps;      // warps that divide a chunk of K; the others divide its rows
  int chunk_steps;  // steps (4 words) of K whose x is in shared memory at a time
  int num_ranges;   // ranges of rows_per_range rows; cluster i computes range i, i + clusters, ...
};

// Copies the codebooks of a segment into the layout above.
template <typename T, int V>
__device__ __forceinline__ void copy_codebooks(unsigned char* tables, const T* codebooks, int num_codebooks) {
  for (int i = threadIdx.x; i < num_codebooks * 256 * 8; i += blockDim.x) {
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
__device__ __forceinline__ void stage_x(uint4* staged, const Product& p, int first_step, int last_step) {
  constexpr int kChunks = V / 2;  // 8-element chunks of a word
  const int chunks = (last_step - first_step) * 4 * kChunks;
  for (int token = 0; token < 8 * kTokenTiles; ++token) {
    const T* x = static_cast<const T*>(p.x) + token * p.x_row_stride + int64_t(first_step) * 16 * V;
    for (int i = threadIdx.x; i < chunks; i += blockDim.x) {
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

// Walks over the items of a warp: codebooks fastest, then steps, then row tiles.
struct MmaCursor {
  int row;       // of the segment, the first of the tile
  int step;
  int codebook;

  __device__ __forceinline__ void advance(int num_codebooks, int first_step, int last_step, int row_step) {
    if (++codebook < num_codebooks) return;
    codebook = 0;
    if (++step < last_step) return;
    step = first_step;
    row += row_step;
  }
};

template <typename T>
__device__ __forceinline__ MmaItem load_item(const Product& p, const Segment& segment, const MmaCursor& at,
                                             int last_row, int lane) {
  const int word = at.step * 4 + lane % 4, row = at.row + lane / 4 * 4;
  MmaItem item = {make_uint4(0, 0, 0, 0), make_uint2(0, 0)};
  if (word < p.words && row < last_row) {
    const int64_t rows = segment.out_features;
    item.codes = load_streaming(
        reinterpret_cast<const uint4*>(segment.codes + (int64_t(at.codebook) * p.words + word) * rows + row));
    item.scales = __ldg(
        reinterpret_cast<const uint2*>(static_cast<const T*>(segment.scales) + word / p.words_per_group * rows + row));
  }
  return item;
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
__device__ __forceinline__ void put_sums(float* sums, int pitch, float (&total)[2][kTokenTiles][4], bool add,
                                         int rows, int lane) {
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

// Rows [first, last) of a segment times one chunk of K, by the warps that have `row_warp` of `row_warps`.
template <typename T, int V, int kTokenTiles, bool kScaleSums>
__device__ __forceinline__ void multiply_chunk(const Product& p, const Segment& segment, int first, int last,
                                               int first_step, int last_step, int chunk_first, int row_warp,
                                               int row_warps, const unsigned char* tables, const uint4* staged,
                                               float* sums, int pitch, bool add) {
  const int lane = threadIdx.x % 32;
  const uint32_t copy = V == 4   ? lane % 16 * 8
                        : V == 8 ? lane % 8 * 16
                                 : lane / 2 % 2 * 64 + (lane / 4 % 2 * 2 + lane % 2) * 16;
  const int row_step = row_warps * kMmaTileRows;
  float total[2][kTokenTiles][4] = {}, step[2][kTokenTiles][4] = {};
  if (first_step == last_step) {  // more blocks than steps: this one adds nothing, but its sums are read
    for (int row = first + row_warp * kMmaTileRows; row < last && !add; row += row_step)
      put_sums<kTokenTiles>(sums + (row - first), pitch, total, false, last - row, lane);
    return;
  }
  MmaCursor loading = {first + row_warp * kMmaTileRows, first_step, 0}, at = loading;
  MmaItem items[kMmaPrefetch];
#pragma unroll
  for (int i = 0; i < kMmaPrefetch; ++i) {
    items[i] = load_item<T>(p, segment, loading, last, lane);
    loading.advance(p.num_codebooks, first_step, last_step, row_step);
  }
  while (at.row < last) {
#pragma unroll
    for (int i = 0; i < kMmaPrefetch; ++i) {
      if (at.row >= last) break;
      const unsigned char* table = tables + at.codebook / 2 * kMmaTableBytes + at.codebook % 2 * 128;
      const uint4* x = staged + (at.step - chunk_first) * (V / 2 * kTokenTiles * 32) + lane;
      multiply_item<T, V, kTokenTiles, !kScaleSums>(kScaleSums ? step : total, items[i], table, x, copy);
      const bool tile_ends = at.step + 1 == last_step && at.codebook + 1 == p.num_codebooks;
      if (kScaleSums && at.codebook + 1 == p.num_codebooks) scale_sums<T>(total, step, items[i].scales);
      if (tile_ends) put_sums<kTokenTiles>(sums + (at.row - first), pitch, total, add, last - at.row, lane);
      at.advance(p.num_codebooks, first_step, last_step, row_step);
      items[i] = load_item<T>(p, segment, loading, last, lane);
      loading.advance(p.num_codebooks, first_step, last_step, row_step);
    }
  }
}

// Adds the sums of all ranks and k_warps of the cluster in order, and stores this block's share of the rows.
template <typename T>
__device__ __forceinline__ void reduce_tokens(const Product& p, const float* sums, int pitch, int padded_tokens,
                                              int k_warps, int64_t first, int64_t last) {
  const int rank = cluster_rank(), size = cluster_size();
  const int share = (p.rows_per_range + size - 1) / size;
  for (int i = threadIdx.x; i < share * p.tokens; i += blockDim.x) {
    const int token = i / share, place = rank * share + i % share;
    const int64_t row = first + place;
    if (place >= p.rows_per_range || row >= last) continue;
    float sum = 0;
    for (int k = 0; k < k_warps; ++k) {
      const uint32_t address = shared_address(sums + (k * padded_tokens + token) * pitch + place);
#pragma unroll 4
      for (int r = 0; r < size; ++r) sum += load_from_rank(address, r);
    }
    int s = 0;
    while (s + 1 < p.segments && row >= p.segment[s + 1].first_row) ++s;
    const Segment& segment = p.segment[s];
    const int64_t n = row - segment.first_row;
    if (segment.bias) sum += to_float(static_cast<const T*>(segment.bias)[n]);
    static_cast<T*>(segment.y)[token * segment.out_features + n] = from_float<T>(sum);
  }
}

// Dynamic shared memory: (m+1)/2 tables of 64 KB; x of chunk_steps steps; k_warps x 8*kTokenTiles x pitch sums.
template <typename T, int V, int kTokenTiles, bool kScaleSums, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks) codebook_mma_kernel(const __grid_constant__ Product p,
                                                                const __grid_constant__ MmaShape shape) {
  extern __shared__ __align__(1024) unsigned char mma_shared[];
  uint4* staged = reinterpret_cast<uint4*>(mma_shared + (p.num_codebooks + 1) / 2 * kMmaTableBytes);
  float* sums = reinterpret_cast<float*>(staged + shape.chunk_steps * (V / 2 * kTokenTiles * 32));
  const int pitch = p.rows_per_range + 4;  // 4 more than a multiple of 16 words: float4 stores without conflicts
  const int warp = threadIdx.x / 32, k_warp = warp % shape.k_warps, row_warp = warp / shape.k_warps;
  const int row_warps = blockDim.x / 32 / shape.k_warps;
  const int size = cluster_size(), rank = cluster_rank(), steps = (p.words + 3) / 4;
  const int slice_first = steps * rank / size, slice_last = steps * (rank + 1) / size;
  float* warp_sums = sums + k_warp * (8 * kTokenTiles) * pitch;

  allow_next_kernel();
  int copied_segment = -1, staged_step = -1;
  for (int range = blockIdx.x / size; range < shape.num_ranges; range += gridDim.x / size) {
    const int64_t first = int64_t(range) * p.rows_per_range, last = min(first + p.rows_per_range, p.total_rows);
    for (int s = 0; s < p.segments; ++s) {
      const Segment& segment = p.segment[s];
      const int64_t from = max(first, segment.first_row), to = min(last, segment.first_row + segment.out_features);
      if (from >= to) continue;
      if (s != copied_segment) {
        __syncthreads();  // the warps have finished with the previous codebooks
        copy_codebooks<T, V>(mma_shared, static_cast<const T*>(segment.codebooks), p.num_codebooks);
        if (copied_segment < 0) wait_for_previous_kernel();  // codebooks are weights: only x needs the wait
        copied_segment = s;
      }
      for (int chunk = slice_first; chunk == slice_first || chunk < slice_last; chunk += shape.chunk_steps) {
        const int chunk_last = min(chunk + shape.chunk_steps, slice_last), chunk_steps = chunk_last - chunk;
        if (chunk != staged_step) {
          __syncthreads();  // the warps have finished with the previous x
          stage_x<T, V, kTokenTiles>(staged, p, chunk, chunk_last);
          staged_step = chunk;
        }
        __syncthreads();
        multiply_chunk<T, V, kTokenTiles, kScaleSums>(
            p, segment, int(from - segment.first_row), int(to - segment.first_row),
            chunk + chunk_steps * k_warp / shape.k_warps, chunk + chunk_steps * (k_warp + 1) / shape.k_warps, chunk,
            row_warp, row_warps, mma_shared, staged, warp_sums + (from - first), pitch, chunk != slice_first);
      }
    }
    cluster_sync();
    reduce_tokens<T>(p, sums, pitch, 8 * kTokenTiles, shape.k_warps, first, last);
    cluster_sync();  // no block overwrites its sums, or leaves, while another reads them
  }
}

}  // namespace codegemm::cuda
