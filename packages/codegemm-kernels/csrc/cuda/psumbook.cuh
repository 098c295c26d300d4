// One token: y = x Wᵀ through psumbooks (CodeGEMM, NeurIPS 2025, section 3), tables of all 256 partial sums that a
// code can stand for at one vector position: table[position][e] = dot(codebook[e], x[position]). A weight then costs
// no arithmetic of its own, only one lookup a code.
//
// The table has one position a bank. Entry e of the 32 positions of a block is the 128 bytes at 128 e, position p at
// bank p, and a warp's lookup always touches 32 different positions: lane l holds word w = l%8 (positions 4w .. 4w+3)
// of rows 4q .. 4q+3, q = l/8, and in step r uses byte (r+q)%4. So no lookup ever has a bank conflict whatever the
// codes are, and nothing is replicated. The address of a lookup, table + 128 code + 4 position, is one dp4a.
//
// A slot is one codebook of one block of 32 positions. Tables are fp32 and filled by the tensor cores (exact products
// of 16-bit numbers, fp32 sums), so the result differs from exact arithmetic by fp32 rounding and the rounding of y.
//
// Codes and scales arrive through a ring of stages (ring.cuh): kSlots slots x 256 or 512 rows, 16 or 32 rows for each
// of 16 warps. A row of the box is 4 words longer than that, so that the 16-byte reads of a quarter warp, 8 words of
// the same rows, are free of conflicts too.
//
// A cluster computes rows_per_range rows; its blocks divide K, each keeps its sums in shared memory, and at the end
// they add each other's through distributed shared memory, in the order of their ranks: bit-equal between runs.
//
// Cost of 32 lookups: 1 IDP.4A, 1 LDS, 1 FADD or FFMA, and a sixteenth of: an LDS.128 of codes, one of scales, 4 FCVT.
#pragma once
#include "cuda/ptx.cuh"
#include "element.cuh"
#include "product.h"
#include "ring.cuh"

namespace codegemm::cuda {

constexpr int kSlotBytes = 256 * 128;
constexpr int kConsumerWarps = 16;
constexpr int kPsumbookThreads = (kConsumerWarps + kProducerWarps) * 32;

// 2 tables at a time and 2 quads of 4 rows a lane: the best or within 2 % of it at all shapes of docs/log.md; 4 tables
// leave the ring two stages, 1 quad halves the rows that a barrier and a reduction are paid for.
constexpr int kSlots = 2;
constexpr int kQuads = 2;
constexpr int kStageRows = kConsumerWarps * 16 * kQuads;  // a warp has 4 lanes side by side
constexpr int kStagePitch = kStageRows + 4;               // words between rows of its box

// x of the 32 positions of a block as B operands of the table's matrix product, four tiles of 8 positions. Read past
// the first-level cache: x may be younger than this kernel (wait_for_previous_kernel).
template <typename T, int V>
struct PositionFragments {
  static constexpr int kRegisters = V == 16 ? 2 : 1;
  uint32_t word[4][kRegisters];

  __device__ __forceinline__ void load(const T* x, int block, int positions, int lane) {
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
      for (int r = 0; r < kRegisters; ++r) {
        const int position = block * 32 + tile * 8 + lane / 4, element = r * 8 + (lane % 4) * 2;
        const bool inside = position < positions && element < V;
        word[tile][r] = inside ? load_fresh(x + position * V + element) : 0;
      }
    }
  }
};

// Entries 16 * entry_tile .. +15 of a codebook as the A operand.
template <typename T, int V>
struct EntryFragment {
  uint32_t word[4] = {};  // rows g and g+8, elements 2c, 2c+1 and from there 8 further on

  __device__ __forceinline__ void load(const T* codebook, int entry_tile, int lane) {
    const int g = lane / 4, c = lane % 4;
#pragma unroll
    for (int i = 0; i < (V == 16 ? 4 : 2); ++i) {
      const T* source = codebook + (entry_tile * 16 + g + i % 2 * 8) * V + c * 2 + i / 2 * 8;
      word[i] = V > 4 || c < 2 ? *reinterpret_cast<const uint32_t*>(source) : 0;
    }
  }
};

