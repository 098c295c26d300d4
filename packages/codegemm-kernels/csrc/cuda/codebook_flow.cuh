// 2 to 8 tokens, on GPUs with clusters: y = x Wᵀ with weights that go from a shared-memory codebook straight into
// tensor-core operands, while x stays in registers and the rows of W flow past.
//
// The 16 warps of a block divide its K: each keeps x of up to 512 columns as B operands of mma.m16n8k16, 64 registers,
// loaded once, and multiplies it by tile after tile of 32 rows, whose codes its own ring brings (flow_feed.cuh). So the
// loop reads codes, looks up and multiplies, and nothing else; no warp waits for another. What is looked up is an A
// operand, 16 rows x 16 columns, as it comes out of shared memory, and all of the product is of use:
//
//     v = 4      lane 4g + c: rows 4g .. 4g+3 of words c and c+4. Byte b of them is columns 4c .. 4c+3 of a step of K.
//                A table has one word of each entry, 32 copies of it: a lookup is two loads, in 32 banks each
//     v = 8, 16  lane 16h + r: rows 2r, 2r+1 of words h and h+2. A table has 8 elements of each entry, 8 copies of
//                them, and ldmatrix passes the 8 rows of a quarter warp on to the lanes that multiply them
//
// Either way 2 bytes a weight and codebook come out of shared memory, without a bank conflict whatever the codes are.
// 32 rows x 128 columns of v = 4 take 64 wavefronts for that, 16 for codes (written and read) and 4 to 16 for sums; 32
// dp4a, 64 loads and 16 products.
//
// Sums of a unit of K are multiplied by the rows' scales in fp32. After a section of tiles the warps' sums are added,
// in the order of warps, and where the blocks of a cluster divide K too, theirs then, through distributed shared memory
// in the order of ranks: bit-equal between runs.
#pragma once
#include <type_traits>

#include "element.cuh"
#include "flow_feed.cuh"

namespace codegemm::cuda {

// A thread's pieces of 16 bytes of a codebook's tables, 512 apart. All are loaded before the first is stored: one by
// one, each store would wait for the cache.
template <typename T, int V>
struct TablePieces {
  static constexpr int kPlanes = table_planes(V), kEach = kTableBytes / 16 / (kFlowWarps * 32);
  using Piece = std::conditional_t<V == 4, uint32_t, uint4>;  // v = 4: a word, to be stored four times
  Piece value[kPlanes][kEach];

  __device__ __forceinline__ void load(const T* codebook) {
    const T* source = codebook + threadIdx.x / 8 * V;
#pragma unroll
    for (int i = 0; i < kPlanes; ++i)
#pragma unroll
      for (int k = 0; k < kEach; ++k)
        value[i][k] = *reinterpret_cast<const Piece*>(source + k * (kFlowWarps * 4 * V) + i * (V / kPlanes));
  }
  __device__ __forceinline__ void store(unsigned char* tables) const {
#pragma unroll
    for (int i = 0; i < kPlanes; ++i)
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        uint4 piece;
        if constexpr (V == 4)
          piece = make_uint4(value[i][k], value[i][k], value[i][k], value[i][k]);
        else
          piece = value[i][k];
        *reinterpret_cast<uint4*>(tables + i * kTableBytes + (k * (kFlowWarps * 32) + threadIdx.x) * 16) = piece;
      }
  }
};

// x of a warp's units as B operands, in the order of lookups. Lane 4g + c has columns of token g.
template <typename T, int V>
struct KeptX {
  static constexpr int kUnits = kept_units(V), kOperands = unit_words(V) * V / 4;  // operands of a unit
  uint32_t word[kUnits * kOperands][2];

  // Two operands at a time, which are 8 columns a lane; for v > 4, whose lanes need two columns of each of four
  // vectors, after a transposition by the four lanes of the token.
  __device__ __forceinline__ void load(const Product& p, const WarpShare& share, int lane) {
    const int c = lane % 4;
    const T* x = static_cast<const T*>(p.x) + lane / 4 * p.x_row_stride;
#pragma unroll
    for (int i = 0; i < kUnits * kOperands; i += 2) {
      const int unit = i / kOperands, half = i % kOperands / (kOperands / 2), pair = i % (kOperands / 2);
      const int place = V == 4 ? 4 * half + c : 2 * half + c % 2, piece = V == 4 ? pair / 2 : pair + c / 2;
      const int index = (share.first + unit) * unit_words(V) + place;
      uint4 value = make_uint4(0, 0, 0, 0);
      if (lane / 4 < p.tokens && unit < share.units && index < p.words)
        value = load_fresh_16(x + index * (4 * V) + piece * 8);
      word[i][0] = value.x;
      word[i][1] = value.y;
      word[i + 1][0] = value.z;
      word[i + 1][1] = value.w;
    }
    if constexpr (V > 4) {
#pragma unroll
      for (int i = 0; i < kUnits * kOperands; i += 2) {
        exchange(word[i][0], word[i][1], lane, 1);
        exchange(word[i + 1][0], word[i + 1][1], lane, 1);
        exchange(word[i][0], word[i + 1][0], lane, 2);
        exchange(word[i][1], word[i + 1][1], lane, 2);
      }
    }
  }

