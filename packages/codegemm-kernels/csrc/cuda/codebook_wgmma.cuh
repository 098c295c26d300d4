// 17 tokens and more on Hopper: y = x Wᵀ by warpgroup products (wgmma) whose A operands, 64 rows of W, are looked up
// in a shared-memory codebook (codebook_table.cuh) and whose B operand is x as it is stored.
//
// A block is 2 or 4 warpgroups of 64 rows of W each, and kN tokens; sums stay in registers. K goes by in stages of 64
// columns, whose x, codes and scales four further warps copy into slots of a ring (codebook_wgmma_work.cuh), x with the
// tensor copy engine. A slot is given back in the middle of the next stage, when the products that read it have ended
// without being waited for.
//
// Lane 4g + c of a warp has rows 2g and 2g+1 of its 16: they are rows g and g+8 of the products, so that their codes
// are neighbours. Of a k16 step it needs columns 2c, 2c+1 and 2c+8, 2c+9, each one word of an entry: lookups are of 4
// bytes, and a lane always reads bank `lane`.
//
//     v = 4   a word of codes is a step: bytes c/2 and 2 + c/2, word c%2 of their entries
//     v = 8   a word of codes is two steps: bytes 0, 1 and then 2, 3; word c of their entries
//
// Entries of two codebooks are added and multiplied by the row's scale before the product, which rounds as a dense
// weight would be rounded. Half a stage has one scale a row (fits_wgmma).
//
// What a stage of 64 columns costs 128 rows, in cycles of the tensor cores and wavefronts of shared memory (one a
// cycle):
//
//     tokens   products   x read, written   lookups, one codebook, two   codes, scales
//        256       1024         512,  256                    128,  256              48
//        128        512         256,  128                    128,  256              48
//
// so many tokens are 256 a block: 2 warpgroups, whose sums take 128 registers a thread. Two blocks share x of 256
// tokens and each brings half of it for both, which is up to 6 % faster. Such blocks stay and take one item after
// another: tables are copied once, and slots are filled while sums are stored.
//
// Where there are few rows and tokens, the blocks of a cluster divide K (codebook_wgmma_sums.cuh).
#pragma once
#include "codebook_wgmma_sums.cuh"
#include "codebook_wgmma_work.cuh"

namespace codegemm::cuda {

// How a lane looks up its words of the weights of half a stage.
template <typename T, int V, int kBooks>
struct WeightLookup {
  static constexpr int kWords = words_of_stage(V);
  uint32_t table, selector;  // of v = 4

  __device__ __forceinline__ WeightLookup(uint32_t shared, int lane)
      : table(shared + lane * 4), selector(row_selector(0) << (lane % 4 / 2 * 8)) {
    keep(table);
    keep(selector);
  }
  // Byte of a step that has columns 2c, 2c+1 (part 0) or 2c+8, 2c+9 of a lane.
  __device__ __forceinline__ uint32_t byte(int step, int part) const {
    return V == 4 ? selector << (16 * part) : row_selector(2 * step + part);
  }
  // A operand of one of the four steps of a stage.
  __device__ __forceinline__ void operand(uint32_t (&weight)[4], const uint2 (&codes)[kBooks][kWords],
                                          const uint32_t (&scales)[2], int step) const {
    const uint32_t scale[2] = {permute_bytes(scales[step / 2], 0, 0x1010), permute_bytes(scales[step / 2], 0, 0x3232)};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i % 2, part = i / 2;
      uint32_t sum = 0;
#pragma unroll
      for (int book = 0; book < kBooks; ++book) {
        const uint2 word = codes[book][V == 4 ? step : step / 2];
        const uint32_t entry =
            load_shared<uint32_t>(row_address(row ? word.y : word.x, byte(step % 2, part), table) + book * kTableBytes);
        sum = book == 0 ? entry : add_pairs<T>(sum, entry);
      }
      weight[i] = multiply_pairs<T>(sum, scale[row]);
    }
  }
};

// How a lane of the other warps gives slots back to the producers that fill them, of both blocks where they share x.
struct SlotReturn {
  uint32_t empty;  // barrier of the first slot
  uint32_t mode;   // 0: the lane does nothing; 1: arrives; 2: arrives at a block of the cluster

  __device__ __forceinline__ SlotReturn(const WgmmaShape& shape, const Ring& ring, int lane)
      : empty(ring.empty(0)), mode(lane < shape.pair ? shape.pair : 0) {
    if (mode == 2) empty = address_in_rank(empty, lane);
  }
  __device__ __forceinline__ void before(const RingPlace& at, int slots, bool there_is) const {
    arrive_if(empty + (at.stage == 0 ? slots - 1 : at.stage - 1) * 8, there_is ? mode : 0);
  }
};