// Fills entries 16 * entry_tile .. +15 of one slot: products of 16 entries and 32 positions. Lane 4g + c receives
// positions 2c, 2c+1 of each tile of 8, for entries g and g+8. Lanes of equal c have the same banks, so they store
// their tiles in rotated order, which uses all of them.
template <typename T, int V>
__device__ __forceinline__ void fill_table(unsigned char* slot, const PositionFragments<T, V>& positions,
                                           const EntryFragment<T, V>& entries, int entry_tile, int lane) {
  const int g = lane / 4, c = lane % 4;
  float sum[4][4] = {};
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) {
    if constexpr (V == 16)
      mma_k16<T>(sum[tile], entries.word, positions.word[tile][0], positions.word[tile][1]);
    else
      mma_k8<T>(sum[tile], entries.word[0], entries.word[1], positions.word[tile][0]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // sum[s] becomes the tile (s + g) % 4
    const float a0 = sum[0][i], a1 = sum[1][i], a2 = sum[2][i], a3 = sum[3][i];
    const float b0 = g & 1 ? a1 : a0, b1 = g & 1 ? a2 : a1, b2 = g & 1 ? a3 : a2, b3 = g & 1 ? a0 : a3;
    sum[0][i] = g & 2 ? b2 : b0;
    sum[1][i] = g & 2 ? b3 : b1;
    sum[2][i] = g & 2 ? b0 : b2;
    sum[3][i] = g & 2 ? b1 : b3;
  }
  unsigned char* row = slot + (entry_tile * 16 + g) * 128 + c * 8;
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    unsigned char* place = row + ((s + g) & 3) * 32;
    *reinterpret_cast<float2*>(place) = make_float2(sum[s][0], sum[s][1]);
    *reinterpret_cast<float2*>(place + 8 * 128) = make_float2(sum[s][2], sum[s][3]);
  }
}

// How a lane looks up the four codes of a word: the byte it uses in each step, and the address of entry 0 of that
// byte's position in the first slot.
struct Lookup {
  uint32_t selector[4], position[4];

  __device__ __forceinline__ Lookup(const unsigned char* table, int lane) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint32_t byte = (r + lane / 8) % 4;
      selector[r] = row_selector(byte);
      position[r] = shared_address(table) + (lane % 8 * 4 + byte) * 4;
      keep(selector[r]);
      keep(position[r]);
    }
  }

  // The sum of the lookups of one row's word in a slot.
  __device__ __forceinline__ float sum(uint32_t word, int slot) const {
    float value[4];
#pragma unroll
    for (int r = 0; r < 4; ++r)
      value[r] = load_shared<float>(row_address(word, selector[r], position[r]) + slot * kSlotBytes);
    return (value[0] + value[1]) + (value[2] + value[3]);
  }
};

// Sums 8 rows over the eight lanes of equal lane/8; lane l returns row l%8. Row i is row i%4 of quad i/4. Of one quad
// lane l returns row l/2%4.
template <int kActive>
__device__ __forceinline__ float reduce_rows(float (&sum)[4 * kActive], int lane) {
  constexpr int kFirst = kActive == 2 ? 2 : 4;  // the lane bits that are left for the rows of a quad
  if constexpr (kActive == 2) {
    const bool upper = lane & 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float sent = upper ? sum[i] : sum[4 + i];
      sum[i] = (upper ? sum[4 + i] : sum[i]) + __shfl_xor_sync(~0u, sent, 4);
    }
  }
  const bool upper = lane & kFirst, odd = lane & (kFirst / 2);
  float low = upper ? sum[2] : sum[0], high = upper ? sum[3] : sum[1];
  low += __shfl_xor_sync(~0u, upper ? sum[0] : sum[2], kFirst);
  high += __shfl_xor_sync(~0u, upper ? sum[1] : sum[3], kFirst);
  const float row = (odd ? high : low) + __shfl_xor_sync(~0u, odd ? low : high, kFirst / 2);
  return kActive == 2 ? row : row + __shfl_xor_sync(~0u, row, 1);
}

// A chunk of up to kSlots slots: which they are, and the scale groups their words lie in.
struct Chunk {
  int slots;          // how many there are
  int block[kSlots];  // the 32 positions of each slot
  int codebook[kSlots];
  int first_group, groups;

