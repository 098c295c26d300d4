// One or two tokens: y = x Wᵀ through psumbooks (CodeGEMM, NeurIPS 2025, section 3), tables of all 256 partial sums
// that a code can stand for at one vector position: table[position][e] = dot(codebook[e], x[position]). A weight then
// costs no arithmetic of its own, only one lookup a code.
//
// The table has one position a bank. Entry e of the 32 positions of a block is the 128 bytes at 128 e, position p at
// bank p, and a warp's lookup always touches 32 different positions: lane 8w + j holds words 2w and 2w+1 (positions
// 8w .. 8w+7) of rows 4j .. 4j+3; in turn t it uses word 2w + (j/4 + t) % 2, in step r byte (j + r) % 4. So no lookup
// ever has a bank conflict whatever the codes are, and nothing is replicated. The address of a lookup, table + 128 code
// + 4 position, is one dp4a.
//
// A slot is one codebook of one block of 32 positions, kSlots of them a chunk, whose tables lie side by side. They are
// filled by the tensor cores: exact products of 16-bit numbers, fp32 sums. One token's stay fp32, so the result differs
// from exact arithmetic by fp32 rounding and the rounding of y. Those of two tokens share a word as fp16, and four of
// them are added as fp16, two tokens for the price of one: 3.7e-4 besides the rounding of y (2.1e-4), with x multiplied
// by a power of two a chunk that keeps them in range (psumbook_scale.cuh).
//
// Codes and scales arrive through a ring of stages (ring.cuh), each a slot x 512 rows, 32 rows for each of 16 warps.
//
// A cluster computes rows_per_range rows; its blocks divide K, each keeps its sums in shared memory, and at the end
// each sends the others theirs, who add them in the order of the ranks: bit-equal between runs.
//
// Cost of 32 lookups: 1 IDP.4A, 1 LDS, 1 FADD or HADD2, and a sixteenth of: an LDS.128 of codes, half a one of scales.
#pragma once
#include "cuda/cluster.cuh"
#include "psumbook_scale.cuh"
#include "psumbook_work.cuh"

namespace codegemm::cuda {

// Where a lane finds its part of a stage: shared-memory addresses of the words and scales of each turn.
template <bool kApart>
struct StagePlace {
  uint32_t code[2], scale[kApart ? 2 : 1];
};

// Adds to the lane's four rows of a tile of 32 the lookups of one slot, whose codes are in a stage; with kHalf of 16
// rows: then the lanes of two words share four rows. The scales are in the stage if it has them, else kept in `scale`.
template <typename T, int kTokens, bool kApart, bool kHalf>
__device__ __forceinline__ void add_slot(const Lookup& lookup, const StagePlace<kApart>& place, uint32_t stage, int s,
                                         bool scaled, int half_shift, uint2 (&scale)[kApart ? 2 : 1],
                                         float (&sum)[kTokens][4]) {
  constexpr int kTurns = kHalf ? 1 : 2;
  float part[2][kTokens][4];
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const uint4 code = load_shared<uint4>(place.code[turn] + stage + (kHalf ? half_shift * 4 : 0));
    lookup.add_up<kTokens>(code.x, turn, s, part[turn], 0);
    lookup.add_up<kTokens>(code.y, turn, s, part[turn], 1);
    lookup.add_up<kTokens>(code.z, turn, s, part[turn], 2);
    lookup.add_up<kTokens>(code.w, turn, s, part[turn], 3);
  }
  if constexpr (!kApart && !kHalf) {
#pragma unroll
    for (int i = 0; i < 4 * kTokens; ++i) part[0][i / 4][i % 4] += part[1][i / 4][i % 4];
  }
#pragma unroll
  for (int turn = 0; turn < (kApart ? kTurns : 1); ++turn) {
    if (scaled) scale[turn] = load_shared<uint2>(place.scale[turn] + stage + (kHalf ? half_shift * 2 : 0));
    const float2 low = unpack_pair<T>(scale[turn].x), high = unpack_pair<T>(scale[turn].y);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      sum[t][0] = fmaf(low.x, part[turn][t][0], sum[t][0]);
      sum[t][1] = fmaf(low.y, part[turn][t][1], sum[t][1]);
      sum[t][2] = fmaf(high.x, part[turn][t][2], sum[t][2]);
      sum[t][3] = fmaf(high.y, part[turn][t][3], sum[t][3]);
    }
  }
}

