// One token: y = x Wᵀ through psumbooks (CodeGEMM, NeurIPS 2025, section 3), tables of all 256 partial sums that a
// code can stand for at one vector position: table[position][e] = dot(codebook[e], x[position]). A weight then costs
// no arithmetic of its own, only one lookup a code.
//
// The table has one position a bank. Entry e of the 32 positions of a block is 128 bytes, position p at bank p, and a
// warp's lookup always touches 32 different positions: lane l holds word w = l%8 (positions 4w .. 4w+3) of rows
// 4q .. 4q+3, q = l/8, and in step r uses byte (r+q)%4. So no lookup ever has a bank conflict whatever the codes are,
// and nothing is replicated. Two blocks share a row of 256 bytes, which makes the address of a lookup one byte
// permutation: the code is byte 1, the lane's position byte 0, and the block an immediate offset of the load.
//
//     word of table   e*64 + 0 .. 31      position 0 .. 31 of the even slot
//                     e*64 + 32 .. 63     position 0 .. 31 of the odd slot         x 256 entries = 64 KB a pair
//
// A slot is one codebook of one block of 32 positions. Tables are fp32 and filled by the tensor cores (exact products
// of 16-bit numbers, fp32 sums), so the result differs from exact arithmetic by fp32 rounding and the rounding of y.
//
// A cluster computes rows_per_range rows; its blocks divide K, each keeps its sums in shared memory, and at the end
// they add each other's through distributed shared memory, in the order of their ranks: bit-equal between runs.
//
// Cost a lookup: 1 PRMT, 1 LDS, 1 FADD or FFMA; a code is read from memory once, 16 bytes a lane.
#pragma once
#include "cluster.cuh"
#include "element.cuh"
#include "product.h"

namespace codegemm::cuda {

constexpr int kPsumbookTileRows = 16;  // rows a warp handles at a time: 4 quads of 4
constexpr int kPsumbookPairBytes = 64 * 1024;

// x of the 32 positions of a block as the A operand of the table's matrix product, two tiles of 16 positions.
template <typename T, int V>
struct PositionFragments {
  static constexpr int kRegisters = V == 16 ? 4 : 2;
  uint32_t word[2][kRegisters];

  __device__ __forceinline__ void load(const T* x, int block, int positions, int lane) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int r = 0; r < kRegisters; ++r) {
        const int position = block * 32 + tile * 16 + (r % 2) * 8 + lane / 4;
        const int element = (r / 2) * 8 + (lane % 4) * 2;
        const bool inside = position < positions && element < V;
        word[tile][r] = inside ? *reinterpret_cast<const uint32_t*>(x + position * V + element) : 0;
      }
    }
  }
};

// Fills entries 8*entry_tile .. +7 of one slot: products of 32 positions and 8 entries. A lane receives 4 positions of
// 2 entries; lanes with equal lane/4 have the same positions, so they store them in rotated order to use all banks.
template <typename T, int V>
__device__ __forceinline__ void fill_table(unsigned char* slot, const PositionFragments<T, V>& positions,
                                           const T* codebook, int entry_tile, int lane) {
  const int g = lane / 4, c = lane % 4;
  const T* entry = codebook + (entry_tile * 8 + g) * V + c * 2;
  const uint32_t b0 = V > 4 || c < 2 ? *reinterpret_cast<const uint32_t*>(entry) : 0;
  float sum[2][4] = {};
  if constexpr (V == 16) {
    const uint32_t b1 = *reinterpret_cast<const uint32_t*>(entry + 8);
    mma_k16<T>(sum[0], positions.word[0], b0, b1);
    mma_k16<T>(sum[1], positions.word[1], b0, b1);
  } else {
    mma_k8<T>(sum[0], positions.word[0][0], positions.word[0][1], b0);
    mma_k8<T>(sum[1], positions.word[1][0], positions.word[1][1], b0);
  }
  unsigned char* row = slot + (entry_tile * 8 + 2 * c) * 256 + g * 4;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float a0 = sum[0][j], a1 = sum[0][2 + j], a2 = sum[1][j], a3 = sum[1][2 + j];
    const float b0_ = c & 1 ? a1 : a0, b1_ = c & 1 ? a2 : a1, b2_ = c & 1 ? a3 : a2, b3_ = c & 1 ? a0 : a3;
    const float rotated[4] = {c & 2 ? b2_ : b0_, c & 2 ? b3_ : b1_, c & 2 ? b0_ : b2_, c & 2 ? b1_ : b3_};
#pragma unroll
    for (int s = 0; s < 4; ++s) *reinterpret_cast<float*>(row + j * 256 + ((s + c) & 3) * 32) = rotated[s];
  }
}