  __device__ __forceinline__ Chunk(const Product& p, int first_slot, int last_slot) {
    slots = min(kSlots, last_slot - first_slot);
    block[0] = first_slot / p.codebooks;
    codebook[0] = first_slot - block[0] * p.num_codebooks;
#pragma unroll
    for (int s = 1; s < kSlots; ++s) {
      const bool next = codebook[s - 1] + 1 == p.num_codebooks;
      block[s] = block[s - 1] + next;
      codebook[s] = next ? 0 : codebook[s - 1] + 1;
    }
    first_group = block[0] * 8 / p.words_per_group;
    int last_block = block[0];
#pragma unroll
    for (int s = 1; s < kSlots; ++s) last_block = s < slots ? block[s] : last_block;
    groups = min(last_block * 8 + 7, p.words - 1) / p.words_per_group - first_group + 1;
  }
};

// The producer warps' view of a chunk: where the runs of each slot start, for row 0 of the segment.
template <typename T>
struct Runs {
  const unsigned char* codes[kSlots];
  int words[kSlots];
  const unsigned char* scales;
  int groups, row_bytes;
  int64_t rows;

  __device__ __forceinline__ Runs(const Product& p, const Segment& segment, const Chunk& chunk) {
    rows = segment.out_features;
    groups = chunk.groups;
    row_bytes = 2 * groups;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int word = chunk.block[s] * 8;
      words[s] = s < chunk.slots ? min(8, p.words - word) : 0;
      row_bytes += 4 * words[s];
      codes[s] =
          reinterpret_cast<const unsigned char*>(segment.codes + (int64_t(chunk.codebook[s]) * p.words + word) * rows);
    }
    scales = reinterpret_cast<const unsigned char*>(static_cast<const T*>(segment.scales) + chunk.first_group * rows);
  }

  __device__ __forceinline__ void fill(const Ring& ring, const RingPlace& at, unsigned char* stage, int64_t row,
                                       int count, int producer, int lane) const {
    begin_fill(ring, at, count * row_bytes, producer, lane);
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
      copy_runs(ring, at, stage + s * 8 * kStagePitch * 4, kStagePitch * 4, codes[s] + row * 4, rows * 4, words[s],
                count * 4, producer);
    copy_runs(ring, at, stage + kSlots * 8 * kStagePitch * 4, kStageRows * 2, scales + row * 2, rows * 2, groups,
              count * 2, producer);
    end_fill();
  }
};

// Sums of the warp's 16 * kActive rows over the slots of a stage. codes and scales: shared-memory addresses of the
// lane's first quad; scale_row[s]: how far on the scales of slot s lie.
template <typename T, int kShare, int kActive>
__device__ __forceinline__ float sum_tile(const Lookup& lookup, uint32_t codes, uint32_t scales, int slots,
                                          const int (&scale_row)[kSlots / kShare], int lane) {
  float sum[4 * kActive] = {};
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    if (s > 0 && s >= slots) break;
#pragma unroll
    for (int quad = 0; quad < kActive; ++quad) {
      const uint4 code = load_shared<uint4>(codes + s * 8 * kStagePitch * 4 + quad * 64);
      const uint2 scale = load_shared<uint2>(scales + scale_row[s / kShare] + quad * 32);
      const float2 low = unpack_pair<T>(scale.x), high = unpack_pair<T>(scale.y);
      float* row = sum + 4 * quad;
      row[0] = fmaf(low.x, lookup.sum(code.x, s), row[0]);
      row[1] = fmaf(low.y, lookup.sum(code.y, s), row[1]);
      row[2] = fmaf(high.x, lookup.sum(code.z, s), row[2]);
      row[3] = fmaf(high.y, lookup.sum(code.w, s), row[3]);
    }
  }
  return reduce_rows<kActive>(sum, lane);
}

// What a warp fills its 16 entries of each table of a chunk from: loaded while the chunk before is multiplied.
template <typename T, int V>
struct TableInputs {
  static_assert(kConsumerWarps * 16 == 256);
  PositionFragments<T, V> positions[kSlots];
  EntryFragment<T, V> entries[kSlots];