// What a warp fills its 16 entries of each table of a chunk from: loaded while the chunk before is multiplied.
template <typename T, int V, int kTokens, int kSlots, int kShare>
struct TableInputs {
  static_assert(kConsumerWarps * 16 == 256);
  Step step;
  bool more = true;
  PositionFragments<T, V> positions[kSlots / kShare][kTokens];
  EntryFragment<T, V> entries[kSlots];
  uint32_t largest;  // magnitude of an entry, as bits: for two tokens

  __device__ __forceinline__ void load_entries(const Product& p, const Share& share, int warp, uint32_t lane) {
    const T* codebooks = static_cast<const T*>(p.segment[step.segment].codebooks);
    const int slots = step.slots(share);
    Slot slot(p, step.slot);
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (s >= slots) break;
      entries[s].load(codebooks + slot.codebook * (256 * V), warp, lane);
      slot.advance(p);
    }
  }
  __device__ __forceinline__ void load_positions(const Product& p, const Share& share, uint32_t lane) {
    const int slots = step.slots(share);
    Slot slot(p, step.slot);
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (s >= slots) break;
#pragma unroll
      for (int t = 0; t < kTokens; ++t)
        if (s % kShare == 0)
          positions[s / kShare][t].load(static_cast<const T*>(p.x) + t * p.x_row_stride, slot.block, p.words * 4 * V,
                                        lane);
      slot.advance(p);
    }
  }
  // Scales x of a chunk for fp16 tables; returns what that of a token takes back. Every warp comes to the same.
  __device__ __forceinline__ float scale(int slots, int t) {
    uint32_t seen = 0;
#pragma unroll
    for (int i = 0; i < kSlots / kShare; ++i)
      if (i * kShare < slots) seen = positions[i][t].largest(seen);
    const int exponent = scale_exponent<T, V>(largest_of_warp(seen), largest);
    const uint32_t factor = doubled<T>(power_of_two(exponent));
#pragma unroll
    for (int i = 0; i < kSlots / kShare; ++i) positions[i][t].multiply(factor);
    return power_of_two(-exponent);
  }
  __device__ __forceinline__ void fill(unsigned char* tables, int slots, int warp, uint32_t lane) const {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (s >= slots) break;
      fill_table<T, V, kTokens>(tables + s * kSlotBytes, positions[s / kShare], entries[s], warp, lane);
    }
  }
  __device__ __forceinline__ void advance(const Product& p, const Share& share, int warp, uint32_t lane) {
    const int segment = step.segment;
    more = step.next(p, share);
    if (!more) return;
    if (p.num_codebooks > 2 || segment != step.segment) load_entries(p, share, warp, lane);
    load_positions(p, share, lane);
  }
};

// Sends every block of the cluster the sums of the rows that it stores: sums[token][row], a token `pitch` apart, to
// received[rank][token][row], a token `share` apart.
template <int kTokens>
__device__ __forceinline__ void send_sums(const float* sums, int pitch, float* received, uint32_t barrier, int share,
                                          int rows, int warp, uint32_t lane) {
  const uint32_t mine = shared_address(received + cluster_rank() * (kTokens * share));
  for (int target = warp; target < cluster_size(); target += kConsumerWarps) {
    const int first = target * share, count = min(share, rows - first);
    const uint32_t there = address_in_rank(mine, target), arrival = address_in_rank(barrier, target);
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
      for (int i = int(lane * 4); i < count; i += 128)
        send_async(there + (t * share + i) * 4, *reinterpret_cast<const float4*>(sums + t * pitch + first + i),
                   arrival);
  }
}

