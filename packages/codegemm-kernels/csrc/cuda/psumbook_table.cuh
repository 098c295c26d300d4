// The tables of psumbook.cuh: filled by the tensor cores, one position a bank, and looked up.
#pragma once
#include "cuda/ptx.cuh"
#include "element.cuh"

namespace codegemm::cuda {

constexpr int kSlotBytes = 256 * 128;

// x of the 32 positions of a block as B operands of the table's matrix product. A product of 16 steps of K covers 16/V
// tiles of 8 positions side by side. Read past the first-level cache: x may be younger than this kernel
// (wait_for_previous_kernel).
template <typename T, int V>
struct PositionFragments {
  uint32_t word[V / 2];

  __device__ __forceinline__ void load(const T* x, int block, int inputs, uint32_t lane) {
    const uint32_t g = lane / 4, c = lane % 4;
    const int first = block * 32 * V + int(V == 4 ? c / 2 * 32 + g * 4 + c % 2 * 2 : g * V + c * 2);
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      const int index = first + (V == 16 ? i / 2 * 128 + i % 2 * 8 : i * 64);
      word[i] = index < inputs ? load_fresh(x + index) : 0;
    }
  }
  // The largest magnitudes so far, as the bits of 16-bit numbers: infinities and NaN are above all others.
  __device__ __forceinline__ uint32_t largest(uint32_t seen) const {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) seen = larger_pair(seen, word[i] & 0x7fff7fff);
    return seen;
  }
  __device__ __forceinline__ void multiply(uint32_t factor) {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) word[i] = multiply_pairs<T>(word[i], factor);
  }
};

// Entries 16 * entry_tile .. +15 of a codebook: rows g and g+8, elements 2c, 2c+1 (of 4: modulo 4) and from there 8
// further on.
template <typename T, int V>
struct EntryFragment {
  static constexpr int kWords = V == 16 ? 4 : 2;
  uint32_t word[kWords];

  __device__ __forceinline__ void load(const T* codebook, int entry_tile, uint32_t lane) {
    const T* source = codebook + (entry_tile * 16 + lane / 4) * V + lane % 4 * 2 % V;
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] = *reinterpret_cast<const uint32_t*>(source + i % 2 * 8 * V + i / 2 * 8);
  }
};

// Fills entries 16 * entry_tile .. +15 of one slot. Lane 4g + c receives two positions of a tile of 8, for entries g
// and g+8. Lanes of equal c have the same banks, so each stores its tiles in another order: product s gives row g tile
// (s + g) % 4, because all other tiles meet zeros in its A operand.
template <typename T, int V, int kTokens>
__device__ __forceinline__ void fill_table(unsigned char* slot, const PositionFragments<T, V> (&x)[kTokens],
                                           const EntryFragment<T, V>& entries, int entry_tile, uint32_t lane) {
  const uint32_t g = lane / 4, c = lane % 4;
  uint32_t masked[4][EntryFragment<T, V>::kWords];
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int i = 0; i < EntryFragment<T, V>::kWords; ++i)
      masked[k][i] = (g - (V == 4 ? c / 2 : 0) + k) % 4 == 0 ? entries.word[i] : 0;
  unsigned char* row = slot + (entry_tile * 16 + g) * 128 + c * 8;
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    float sum[kTokens][4] = {};
#pragma unroll
    for (int q = 0; q < V / 4; ++q) {
      const int low = V == 4 ? s : V == 8 ? s - 2 * q : s - q, high = V == 4 ? s - 2 : V == 8 ? low - 1 : low;
      const int i = V == 16 ? 2 : 0;
      const uint32_t a[4] = {masked[low & 3][0], masked[low & 3][1], masked[high & 3][i], masked[high & 3][i + 1]};
#pragma unroll
      for (int t = 0; t < kTokens; ++t) mma_k16<T>(sum[t], a, x[t].word[2 * q], x[t].word[2 * q + 1]);
    }
    unsigned char* place = row + (s + g) % 4 * 32;
#pragma unroll
    for (int i = 0; i < 4; i += 2, place += 8 * 128) {
      if constexpr (kTokens == 1)
        *reinterpret_cast<float2*>(place) = make_float2(sum[0][i], sum[0][i + 1]);
      else
        *reinterpret_cast<uint2*>(place) =
            make_uint2(pack_halves(sum[0][i], sum[1][i]), pack_halves(sum[0][i + 1], sum[1][i + 1]));
    }
  }
}

// How a lane looks up the four codes of a word: the byte it uses in each step, and the address of entry 0 of that
// byte's position in the first slot, for the word of each turn.
struct Lookup {
  uint32_t selector[4], position[2][4];

  __device__ __forceinline__ Lookup(const unsigned char* table, uint32_t lane) {
    const uint32_t w = lane / 8, j = lane % 8;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint32_t byte = (j + r) % 4;
      selector[r] = row_selector(byte);
      keep(selector[r]);
#pragma unroll
      for (int turn = 0; turn < 2; ++turn) {
        position[turn][r] = shared_address(table) + ((2 * w + (j / 4 + turn) % 2) * 4 + byte) * 4;
        keep(position[turn][r]);
      }
    }
  }

  // sum[token][row]: of the lookups of that row's word in a slot. Those of two tokens are added as fp16, both at once.
  template <int kTokens>
  __device__ __forceinline__ void add_up(uint32_t word, int turn, int slot, float (&sum)[kTokens][4], int row) const {
    uint32_t value[4];
#pragma unroll
    for (int r = 0; r < 4; ++r)
      value[r] = load_shared<uint32_t>(row_address(word, selector[r], position[turn][r]) + slot * kSlotBytes);
    if constexpr (kTokens == 1) {
      sum[0][row] = (__uint_as_float(value[0]) + __uint_as_float(value[1])) +
                    (__uint_as_float(value[2]) + __uint_as_float(value[3]));
    } else {
      const float2 both = unpack_pair<__half>(
          add_pairs<__half>(add_pairs<__half>(value[0], value[1]), add_pairs<__half>(value[2], value[3])));
      sum[0][row] = both.x;
      sum[1][row] = both.y;
    }
  }
};

// Sums 4 rows a lane over the four lanes of equal lane%8; lane l returns row lane/8 of them.
__device__ __forceinline__ float reduce_rows(const float (&sum)[4], uint32_t lane) {
  const bool upper = lane & 16, odd = lane & 8;
  float low = upper ? sum[2] : sum[0], high = upper ? sum[3] : sum[1];
  low += __shfl_xor_sync(~0u, upper ? sum[0] : sum[2], 16);
  high += __shfl_xor_sync(~0u, upper ? sum[1] : sum[3], 16);
  return (odd ? high : low) + __shfl_xor_sync(~0u, odd ? low : high, 8);
}

}  // namespace codegemm::cuda