  __device__ __forceinline__ void load_positions(const Chunk& chunk, const T* x, int count, int lane) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) positions[s].load(x, chunk.block[s], count, lane);
  }
  __device__ __forceinline__ void load_entries(const Chunk& chunk, const T* codebooks, int warp, int lane) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) entries[s].load(codebooks + chunk.codebook[s] * (256 * V), warp, lane);
  }
  __device__ __forceinline__ void fill(unsigned char* table, int warp, int lane) const {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) fill_table<T, V>(table + s * kSlotBytes, positions[s], entries[s], warp, lane);
  }
};

// Adds the sums of all blocks of the cluster, in rank order, and stores this block's share of the rows.
template <typename T>
__device__ __forceinline__ void reduce_and_store(const Product& p, const float* sums, int share, int64_t first,
                                                 int64_t last) {
  const int rank = cluster_rank(), size = cluster_size();
  for (int i = threadIdx.x; i < share; i += blockDim.x) {
    const int64_t row = first + rank * share + i;
    if (row >= last) break;
    const float sum = sum_over_cluster<float>(shared_address(sums + rank * share + i), size);
    const Segment& segment = segment_of(p, row);
    const int64_t n = row - segment.first_row;
    const float bias = segment.bias ? to_float(static_cast<const T*>(segment.bias)[n]) : 0.0f;
    static_cast<T*>(segment.y)[n] = from_float<T>(sum + bias);
  }
}

// Where things lie in dynamic shared memory after the tables, which start it.
struct PsumbookLayout {
  int stages, stage_bytes;
  int ring, sums, bytes;  // offsets; the whole
  int share_rows;         // rows of a range that each block of the cluster stores
  int share;              // slots that share a scale stay in one block: a unit of `units`
  Shares units;
};

inline PsumbookLayout make_psumbook_layout(const Product& p, int share, int cluster, int stages) {
  const int units = (p.words + 7) / 8 * p.num_codebooks / share;
  PsumbookLayout layout;
  layout.share = share;
  layout.units = {units / cluster, units % cluster};
  layout.share_rows = (p.rows_per_range + cluster - 1) / cluster;
  const int groups = (8 * kSlots - 1) / int(p.words_per_group.value) + 2;  // the most the words of a chunk lie in
  layout.stages = stages;
  layout.stage_bytes = kSlots * 8 * kStagePitch * 4 + groups * kStageRows * 2;
  layout.ring = kSlots * kSlotBytes;
  layout.sums = layout.ring + stages * layout.stage_bytes;
  layout.bytes = layout.sums + p.rows_per_range * 4;
  return layout;
}

// Consumer warps: `rows` rows of a segment times this block's slots, added to sums[0 .. rows).
template <typename T, int V, int kShare>
__device__ __forceinline__ void multiply_segment(const Product& p, const Segment& segment, const PsumbookLayout& layout,
                                                 int first_slot, int last_slot, int rows, const Ring& ring,
                                                 RingPlace& at, unsigned char* shared, float* sums, int warp,
                                                 int lane) {
  const Lookup lookup(shared, lane);
  const int column = warp * 16 * kQuads + lane / 8 * 4;  // of the lane's first quad in a stage
  uint32_t lane_codes = shared_address(shared + layout.ring) + (lane % 8 * kStagePitch + column) * 4;
  uint32_t lane_scales = shared_address(shared + layout.ring) + kSlots * 8 * kStagePitch * 4 + column * 2;
  keep(lane_codes);
  keep(lane_scales);
  // The row that reduce_rows leaves in this lane; of one quad, odd lanes have a copy that they do not store.
  const int out = column + lane % 8 / 4 * 16 + lane % 4, half = warp * 16,
            half_out = half + lane / 8 * 4 + lane / 2 % 4;
  const T* codebooks = static_cast<const T*>(segment.codebooks);
  const T* x = static_cast<const T*>(p.x);
  Chunk chunk(p, first_slot, last_slot);
  TableInputs<T, V> inputs;
  inputs.load_entries(chunk, codebooks, warp, lane);
  wait_for_previous_kernel();  // codes and codebooks are weights: only x needs the wait
  inputs.load_positions(chunk, x, p.words * 4, lane);
  for (int slot = first_slot; slot < last_slot; slot += kSlots) {
    int scale_row[kSlots / kShare];
#pragma unroll
    for (int s = 0; s < kSlots; s += kShare) {
      const int word = min(chunk.block[s] * 8 + lane % 8, p.words - 1);
      scale_row[s / kShare] = (word / p.words_per_group - chunk.first_group) * kStageRows * 2;
    }
    const int slots = chunk.slots;
    consumer_sync(kConsumerWarps * 32);  // sums are there; every warp has finished with the last table
    inputs.fill(shared, warp, lane);
    consumer_sync(kConsumerWarps * 32);
    if (slot + kSlots < last_slot) {
      chunk = Chunk(p, slot + kSlots, last_slot);
      inputs.load_entries(chunk, codebooks, warp, lane);
      inputs.load_positions(chunk, x, p.words * 4, lane);
    }
    for (int row = 0; row < rows; row += kStageRows) {
      wait(ring.full(at.stage), at.phase);
      const uint32_t stage = at.stage * layout.stage_bytes;
      const int left = rows - row;
      if (left > kStageRows / 2) {
        if (warp * 32 < left) {
          const float sum =
              sum_tile<T, kShare, 2>(lookup, lane_codes + stage, lane_scales + stage, slots, scale_row, lane);
          if (out < left) sums[row + out] += sum;
        }
      } else if (half < left) {  // half a stage or less: 16 rows a warp, so that twice as many warps have some
        const float sum = sum_tile<T, kShare, 1>(lookup, lane_codes + stage - half * 4, lane_scales + stage - half * 2,
                                                 slots, scale_row, lane);
        if (lane % 2 == 0 && half_out < left) sums[row + half_out] += sum;
      }
      __syncwarp();
      if (lane == 0) arrive(ring.empty(at.stage));
      at.advance(layout.stages);
    }
  }
}