// Adds what the blocks of the cluster sent, in rank order, and stores this block's share of the rows.
template <typename T, int kTokens>
__device__ __forceinline__ void add_and_store(const Product& p, const float* received, uint32_t barrier, int share,
                                              int64_t first, int64_t last) {
  const int size = cluster_size();
  for (int i = threadIdx.x; i < share; i += blockDim.x) {
    const int64_t row = first + cluster_rank() * share + i;
    if (row >= last) break;
    const Segment& segment = segment_of(p, row);
    const int64_t n = row - segment.first_row;
    const float bias = segment.bias ? to_float(static_cast<const T*>(segment.bias)[n]) : 0.0f;
    T* y = static_cast<T*>(segment.y) + n;
    if (size > 1) wait_cluster(barrier, 0);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      float sum = 0;
#pragma unroll
      for (int r = 0; r < kMaxCluster; ++r)
        if (r < size) sum += received[(r * kTokens + t) * share + i];
      y[t * segment.out_features] = from_float<T>(sum + bias);
    }
  }
}

// The producer warps' part: for each chunk, 512 rows and slot a stage.
template <typename T, int kSlots, int kShare>
__device__ __forceinline__ void produce(const Product& p, const PsumbookLayout& layout, const Share& share, Step step,
                                        const Ring& ring, unsigned char* stages, int producer, int lane) {
  RingPlace at;
  do {
    Runs<T, kSlots, kShare> runs;
    runs.find(p, share, step, layout.stage_groups);
    for (int row = 0; row < step.rows; row += kStageRows) {
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        if (s >= runs.slots) break;
        runs.fill(ring, at, stages + at.stage * layout.stage_bytes, s, row, min(kStageRows, step.rows - row),
                  layout.stage_groups, producer, lane);
        at.advance(layout.stages);
      }
    }
  } while (step.next(p, share));
}

// The consumer warps' part: sums of all rows of the share over its slots. `inputs` is at the first chunk.
template <typename T, int V, int kTokens, int kSlots, int kShare, bool kApart>
__device__ __forceinline__ void consume(const Product& p, const PsumbookLayout& layout, const Share& share,
                                        TableInputs<T, V, kTokens, kSlots, kShare>& inputs, const Ring& ring,
                                        unsigned char* shared, int warp, uint32_t lane) {
  const Lookup lookup(shared, lane);
  const uint32_t w = lane / 8, j = lane % 8, stages = shared_address(shared + layout.ring);
  const int column = warp * kWarpRows + int(j * 4), half_column = warp * 16 + int(j % 4 * 4);
  StagePlace<kApart> place;
#pragma unroll
  for (int turn = 0; turn < 2; ++turn) {
    const uint32_t word = 2 * w + (j / 4 + turn) % 2;
    place.code[turn] = stages + (word * kStageRows + column) * 4;
    keep(place.code[turn]);
    if (turn == 0 || kApart) {
      place.scale[turn] = stages + kStageCodes + (word * layout.stage_groups / 8 * kStageRows + column) * 2;
      keep(place.scale[turn]);
    }
  }
  float* sums = reinterpret_cast<float*>(shared + layout.sums) + w;
  RingPlace at;
  for (bool begun = false; inputs.more; begun = true) {
    const Step step = inputs.step;
    const int slots = step.slots(share);
    const bool first = step.slot == share.first_slot;
    float unscale[kTokens];
    if constexpr (kTokens > 1) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) unscale[t] = inputs.scale(slots, t);
    }
    if (begun) consumer_sync(kConsumerWarps * 32);  // every warp has finished with the last tables
    inputs.fill(shared, slots, warp, lane);
    consumer_sync(kConsumerWarps * 32);
    for (int row = 0; row < step.rows; row += kStageRows) {
      const int left = step.rows - row;
      const bool half = left <= kStageRows / 2;  // 16 rows a warp, so that twice as many warps have some
      const bool active = warp * (half ? 16 : kWarpRows) < left;
      float sum[kTokens][4] = {};
      uint2 scale[kApart ? 2 : 1];
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        if (s >= slots) break;
        wait(ring.full(at.stage), at.phase);
        const uint32_t stage = at.stage * layout.stage_bytes;
        if (active) {
          if (half)
            add_slot<T, kTokens, kApart, true>(lookup, place, stage, s, s % kShare == 0, half_column - column, scale,
                                               sum);
          else
            add_slot<T, kTokens, kApart, false>(lookup, place, stage, s, s % kShare == 0, 0, scale, sum);
        }
        __syncwarp();
        if (lane == 0) arrive(ring.empty(at.stage));
        at.advance(layout.stages);
      }
      if (active) {
        const int out = half ? half_column : column;
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          float value = reduce_rows(sum[t], lane);
          if (half) value += __shfl_xor_sync(~0u, value, 4);
          if constexpr (kTokens > 1) value *= unscale[t];
          float* target = sums + t * p.rows_per_range + step.offset + row + out;
          if (out + int(w) < left && !(half && j >= 4)) *target = first ? value : *target + value;
        }
      }
      if (row == 0) inputs.advance(p, share, warp, lane);
    }
  }
}

