// Warpgroup products of Hopper (sm_90a), one function an instruction. Kernels include this file as "cuda/wgmma.cuh" so
// that tests/emulation can put its own in front.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/ptx.cuh"

namespace codegemm::cuda {

// Before the first product of a warpgroup after its registers were written by anything else.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// The products since the last commit are a group; wait_products returns when all but the last kGroups have ended, and
// until then neither their operands nor their sums may be touched.
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kGroups>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// A tile of B in shared memory: rows of 64 columns of 16 bits, 128 bytes, whose 16-byte pieces are at place ^ row % 8;
// starts at a multiple of 1024. Column c of the tile: descriptor + c / 8.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62, kEightRows = uint64_t(1024 / 16) << 32, kUnused = 1 << 16;
  return kSwizzle128 | kEightRows | kUnused | (address & 0x3ffff) >> 4;
}

// A warpgroup's registers a thread from here on: more than the kernel starts with, or fewer, for the others.
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// A matrix of 16-bit numbers in global memory, for copy_tile (made by cuTensorMapEncodeTiled).
struct TileMap {
  CUtensorMap map;
};

// Fetches the description itself, ahead of the first copy.
__device__ __forceinline__ void prefetch_map(const TileMap& matrix) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&matrix.map) : "memory");
}

// Copies the tile of the map's size that starts at this column and row to a tile of B, zeros where the matrix has
// ended; its arrival counts at the barrier.
__device__ __forceinline__ void copy_tile(uint32_t target, const TileMap& matrix, int column, int row,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          target),
      "l"(&matrix.map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The same to both blocks of a cluster of two: to this place of each, and to this barrier of each.
__device__ __forceinline__ void copy_tile_to_pair(uint32_t target, const TileMap& matrix, int column, int row,
                                                  uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, "
      "%3}], [%4], %5;" ::"r"(target),
      "l"(&matrix.map), "r"(column), "r"(row), "r"(barrier), "h"(uint16_t(3))
      : "memory");
}
// Arrives at a barrier of the block (mode 1), of the cluster (2, an address of address_in_rank) or at none (0), without
// branches: one between products and the next ones' operands makes ptxas run the products one by one.
__device__ __forceinline__ void arrive_if(uint32_t barrier, uint32_t mode) {
  asm volatile(
      "{\n.reg .pred p, q;\n.reg .b64 state;\nsetp.eq.u32 p, %1, 1;\nsetp.eq.u32 q, %1, 2;\n"
      "@p mbarrier.arrive.shared.b64 state, [%0];\n@q mbarrier.arrive.shared::cluster.b64 _, [%0];\n}" ::"r"(barrier),
      "r"(mode)
      : "memory");
}

// clang-format off
#define CODEGEMM_R8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define CODEGEMM_R16 CODEGEMM_R8(0, 1, 2, 3, 4, 5, 6, 7) "," CODEGEMM_R8(8, 9, 10, 11, 12, 13, 14, 15)
#define CODEGEMM_R32 CODEGEMM_R16 "," \
                     CODEGEMM_R8(16, 17, 18, 19, 20, 21, 22, 23) "," CODEGEMM_R8(24, 25, 26, 27, 28, 29, 30, 31)
#define CODEGEMM_R64 CODEGEMM_R32 "," \
                     CODEGEMM_R8(32, 33, 34, 35, 36, 37, 38, 39) "," CODEGEMM_R8(40, 41, 42, 43, 44, 45, 46, 47) "," \
                     CODEGEMM_R8(48, 49, 50, 51, 52, 53, 54, 55) "," CODEGEMM_R8(56, 57, 58, 59, 60, 61, 62, 63)
#define CODEGEMM_R128 CODEGEMM_R64 "," \
                      CODEGEMM_R8(64, 65, 66, 67, 68, 69, 70, 71) "," CODEGEMM_R8(72, 73, 74, 75, 76, 77, 78, 79) "," \
                      CODEGEMM_R8(80, 81, 82, 83, 84, 85, 86, 87) "," CODEGEMM_R8(88, 89, 90, 91, 92, 93, 94, 95) "," \
                      CODEGEMM_R8(96, 97, 98, 99, 100, 101, 102, 103) "," CODEGEMM_R8(104, 105, 106, 107, 108, 109, 110, 111) "," \
                      CODEGEMM_R8(112, 113, 114, 115, 116, 117, 118, 119) "," CODEGEMM_R8(120, 121, 122, 123, 124, 125, 126, 127)
#define CODEGEMM_S4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define CODEGEMM_S16(i) CODEGEMM_S4(i), CODEGEMM_S4(i + 4), CODEGEMM_S4(i + 8), CODEGEMM_S4(i + 12)
#define CODEGEMM_S32(i) CODEGEMM_S16(i), CODEGEMM_S16(i + 16)
#define CODEGEMM_S64(i) CODEGEMM_S32(i), CODEGEMM_S32(i + 32)
#define CODEGEMM_S128(i) CODEGEMM_S64(i), CODEGEMM_S64(i + 64)
#define CODEGEMM_WGMMA(N, TYPE, REGISTERS, SUMS, A0, A1, A2, A3, B)                                     \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, "     \
               "{%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B ", 1, 1, 1, 0;"                             \
               : SUMS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define CODEGEMM_WGMMA_SIZES(TYPE)                                                   \
  if constexpr (kN == 32) {                                                          \
    CODEGEMM_WGMMA(32, TYPE, CODEGEMM_R16, CODEGEMM_S16(0), 16, 17, 18, 19, 20);     \
  } else if constexpr (kN == 64) {                                                   \
    CODEGEMM_WGMMA(64, TYPE, CODEGEMM_R32, CODEGEMM_S32(0), 32, 33, 34, 35, 36);     \
  } else if constexpr (kN == 128) {                                                  \
    CODEGEMM_WGMMA(128, TYPE, CODEGEMM_R64, CODEGEMM_S64(0), 64, 65, 66, 67, 68);    \
  } else {                                                                           \
    static_assert(kN == 256);                                                        \
    CODEGEMM_WGMMA(256, TYPE, CODEGEMM_R128, CODEGEMM_S128(0), 128, 129, 130, 131, 132); \
  }
// clang-format on

// d += a b for a 64 x 16 (a: each warp 16 rows of it, as mma.m16n8k16 has them) and 16 x kN tile (b: columns of
// tile_descriptor, its rows being the kN columns of the product); fp16 or bf16 in, fp32 sums: d[4j ..] are those of
// columns 8j .. 8j+7 as mma.m16n8k16 leaves them.
template <typename T, int kN>
__device__ __forceinline__ void product_k16(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<T, __half>) {
    CODEGEMM_WGMMA_SIZES("f16")
  } else {
    CODEGEMM_WGMMA_SIZES("bf16")
  }
}

// Before the first product and after the last wait_products: what comes before is not moved behind, and the other way
// round.
template <int kCount>
__device__ __forceinline__ void settle(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

}  // namespace codegemm::cuda
