// How codebook_wgmma.cuh stores y: from registers, after adding up what the blocks of a cluster have of K.
#pragma once
#include "codebook_wgmma_work.cuh"
#include "cuda/cluster.cuh"
#include "element.cuh"

namespace codegemm::cuda {

// Where the sums of a lane go: rows 2g, 2g+1 of its warp, tokens 8i + 2c and 8i + 2c+1 of group i of the tile's tokens.
template <typename T>
struct LaneOutput {
  T* y;  // of group 0
  int64_t n;
  int tokens;  // left of the lane's first on; 0 if its rows do not exist
  float bias[2];

  __device__ __forceinline__ LaneOutput(const Product& p, const WgmmaTile& tile, int row, int lane)
      : n(tile.segment.out_features), bias{} {
    const int64_t place = tile.row + row;
    const int token = tile.token + lane % 4 * 2;
    tokens = place < n ? p.tokens - token : 0;  // n is a multiple of 8
    y = static_cast<T*>(tile.segment.y) + token * n + place;
    if (tile.segment.bias && tokens > 0) {
      bias[0] = to_float(static_cast<const T*>(tile.segment.bias)[place]);
      bias[1] = to_float(static_cast<const T*>(tile.segment.bias)[place + 1]);
    }
  }
  __device__ __forceinline__ void store(int group, float4 sum) const {
    store(y + group * 8 * n, group * 8 < tokens, sum.x, sum.z);
    store(y + (group * 8 + 1) * n, group * 8 + 1 < tokens, sum.y, sum.w);
  }
  __device__ __forceinline__ void store(T* place, bool exists, float first, float second) const {
    const T pair[2] = {from_float<T>(first + bias[0]), from_float<T>(second + bias[1])};
    if (exists) *reinterpret_cast<uint32_t*>(place) = *reinterpret_cast<const uint32_t*>(pair);
  }
};

template <int kN>
__device__ __forceinline__ float4 group_of(const float (&sum)[kN / 2], int group) {
  return make_float4(sum[group * 4], sum[group * 4 + 1], sum[group * 4 + 2], sum[group * 4 + 3]);
}

// What a block that divides K is sent.
template <int kN>
__device__ __forceinline__ int bytes_of_sums(int share, int rank, int size, int threads) {
  return (size - 1) * max(0, min(share, kN / 8 - rank * share)) * threads * 16;
}

// The blocks that divide K send each other the sums of their shares of the tokens, a thread's to the thread of the same
// number, and each adds and stores its own, in the order of ranks.
template <typename T, int kN>
__device__ __forceinline__ void add_over_cluster(const float (&sum)[kN / 2], const LaneOutput<T>& output,
                                                 uint32_t share, uint32_t shared, uint32_t barrier, int threads) {
  const int rank = cluster_rank(), size = cluster_size();
  const uint32_t step = threads * 16, source_bytes = share * step;
  shared += threadIdx.x * 16;
  uint32_t place = shared + (rank - 1) * source_bytes;  // sources are in the order of ranks, without the target
  int target = 0;
  uint32_t left = share;
#pragma unroll
  for (int group = 0; group < kN / 8; ++group) {
    if (target != rank)
      send_async(address_in_rank(place, target), group_of<kN>(sum, group), address_in_rank(barrier, target));
    place += step;
    if (--left == 0) {
      left = share;
      ++target;
      place = shared + (rank - (rank > target)) * source_bytes;
    }
  }
  if (rank * share >= kN / 8) return;
  wait_cluster(barrier, 0);
  uint32_t own = -(rank * share);
#pragma unroll
  for (int group = 0; group < kN / 8; ++group) {
    keep(own);
    if (own < share) {
      float4 total = {};
#pragma unroll 1
      for (int source = 0; source < size; ++source)
        add_to(total, source == rank
                          ? group_of<kN>(sum, group)
                          : load_shared<float4>(shared + own * step + (source - (source > rank)) * source_bytes));
      output.store(group, total);
    }
    ++own;
  }
}

}  // namespace codegemm::cuda