// The other warps: the sums of a lane's two rows and all tokens, as product_k16 leaves them.
template <typename T, int V, int kBooks, int kN>
__device__ __forceinline__ void multiply_stages(float (&sum)[kN / 2], const WgmmaShape& shape, const WgmmaTile& tile,
                                                const Ring& ring, RingPlace& at, uint32_t shared, int row, int lane) {
  const WeightLookup<T, V, kBooks> lookup(shared, lane);
  const SlotReturn slot_return(shape, ring, lane);
  uint32_t lane_codes = shared + shape.weights + row * 4;
  uint32_t lane_scales = shared + shape.weights + kBooks * words_of_stage(V) * tile.rows * 4 + row * 2;
  keep(lane_codes);
  keep(lane_scales);
  const int next_scales = (shape.scale_runs - 1) * tile.rows * 2;
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) sum[i] = 0;
  settle(sum);
  for (int stage = tile.first_stage; stage < tile.last_stage; ++stage) {
    const uint32_t offset = at.stage * shape.slot_weights;
    const uint64_t x = tile_descriptor(shared + shape.x + at.stage * (kN * kStageRowBytes));
    wait(ring.full(at.stage), at.phase);
    uint2 codes[kBooks][words_of_stage(V)];
#pragma unroll
    for (int i = 0; i < kBooks; ++i) {
#pragma unroll
      for (int w = 0; w < words_of_stage(V); ++w)
        codes[i][w] = load_shared<uint2>(lane_codes + offset + (i * words_of_stage(V) + w) * tile.rows * 4);
    }
    const uint32_t scales[2] = {load_shared<uint32_t>(lane_scales + offset),
                                load_shared<uint32_t>(lane_scales + offset + next_scales)};
    uint32_t weight[4][4];
#pragma unroll
    for (int step = 0; step < 4; step += 2) {
      wait_products<1>();
      if (step == 2)  // the products of the stage before have ended
        slot_return.before(at, shape.slots, stage > tile.first_stage);
      lookup.operand(weight[step], codes, scales, step);
      lookup.operand(weight[step + 1], codes, scales, step + 1);
      begin_products();
      product_k16<T, kN>(sum, weight[step], x + step * 2);
      product_k16<T, kN>(sum, weight[step + 1], x + step * 2 + 2);
      commit_products();
    }
    at.advance(shape.slots);
  }
  wait_products<0>();
  settle(sum);
  slot_return.before(at, shape.slots, true);
}

// All items of the cluster: the warpgroups' part of the kernel.
template <typename T, int V, int kBooks, int kN>
__device__ __forceinline__ void multiply_items(const Product& p, const WgmmaShape& shape, const Ring& ring,
                                               uint32_t sums_barrier, unsigned char* shared, int warp, int threads) {
  const int lane = threadIdx.x % 32, row = warp * 16 + lane / 4 * 2;  // row: the lane's first in the tile
  const Segment* segment = nullptr;                                   // whose tables are there
  RingPlace at;
  for (int item = cluster_index(); item < shape.items; item += shape.clusters) {
    const WgmmaTile tile = tile_of<kN>(p, shape, item, threads / 2, cluster_rank());
    if (&tile.segment != segment) {
      if (segment) consumer_sync(threads);  // nobody looks anything up
      segment = &tile.segment;
      copy_codebooks<T, V>(shared, static_cast<const T*>(segment->codebooks), kBooks, threads);
      consumer_sync(threads);
    }
    float sum[kN / 2];
    multiply_stages<T, V, kBooks, kN>(sum, shape, tile, ring, at, shared_address(shared), row, lane);
    wait_for_previous_kernel();
    const LaneOutput<T> output(p, tile, row, lane);
    if (tile.divides) {
      cluster_sync_relaxed();  // nobody reads tables and slots any more
      add_over_cluster<T, kN>(sum, output, shape.share, shared_address(shared), sums_barrier, threads);
    } else {
#pragma unroll
      for (int group = 0; group < kN / 8; ++group) output.store(group, group_of<kN>(sum, group));
    }
  }
}

// The registers of a multiprocessor, as the block starts and after its producers have left theirs to the others.
template <int kN>
constexpr int kMostGroups = kN == 256 ? 2 : 4;
template <int kN>
__device__ __forceinline__ void take_registers_of_others() {
  if constexpr (kN == 128) take_registers<112>();  // 640 threads start with 96
  if constexpr (kN == 256) take_registers<232>();  // 384 with 168
}
template <int kN>
__device__ __forceinline__ void leave_registers_to_others() {
  if constexpr (kN == 128) leave_registers<32>();
  if constexpr (kN == 256) leave_registers<40>();
}

template <typename T, int V, int kBooks, int kN>
__global__ void __launch_bounds__(kMostGroups<kN> * 128 + kProducerThreads, 1)
    codebook_wgmma_kernel(const __grid_constant__ Product p, const __grid_constant__ WgmmaShape shape,
                          const __grid_constant__ TileMap x) {
  CODEGEMM_DYNAMIC_SHARED(wgmma_shared);
  const int warp = warp_index(), threads = blockDim.x - kProducerThreads, rows = threads / 2;
  const int first = cluster_index(), rank = cluster_rank();
  const bool divides = (shape.items - 1 - first) / shape.clusters * shape.clusters + first >= shape.whole;  // the last
  WgmmaBarriers& barriers = *reinterpret_cast<WgmmaBarriers*>(wgmma_shared + shape.barriers);
  const Ring ring(barriers.ring);
  const uint32_t sums_barrier = shared_address(&barriers.sums);
  allow_next_kernel();
  if (threadIdx.x == 0) {
    prefetch_map(x);
    init_barrier(sums_barrier, 1);
    init_ring(ring, shape.slots, shape.pair * rows / 16);
    if (divides) expect_bytes(sums_barrier, bytes_of_sums<kN>(shape.share, rank, cluster_size(), threads));
  }
  __syncthreads();
  if (shape.pair == 2) cluster_sync_relaxed();  // the other block has its barriers
  if (warp < rows / 16) {
    take_registers_of_others<kN>();
    multiply_items<T, V, kBooks, kN>(p, shape, ring, sums_barrier, wgmma_shared, warp, threads);
  } else {
    leave_registers_to_others<kN>();
    if (elect_lane())
      StageProducer<T, V, kBooks, kN>{p, shape, ring, shared_address(wgmma_shared), rank, warp - rows / 16}.run(x,
                                                                                                                rows);
    if (divides) cluster_sync_relaxed();
  }
  if (shape.pair == 2) cluster_sync_relaxed();  // no block leaves while the other sends it x
}

}  // namespace codegemm::cuda