struct PsumbookBarriers {
  RingBarriers ring;
  uint64_t received;                 // of sums
  uint32_t largest[kConsumerWarps];  // magnitude of an entry that each warp has seen
};

// Grid: clusters x ranges of rows. 16 consumer warps and the producers. Dynamic shared memory: the tables, kSlots x 32
// KB, and what `layout` says.
template <typename T, int V, int kTokens, int kSlots, int kShare, bool kApart>
__global__ void __launch_bounds__(kPsumbookThreads, 1)
    psumbook_kernel(const __grid_constant__ Product p, const __grid_constant__ PsumbookLayout layout) {
#if CODEGEMM_HAS_CLUSTERS
  CODEGEMM_DYNAMIC_SHARED(psumbook_shared);
  CODEGEMM_SHARED(PsumbookBarriers, barriers);
  const Ring ring(barriers.ring);
  const uint32_t arrival = shared_address(&barriers.received);
  uint32_t lane = threadIdx.x % 32;
  keep(lane);
  const int warp = warp_index(), rank = cluster_rank();
  if (threadIdx.x == kPsumbookThreads - 32) {
    init_ring(ring, layout.stages, kConsumerWarps);
    init_barrier(arrival, 1);
    fence_barriers();
  }
  Share share;
  layout.ranges.find(p, cluster_index(), share);
  share.first_slot = layout.units.first(rank) * kShare;
  share.last_slot = layout.units.first(rank + 1) * kShare;
  share.chunk = layout.chunk;
  Step step;
  step.next(p, share);

  if (warp >= kConsumerWarps) {
    __syncthreads();
    cluster_arrive();
    allow_next_kernel();
    produce<T, kSlots, kShare>(p, layout, share, step, ring, psumbook_shared + layout.ring, warp - kConsumerWarps,
                               int(lane));
  } else {
    TableInputs<T, V, kTokens, kSlots, kShare> inputs;
    inputs.step = step;
    inputs.load_entries(p, share, warp, lane);
    if constexpr (kTokens > 1) {
      const uint32_t largest = largest_of_warp(largest_entry<V>(p));
      if (lane == 0) barriers.largest[warp] = largest;
    }
    __syncthreads();
    cluster_arrive();
    allow_next_kernel();
    wait_for_previous_kernel();  // codes and codebooks are weights: only x needs the wait
    inputs.load_positions(p, share, lane);
    if constexpr (kTokens > 1) inputs.largest = largest_in_warp(barriers.largest[lane % kConsumerWarps]);
    consume<T, V, kTokens, kSlots, kShare, kApart>(p, layout, share, inputs, ring, psumbook_shared, warp, lane);
  }
  const int range_rows = int(share.last - share.first);
  const float* sums = reinterpret_cast<const float*>(psumbook_shared + layout.sums);
  float* received = reinterpret_cast<float*>(psumbook_shared + layout.received);
  if (threadIdx.x == kPsumbookThreads - 32)
    expect_bytes(arrival, max(0, min(layout.share_rows, range_rows - rank * layout.share_rows)) *
                              (cluster_size() * kTokens * 4));
  __syncthreads();
  if (cluster_size() > 1) {  // st.async in a launch without clusters is an illegal instruction
    cluster_wait();          // all blocks have begun: their barriers are there
    if (layout.received == 0) {
      cluster_arrive();
      cluster_wait();  // and, now, nobody needs the tables
    }
    if (warp < kConsumerWarps)
      send_sums<kTokens>(sums, p.rows_per_range, received, arrival, layout.share_rows, range_rows, warp, lane);
  }
  add_and_store<T, kTokens>(p, received, arrival, layout.share_rows, share.first, share.last);
#endif
}

}  // namespace codegemm::cuda