// Grid: clusters x ranges of rows. 16 consumer warps and the producers. Dynamic shared memory: the tables, kSlots x 32
// KB, and what `layout` says.
template <typename T, int V, int kShare>
__global__ void __launch_bounds__(kPsumbookThreads, 1)
    psumbook_kernel(const __grid_constant__ Product p, const __grid_constant__ PsumbookLayout layout) {
#if CODEGEMM_HAS_CLUSTERS
  CODEGEMM_DYNAMIC_SHARED(psumbook_shared);
  CODEGEMM_SHARED(RingBarriers, barriers);
  const Ring ring(barriers);
  float* sums = reinterpret_cast<float*>(psumbook_shared + layout.sums);
  uint32_t lane_id = threadIdx.x % 32;
  keep(lane_id);
  const int warp = warp_index(), lane = int(lane_id), rank = cluster_rank();
  const int64_t first = int64_t(cluster_index()) * p.rows_per_range;
  const int64_t last = min(first + p.rows_per_range, p.total_rows);
  const int first_slot = layout.units.first(rank) * kShare, last_slot = layout.units.first(rank + 1) * kShare;
  if (threadIdx.x == kConsumerWarps * 32) init_ring(ring, layout.stages, kConsumerWarps);
  __syncthreads();
  allow_next_kernel();

  RingPlace at;
  bool started = false;
  for (int s = 0; s < p.segments; ++s) {
    const Segment& segment = p.segment[s];
    const int64_t from = max(first, segment.first_row), to = min(last, segment.first_row + segment.out_features);
    if (from >= to) continue;
    const int rows = int(to - from);
    if (warp >= kConsumerWarps) {
      for (int slot = first_slot; slot < last_slot; slot += kSlots) {
        const Runs<T> runs(p, segment, Chunk(p, slot, last_slot));
        for (int row = 0; row < rows; row += kStageRows) {
          runs.fill(ring, at, psumbook_shared + layout.ring + at.stage * layout.stage_bytes,
                    from - segment.first_row + row, min(kStageRows, rows - row), warp - kConsumerWarps, lane);
          at.advance(layout.stages);
        }
      }
      continue;
    }
    if (!started)
      for (int i = threadIdx.x; i < p.rows_per_range; i += kConsumerWarps * 32) sums[i] = 0;
    started = true;
    multiply_segment<T, V, kShare>(p, segment, layout, first_slot, last_slot, rows, ring, at, psumbook_shared,
                                   sums + (from - first), warp, lane);
  }
  cluster_sync();
  reduce_and_store<T>(p, sums, layout.share_rows, first, last);
  cluster_sync_relaxed();  // no block leaves while another reads its sums
#endif
}

}  // namespace codegemm::cuda
