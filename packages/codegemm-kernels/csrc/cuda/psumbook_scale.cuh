// Powers of two that keep the fp16 tables of two tokens (psumbook.cuh) in range.
#pragma once
#include <type_traits>

#include "element.cuh"
#include "psumbook_work.cuh"

namespace codegemm::cuda {

// The lane's share of the codebooks of a launch: the largest magnitudes, as bits of 16-bit numbers.
template <int V>
__device__ __forceinline__ uint32_t largest_entry(const Product& p) {
  uint32_t seen = 0;
#pragma unroll 1
  for (int s = 0; s < p.segments; ++s) {
    const uint4* source = static_cast<const uint4*>(p.segment[s].codebooks);
#pragma unroll 1
    for (int i = int(threadIdx.x); i < p.num_codebooks * 32 * V; i += kConsumerWarps * 32) {
      const uint4 words = source[i];
      seen = larger_pair(larger_pair(seen, words.x & 0x7fff7fff), words.y & 0x7fff7fff);
      seen = larger_pair(larger_pair(seen, words.z & 0x7fff7fff), words.w & 0x7fff7fff);
    }
  }
  return seen;
}
__device__ __forceinline__ uint32_t largest_of_warp(uint32_t pair) {
  return largest_in_warp(max(pair & 0xffff, pair >> 16));
}

template <typename T>
__device__ __forceinline__ int exponent(uint32_t bits) {
  return int(__float_as_uint(unpack_pair<T>(bits).x) >> 23) - 127;
}

// The power of two that a token's x is multiplied by, so that no sum of V products exceeds 2^13, and none of four
// entries 2^15: x < 2^(a+1), codebook < 2^(b+1). It is representable in T; an infinity stays one.
template <typename T, int V>
__device__ __forceinline__ int scale_exponent(uint32_t largest_x, uint32_t largest_entry) {
  constexpr int kLog = V == 4 ? 2 : 3;
  constexpr int kLeast = std::is_same_v<T, __half> ? -24 : -100, kMost = std::is_same_v<T, __half> ? 15 : 100;
  const int a = exponent<T>(largest_x), b = exponent<T>(largest_entry);
  return min(max(min(11 - kLog - a - b, 14 - a), kLeast), kMost);
}
__device__ __forceinline__ float power_of_two(int exponent) { return __uint_as_float(uint32_t(127 + exponent) << 23); }
// In both halves of a word.
template <typename T>
__device__ __forceinline__ uint32_t doubled(float value) {
  const T rounded = from_float<T>(value);
  return uint32_t(*reinterpret_cast<const uint16_t*>(&rounded)) * 0x10001;
}

}  // namespace codegemm::cuda