 private:
  // Swaps `high` of a lane without the bit and `low` of the lane with it.
  __device__ __forceinline__ static void exchange(uint32_t& low, uint32_t& high, int lane, int bit) {
    const bool upper = lane & bit;
    const uint32_t other = from_lane(upper ? low : high, lane ^ bit);
    (upper ? low : high) = other;
  }
};

// Sums of 32 rows as two products of 16 leave them: rows g and g + 8 of tokens 2c, 2c + 1, which are rows 4g + 2 tile
// and the next (v = 4), or 2g + tile and 16 further on.
template <typename T, int V>
struct RowSums {
  float value[2][4] = {};

  // Adds the products of one unit and codebook; `place` and `table` are the lane's first codes and copy of entry 0.
  __device__ __forceinline__ void add_turn(const KeptX<T, V>& x, int unit, uint32_t place, uint32_t table) {
    constexpr int kOperands = KeptX<T, V>::kOperands;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t codes[4];
      if constexpr (V == 4)
        *reinterpret_cast<uint4*>(codes) = load_shared<uint4>(place + half * 512);
      else
        *reinterpret_cast<uint2*>(codes) = load_shared<uint2>(place + half * 256);
#pragma unroll
      for (int k = 0; k < kOperands / 2; ++k) {
        const uint32_t (&b)[2] = x.word[unit * kOperands + half * (kOperands / 2) + k];
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          uint32_t a[4];
          if constexpr (V == 4) {
            const uint32_t first = row_address(codes[2 * tile], row_selector(k), table);
            const uint32_t second = row_address(codes[2 * tile + 1], row_selector(k), table);
            a[0] = load_shared<uint32_t>(first);
            a[1] = load_shared<uint32_t>(second);
            a[2] = load_shared<uint32_t>(first + kTableBytes);
            a[3] = load_shared<uint32_t>(second + kTableBytes);
          } else {
            constexpr int kPlanes = table_planes(V);
            load_matrices(a, row_address(codes[tile], row_selector(k / kPlanes), table) + k % kPlanes * kTableBytes);
          }
          mma_k16<T>(value[tile], a, b[0], b[1]);
        }
      }
    }
  }

  // The lane's scales: rows 4g .. 4g+3, or 2g, 2g+1 and 16 further on.
  __device__ __forceinline__ static uint2 load_scales(uint32_t place, int g) {
    if constexpr (V == 4) return load_shared<uint2>(place + g * 8);
    return make_uint2(load_shared<uint32_t>(place + g * 4), load_shared<uint32_t>(place + g * 4 + 32));
  }
  __device__ __forceinline__ void add_scaled(const RowSums& sum, uint2 scales) {
    const float2 scale[2] = {unpack_pair<T>(scales.x), unpack_pair<T>(scales.y)};
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 both = scale[V == 4 ? tile : i / 2];
        value[tile][i] = fmaf((V == 4 ? i / 2 : tile) ? both.y : both.x, sum.value[tile][i], value[tile][i]);
      }
  }

  // Stores them at place[token][row].
  __device__ __forceinline__ void put(float* place, int lane) const {
    const int g = lane / 4, c = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float* row = place + (2 * c + i) * kFlowPitch;
      if constexpr (V == 4) {
        *reinterpret_cast<float4*>(row + 4 * g) =
            make_float4(value[0][i], value[0][2 + i], value[1][i], value[1][2 + i]);
      } else {
        *reinterpret_cast<float2*>(row + 2 * g) = make_float2(value[0][i], value[1][i]);
        *reinterpret_cast<float2*>(row + 2 * g + 16) = make_float2(value[0][2 + i], value[1][2 + i]);
      }
    }
  }
};

// Stores four rows of a token's y, with the bias.
template <typename T>
__device__ __forceinline__ void store_rows(const Segment& segment, int token, int row, float4 sum) {
  float bias[4] = {};
  if (segment.bias) {
#pragma unroll
    for (int j = 0; j < 4; ++j) bias[j] = to_float(static_cast<const T*>(segment.bias)[row + j]);
  }
  T out[4] = {from_float<T>(sum.x + bias[0]), from_float<T>(sum.y + bias[1]), from_float<T>(sum.z + bias[2]),
              from_float<T>(sum.w + bias[3])};
  *reinterpret_cast<uint2*>(static_cast<T*>(segment.y) + token * segment.out_features + row) =
      *reinterpret_cast<const uint2*>(out);
}