// Adds up lookups of one row: the four codes of `word`, one a position, each lane in its own order.
__device__ __forceinline__ float look_up_word(const unsigned char* slot, uint32_t word, uint32_t lane_offsets,
                                              const uint32_t (&selector)[4]) {
  float value[4];
#pragma unroll
  for (int r = 0; r < 4; ++r)
    value[r] = *reinterpret_cast<const float*>(slot + permute_bytes(word, lane_offsets, selector[r]));
  return (value[0] + value[1]) + (value[2] + value[3]);
}

// Sums four rows over the eight lanes of equal lane/8. Lane l returns row (l/2)%4 of its quad; odd lanes a copy.
__device__ __forceinline__ float reduce_rows(const float (&sum)[4], int lane) {
  const bool upper = lane & 4, odd = lane & 2;
  float low = upper ? sum[2] : sum[0], high = upper ? sum[3] : sum[1];
  low += __shfl_xor_sync(~0u, upper ? sum[0] : sum[2], 4);
  high += __shfl_xor_sync(~0u, upper ? sum[1] : sum[3], 4);
  float row = odd ? high : low;
  row += __shfl_xor_sync(~0u, odd ? low : high, 2);
  return row + __shfl_xor_sync(~0u, row, 1);
}

// The codes and scales of 16 rows x up to kSlots slots, as one lane holds them. kShare slots in a row have one scale.
template <typename T, int kShare, int kSlots>
struct Tile {
  uint4 codes[kSlots];
  uint2 scales[kSlots / kShare];
};

// Where a lane's codes and scales of each slot lie; null where the slot or the lane's word does not exist.
template <typename T, int kShare, int kSlots>
struct Sources {
  const uint32_t* codes[kSlots];
  const T* scales[kSlots / kShare];

  __device__ __forceinline__ void point(const Product& p, const Segment& segment, int first_slot, int last_slot,
                                        int lane) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int slot = first_slot + s, codebook = slot % p.num_codebooks;
      const int word = slot / p.num_codebooks * 8 + lane % 8;
      const bool exists = slot < last_slot && word < p.words;
      const int64_t rows = segment.out_features;
      codes[s] = exists ? segment.codes + (int64_t(codebook) * p.words + word) * rows + lane / 8 * 4 : nullptr;
      if (s % kShare == 0)
        scales[s / kShare] =
            exists ? static_cast<const T*>(segment.scales) + word / p.words_per_group * rows + lane / 8 * 4 : nullptr;
    }
  }

  __device__ __forceinline__ void load(Tile<T, kShare, kSlots>& tile, int row, bool inside) const {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      tile.codes[s] = inside && codes[s] ? load_streaming(reinterpret_cast<const uint4*>(codes[s] + row))
                                         : make_uint4(0, 0, 0, 0);
      if (s % kShare == 0)
        tile.scales[s / kShare] = inside && scales[s / kShare]
                                      ? __ldg(reinterpret_cast<const uint2*>(scales[s / kShare] + row))
                                      : make_uint2(0, 0);
    }
  }
};

template <typename T, int kShare, int kSlots>
__device__ __forceinline__ float sum_tile(const unsigned char* table, const Tile<T, kShare, kSlots>& tile, int slots,
                                          uint32_t lane_offsets, const uint32_t (&selector)[4], int lane) {
  float sum[4] = {};
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    if (s < slots) {
      const float2 low = unpack_pair<T>(tile.scales[s / kShare].x), high = unpack_pair<T>(tile.scales[s / kShare].y);
      const unsigned char* slot = table + s / 2 * kPsumbookPairBytes + s % 2 * 128;
      const uint4 codes = tile.codes[s];
      sum[0] = fmaf(low.x, look_up_word(slot, codes.x, lane_offsets, selector), sum[0]);
      sum[1] = fmaf(low.y, look_up_word(slot, codes.y, lane_offsets, selector), sum[1]);
      sum[2] = fmaf(high.x, look_up_word(slot, codes.z, lane_offsets, selector), sum[2]);
      sum[3] = fmaf(high.y, look_up_word(slot, codes.w, lane_offsets, selector), sum[3]);
    }
  }
  return reduce_rows(sum, lane);
}

