// What the kernels with codebooks in shared memory share: the codebook in shared memory, copied until no lookup has a
// bank conflict; lookups that are B operands of mma.m16n8k16 as they come; x laid out as the A operands that go with
// them.
//
// The copies of an entry are the 128 bytes at 128 e of its codebook's table of 32 KB:
//
//     v =  4   16 copies of  8 bytes                                  one lookup = the B operand of one k16 step
//     v =  8    8 copies of 16 bytes                                  one lookup = two steps
//     v = 16    4 copies of elements 0..7, 4 copies of elements 8..15 one lookup = two loads, four steps
//
// Every lane reads a copy in banks that no lane of its half or quarter warp reads, so a lookup takes 2, 4 or 8
// wavefronts whatever the codes are; its address, table + 128 code + 8 or 16 copy, is one dp4a.
//
// Lane l = 4g + c holds one word of row 4g + j for each j = 0..3: word c of a step of four words, 16 V columns. Looking
// up byte b of it gives k16 operands for which row 4g + j is column g of product j. That permutes K and the rows. The k
// order costs nothing, since x is laid out to match; the row order is undone when sums are stored.
#pragma once
#include "cuda/ptx.cuh"
#include "element.cuh"
#include "product.h"

namespace codegemm::cuda {

constexpr int kTableBytes = 256 * 128;  // of a codebook

// The lane's copy of entry 0, from the start of a table.
template <int V>
__device__ __forceinline__ uint32_t copy_of_lane(int lane) {
  return V == 4 ? lane % 16 * 8 : V == 8 ? lane % 8 * 16 : lane / 2 % 2 * 64 + (lane / 4 % 2 * 2 + lane % 2) * 16;
}

// Copies the codebooks of a segment into the layout above, by the first `threads` threads of the block. All loads of a
// batch come before its stores: one by one, each would wait for the cache.
template <typename T, int V>
__device__ __forceinline__ void copy_codebooks(unsigned char* tables, const T* codebooks, int num_codebooks,
                                               int threads = blockDim.x) {
  constexpr int kBatch = 8;
  const int count = num_codebooks * 256 * 8;
  for (int first = threadIdx.x; first < count; first += kBatch * threads) {
    uint4 value[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = min(first + k * threads, count - 1);
      const T* source = codebooks + i / 8 * V;
      if constexpr (V == 4) {
        const uint2 half = *reinterpret_cast<const uint2*>(source);
        value[k] = make_uint4(half.x, half.y, half.x, half.y);
      } else {
        value[k] = *reinterpret_cast<const uint4*>(source + (V == 16 ? i % 8 / 4 * 8 : 0));
      }
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k)
      if (first + k * threads < count) *reinterpret_cast<uint4*>(tables + (first + k * threads) * 16) = value[k];
  }
}

// The V/2 words of the entry that byte `byte` of `codes` names. table: address of the lane's copy of entry 0.
template <int V>
__device__ __forceinline__ void look_up(uint32_t (&weight)[V / 2], uint32_t codes, int byte, uint32_t table) {
  const uint32_t entry = row_address(codes, row_selector(byte), table);
  if constexpr (V == 4) {
    *reinterpret_cast<uint2*>(weight) = load_shared<uint2>(entry);
  } else {
    *reinterpret_cast<uint4*>(weight) = load_shared<uint4>(entry);
    if constexpr (V == 16) *reinterpret_cast<uint4*>(weight + 4) = load_shared<uint4>(entry ^ 64);
  }
}

// Scale j of four neighbouring 16-bit scales, in both halves of a word.
__device__ __forceinline__ uint32_t doubled_scale(uint2 scales, int j) {
  return permute_bytes(j < 2 ? scales.x : scales.y, 0, j % 2 ? 0x3232 : 0x1010);
}

// 16 bytes of x (8 columns of a word) for one lane and tile of 16 tokens, or zeros where there are none.
template <typename T, int V>
__device__ __forceinline__ uint4 load_x(const Product& p, int token, int word, int piece) {
  if (token >= p.tokens || word >= p.words) return make_uint4(0, 0, 0, 0);
  return load_fresh_16(static_cast<const T*>(p.x) + token * p.x_row_stride + word * (4 * V) + piece * 8);
}

// Where the A operand of a lane begins: 16 bytes a lane, operand after operand. A step of four words has V k16 steps;
// with 8 tokens an operand serves two of them (rows 0..7 of the product for even ones, 8..15 for odd ones).
template <int V, int kTokens>
__device__ __forceinline__ constexpr int operands_of_step() {
  return kTokens == 8 ? V / 2 : V * (kTokens / 16);
}

// What the place of a lane in an A operand is xored with, so that stores of neighbouring pieces have no bank conflicts.
__host__ __device__ constexpr uint32_t swizzle(int piece) {
  return (piece & 1) * 64 | (piece & 2) * 16 | (piece & 4) * 4;
}

// Lays x of steps [first_step, last_step) out, 8 or 16 tokens, by all warps of the block, 8 or 16.
template <typename T, int V, int kTokens>
__device__ __forceinline__ void stage_x(unsigned char* staged, const Product& p, int first_step, int last_step,
                                        int warps, int warp, int lane) {
  constexpr int kPieces = V / 2, kBatch = kTokens == 8 ? 8 : 4;  // pieces of 16 bytes in a word; at a time
  const int token = warp % 8, pieces = (last_step - first_step) * (4 * kPieces), step = warps / 8 * 32;
  for (int first = warp / 8 * 32 + lane; first < pieces; first += kBatch * step) {
    uint4 low[kBatch], high[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = first + k * step, word = i < pieces ? first_step * 4 + i / kPieces : p.words;
      low[k] = load_x<T, V>(p, token, word, i % kPieces);
      if constexpr (kTokens == 16) high[k] = load_x<T, V>(p, token + 8, word, i % kPieces);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = first + k * step, word = i / kPieces, c = word % 4;
      const int piece = i % kPieces ^ (V == 16 ? c / 2 : 0);  // lanes c = 2, 3 look up the upper half of an entry first
      unsigned char* place =
          staged + word / 4 * operands_of_step<V, kTokens>() * 512 + ((token * 4 + c) * 16 ^ swizzle(piece));
      if (i >= pieces) break;
      if constexpr (kTokens == 8) {
        *reinterpret_cast<uint4*>(place + piece * 512) = make_uint4(low[k].x, low[k].z, low[k].y, low[k].w);
      } else {
        *reinterpret_cast<uint4*>(place + piece * 1024) = make_uint4(low[k].x, high[k].x, low[k].y, high[k].y);
        *reinterpret_cast<uint4*>(place + piece * 1024 + 512) = make_uint4(low[k].z, high[k].z, low[k].w, high[k].w);
      }
    }
  }
}

// Adds the sums of all blocks of the cluster, in rank order, and stores this block's share of the rows (share: a
// multiple of 4) of sums[token][row]: four rows a thread, so that few threads' loads from other blocks follow one
// another. first, first_token: what row and token 0 of the sums are in the segment and in x. The block's first
// `threads` threads call it.
template <typename T>
__device__ __forceinline__ void reduce_tokens(const Product& p, const Segment& segment, const float* sums, int share,
                                              int64_t first, int first_token, int tokens, int threads) {
  const int size = cluster_size(), pitch = p.rows_per_range + 4, begin = cluster_rank() * share;
  const int end = int(min(int64_t(min(begin + share, p.rows_per_range)), segment.out_features - first));
  const int quads = (end - begin) / 4;  // N is a multiple of 4
#pragma unroll 2
  for (int i = threadIdx.x; i < quads * tokens; i += threads) {
    const int token = i / quads, row = begin + (i - token * quads) * 4;
    const float4 sum = sum_over_cluster<float4>(shared_address(sums + token * pitch + row), size);
    float bias[4] = {};
    if (segment.bias) {
#pragma unroll
      for (int j = 0; j < 4; ++j) bias[j] = to_float(static_cast<const T*>(segment.bias)[first + row + j]);
    }
    T out[4] = {from_float<T>(sum.x + bias[0]), from_float<T>(sum.y + bias[1]), from_float<T>(sum.z + bias[2]),
                from_float<T>(sum.w + bias[3])};
    *reinterpret_cast<uint2*>(static_cast<T*>(segment.y) + (first_token + token) * segment.out_features + first + row) =
        *reinterpret_cast<const uint2*>(out);
  }
}

}  // namespace codegemm::cuda