// Adds the sums of a section's tiles, from `begin` on, over the warps, and over the cluster, and stores y. A quarter
// warp has 32 rows of a token: a job is half a tile.
template <typename T>
__device__ __forceinline__ void finish_section(const Product& p, const FlowShape& shape, const TileWalk& begin,
                                               int tiles, unsigned char* shared, int warp, int lane) {
  const Segment& segment = p.segment[begin.segment];
  const int jobs = tiles * 2, size = cluster_size(), quad = lane % 8 * 4, first_row = begin.row + quad;
  float* sums = reinterpret_cast<float*>(shared + shape.sums);
  for (int job = warp; job < jobs; job += kFlowWarps) {
    const int tile = job / 2, token = job % 2 * 4 + lane / 8, row = first_row + tile * begin.step;
    const int place = token * kFlowPitch + quad;
    const float* from =
        reinterpret_cast<const float*>(shared + shape.partial) + tile * (kFlowWarps * kFlowSums) + place;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < kFlowWarps; ++w) add_to(sum, *reinterpret_cast<const float4*>(from + w * kFlowSums));
    if (size > 1)
      *reinterpret_cast<float4*>(sums + tile * kFlowSums + place) = sum;
    else if (token < p.tokens && row < segment.out_features)
      store_rows<T>(segment, token, row, sum);
  }
  if (size == 1) return;
  cluster_sync();
  for (int job = cluster_rank() + warp * size; job < jobs; job += kFlowWarps * size) {
    const int tile = job / 2, token = job % 2 * 4 + lane / 8, row = first_row + tile * begin.step;
    const uint32_t place = shared_address(sums + tile * kFlowSums + token * kFlowPitch + quad);
    if (token < p.tokens && row < segment.out_features)
      store_rows<T>(segment, token, row, sum_over_cluster<float4>(place, size));
  }
  cluster_sync_relaxed();  // no block overwrites its sums, or leaves, while another reads them
}

template <typename T, int V>
__global__ void __launch_bounds__(kFlowWarps * 32, 1)
    codebook_flow_kernel(const __grid_constant__ Product p, const __grid_constant__ FlowShape shape) {
#if CODEGEMM_HAS_CLUSTERS
  CODEGEMM_DYNAMIC_SHARED(flow_shared);
  const int lane = threadIdx.x % 32, warp = warp_index(), rank = cluster_rank(), g = lane / 4, c = lane % 4;
  TileWalk walk(p, shape);
  const T* codebooks = static_cast<const T*>(p.segment[walk.segment].codebooks);
  TablePieces<T, V> pieces;
  pieces.load(codebooks);
  const int slice = shape.units.first(rank), slice_units = shape.units.first(rank + 1) - slice;
  const Shares shares = {slice_units / kFlowWarps, slice_units % kFlowWarps};
  const WarpShare share = {slice + shares.first(warp), shares.first(warp + 1) - shares.first(warp)};
  const uint32_t ring = shared_address(flow_shared + shape.ring) + warp * (kFlowSlots * turn_bytes(V));
  FlowFeed<T, V> feed(p, walk, share, ring, lane);
  uint32_t table = shared_address(flow_shared) + (V == 4 ? lane * 4 : lane % 8 * 16);
  uint32_t source = ring + (V == 4 ? c * 128 + (g ^ (2 * c)) * 16 : lane / 16 * 128 + lane % 16 * 8);
  keep(table);
  keep(source);
  allow_next_kernel();

  pieces.store(flow_shared);
#pragma unroll 1
  for (int i = 1; i < p.num_codebooks; ++i) {
    pieces.load(codebooks + i * (256 * V));
    pieces.store(flow_shared + i * (table_planes(V) * kTableBytes));
  }
  wait_for_previous_kernel();  // codes, scales and codebooks are weights: only x needs the wait
  KeptX<T, V> x;
  x.load(p, share, lane);
  __syncthreads();
  while (walk.more()) {
    const TileWalk begin = walk;
    float* place = reinterpret_cast<float*>(flow_shared + shape.partial) + warp * kFlowSums;
    int tiles = 0;
    for (; tiles < shape.section_tiles && walk.more(); walk.advance(), ++tiles) {
      RowSums<T, V> total;
#pragma unroll
      for (int unit = 0; unit < KeptX<T, V>::kUnits; ++unit) {
        if (unit >= share.units) break;
        RowSums<T, V> sum;
        const int slot = feed.take(lane);
        const uint2 scales = sum.load_scales(ring + slot + unit_words(V) * 128, g);
        sum.add_turn(x, unit, source + slot, table);
#pragma unroll 1
        for (int i = 1; i < p.num_codebooks; ++i)
          sum.add_turn(x, unit, source + feed.take(lane), table + i * (table_planes(V) * kTableBytes));
        total.add_scaled(sum, scales);
      }
      total.put(place, lane);
      place += kFlowWarps * kFlowSums;
    }
    __syncthreads();
    finish_section<T>(p, shape, begin, tiles, flow_shared, warp, lane);
    __syncthreads();  // nobody overwrites sums that are still to be used
  }
  wait_copies<0>();
#endif
}

}  // namespace codegemm::cuda