// Rows [first, last) of a segment times this block's slots, added to sums[0 .. last - first).
template <typename T, int V, int kShare, int kSlots>
__device__ __forceinline__ void multiply_segment(const Product& p, const Segment& segment, int64_t first, int64_t last,
                                                 int first_slot, int last_slot, unsigned char* table, float* sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int rows = int(last - first), tile_step = warps * kPsumbookTileRows;
  const uint32_t lane_offsets = 0x0c080400u + (lane % 8) * 0x10101010u;
  uint32_t selector[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const uint32_t byte = (r + lane / 8) % 4;  // code byte to byte 1, position to byte 0, zeros (its sign) above
    selector[r] = (byte + 4) | byte << 4 | (byte + 12) * 0x1100u;
  }
  for (int slot = first_slot; slot < last_slot; slot += kSlots) {
    Sources<T, kShare, kSlots> sources;
    Tile<T, kShare, kSlots> tile, next;
    sources.point(p, segment, slot, last_slot, lane);
    int row = warp * kPsumbookTileRows;
    sources.load(tile, int(first) + row, row + lane / 8 * 4 < rows);

    __syncthreads();  // every warp has finished with the previous table
    PositionFragments<T, V> positions[kSlots];
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
      positions[s].load(static_cast<const T*>(p.x), (slot + s) / p.num_codebooks, p.words * 4, lane);
    for (int entry_tile = warp; entry_tile < 32; entry_tile += warps) {
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        const T* codebook = static_cast<const T*>(segment.codebooks) + (slot + s) % p.num_codebooks * (256 * V);
        fill_table<T, V>(table + s / 2 * kPsumbookPairBytes + s % 2 * 128, positions[s], codebook, entry_tile, lane);
      }
    }
    __syncthreads();

    const int slots = last_slot - slot;
    for (; row < rows; row += tile_step) {
      const int next_row = row + tile_step;
      sources.load(next, int(first) + next_row, next_row + lane / 8 * 4 < rows);
      const float sum = sum_tile<T, kShare, kSlots>(table, tile, slots, lane_offsets, selector, lane);
      const int out = row + lane / 8 * 4 + lane / 2 % 4;
      if (lane % 2 == 0 && out < rows) sums[out] += sum;
      tile = next;
    }
  }
}

// Adds the sums of all blocks of the cluster, in rank order, and stores this block's share of the rows.
template <typename T>
__device__ __forceinline__ void reduce_and_store(const Product& p, const float* sums, int64_t first, int64_t last) {
  const int rank = cluster_rank(), size = cluster_size();
  const int share = (p.rows_per_range + size - 1) / size;
  for (int i = threadIdx.x; i < share; i += blockDim.x) {
    const int64_t row = first + rank * share + i;
    if (row >= last) break;
    const uint32_t address = shared_address(sums + rank * share + i);
    float sum = 0;
#pragma unroll 4
    for (int r = 0; r < size; ++r) sum += load_from_rank(address, r);
    int s = 0;
    while (s + 1 < p.segments && row >= p.segment[s + 1].first_row) ++s;
    const Segment& segment = p.segment[s];
    const int64_t n = row - segment.first_row;
    if (segment.bias) sum += to_float(static_cast<const T*>(segment.bias)[n]);
    static_cast<T*>(segment.y)[n] = from_float<T>(sum);
  }
}

// Grid: clusters x ranges of rows. Dynamic shared memory: kSlots/2 x 64 KB of table, then rows_per_range sums.
template <typename T, int V, int kShare, int kSlots, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks) psumbook_kernel(const __grid_constant__ Product p) {
#if CODEGEMM_HAS_CLUSTERS
  extern __shared__ __align__(1024) unsigned char psumbook_shared[];
  float* sums = reinterpret_cast<float*>(psumbook_shared + kSlots / 2 * kPsumbookPairBytes);
  allow_next_kernel();
  for (int i = threadIdx.x; i < p.rows_per_range; i += blockDim.x) sums[i] = 0;  // seen after multiply's barrier
  wait_for_previous_kernel();

  const int size = cluster_size(), rank = cluster_rank();
  const int64_t first = int64_t(blockIdx.x / size) * p.rows_per_range;
  const int64_t last = min(first + p.rows_per_range, p.total_rows);
  const int units = (p.words + 7) / 8 * p.num_codebooks / kShare;  // slots that share a scale stay in one block
  const int first_slot = units * rank / size * kShare, last_slot = units * (rank + 1) / size * kShare;
  for (int s = 0; s < p.segments; ++s) {
    const Segment& segment = p.segment[s];
    const int64_t from = max(first, segment.first_row), to = min(last, segment.first_row + segment.out_features);
    if (from < to)
      multiply_segment<T, V, kShare, kSlots>(p, segment, from - segment.first_row, to - segment.first_row, first_slot,
                                             last_slot, psumbook_shared, sums + (from - first));
  }
  cluster_sync();
  reduce_and_store<T>(p, sums, first, last);
  cluster_sync();  // no block leaves while another reads its sums
#endif
}

}  // namespace codegemm::cuda
