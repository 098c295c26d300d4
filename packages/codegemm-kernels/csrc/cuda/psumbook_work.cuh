// What a block of psumbook.cuh works through, chunk by chunk, and where it keeps it.
#pragma once
#include "product.h"
#include "psumbook_table.cuh"
#include "ring.cuh"

namespace codegemm::cuda {

constexpr int kConsumerWarps = 16;
constexpr int kPsumbookThreads = (kConsumerWarps + kProducerWarps) * 32;

constexpr int kWarpRows = 32;
constexpr int kStageRows = kConsumerWarps * kWarpRows;
constexpr int kStageCodes = 8 * kStageRows * 4;  // bytes: the words of a slot, each a run of rows; scales come after

// A block's share of a launch: rows of the launch, slots of K and how many of these are a chunk.
struct Share {
  int64_t first, last;
  int first_slot, last_slot, chunk;
};

// The rows of a launch in ranges of rows_per_range, one a cluster: each segment's divided by itself, or all of them as
// one.
struct Ranges {
  int parts;                    // segments, or 1
  int first[kMaxSegments + 1];  // range of each; their number

  __device__ __forceinline__ void find(const Product& p, int range, Share& share) const {
    share.first = int64_t(range) * p.rows_per_range;
    int64_t end = p.total_rows;
    if (parts > 1) {
      int s = 0;
      while (s + 1 < parts && range >= first[s + 1]) ++s;
      share.first = p.segment[s].first_row + int64_t(range - first[s]) * p.rows_per_range;
      end = p.segment[s].first_row + p.segment[s].out_features;
    }
    share.last = min(share.first + p.rows_per_range, end);
  }
};

inline Ranges make_ranges(const Product& p, bool apart) {
  Ranges ranges = {apart ? p.segments : 1, {}};
  for (int s = 0; s < ranges.parts; ++s) {
    const int64_t rows = apart ? p.segment[s].out_features : p.total_rows;
    ranges.first[s + 1] = ranges.first[s] + int((rows + p.rows_per_range - 1) / p.rows_per_range);
  }
  return ranges;
}

// Sets rows_per_range, and says whether segments are divided by themselves. A range with rows of two segments fills its
// tables twice, which takes as long as 500 to 600 more rows (q|k|v of 4096 inputs 1.1 us, of 8192 1.9): without such
// ranges the others may be longer by that.
inline bool divide_rows(Product& p, int clusters, int most_rows) {
  const int64_t step = 32 * clusters, even = (p.total_rows + step - 1) / step * 32;
  for (int64_t rows = even; p.segments > 1 && rows < even + 512 && rows <= most_rows; rows += 32) {
    p.rows_per_range = int(rows);
    if (make_ranges(p, true).first[p.segments] <= clusters) return true;
  }
  p.rows_per_range = even < most_rows ? int(even) : most_rows;
  return false;
}

// A chunk of a share, for the rows that lie in one segment; next() goes on to the one after it.
struct Step {
  int segment = -1, slot = 0;
  int from = 0, rows = 0;  // rows of the segment
  int offset = 0;          // of the first of them in the sums

  __device__ __forceinline__ int slots(const Share& share) const { return min(share.chunk, share.last_slot - slot); }

  __device__ __forceinline__ bool next(const Product& p, const Share& share) {
    slot += share.chunk;
    if (segment >= 0 && slot < share.last_slot) return true;
    slot = share.first_slot;
    while (++segment < p.segments) {
      const Segment& s = p.segment[segment];
      const int64_t begin = max(share.first, s.first_row), end = min(share.last, s.first_row + s.out_features);
      if (begin >= end) continue;
      from = int(begin - s.first_row);
      rows = int(end - begin);
      offset = int(begin - share.first);
      return true;
    }
    return false;
  }
};

// A slot: one codebook of the 32 positions of a block.
struct Slot {
  int block, codebook;

  __device__ __forceinline__ Slot(const Product& p, int slot) {
    block = slot / p.codebooks;
    codebook = slot - block * p.num_codebooks;
  }
  __device__ __forceinline__ void advance(const Product& p) {
    const bool last = ++codebook == p.num_codebooks;
    block += last;
    codebook = last ? 0 : codebook;
  }
};

// The producer warps' view of a chunk: where the runs of each slot start, for its first row. Slots in pairs of kShare
// have the same positions and scales, which come with the first of them.
template <typename T, int kSlots, int kShare>
struct Runs {
  const unsigned char *codes[kSlots], *scales[kSlots / kShare], *last_scales;
  int slots, words[kSlots], present[kSlots / kShare];
  int64_t pitch;  // between runs, in words and elements

  __device__ __forceinline__ void find(const Product& p, const Share& share, const Step& step, int stage_groups) {
    const Segment& segment = p.segment[step.segment];
    const T* first_scale = static_cast<const T*>(segment.scales) + step.from;
    const int groups = p.words / p.words_per_group;
    pitch = segment.out_features;
    slots = step.slots(share);
    last_scales = reinterpret_cast<const unsigned char*>(first_scale + (groups - 1) * pitch);
    Slot slot(p, step.slot);
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int word = slot.block * 8;
      words[s] = min(8, p.words - word);
      codes[s] = reinterpret_cast<const unsigned char*>(segment.codes +
                                                        (int64_t(slot.codebook) * p.words + word) * pitch + step.from);
      if (s % kShare == 0) {
        const int group = word / p.words_per_group;
        present[s / kShare] = min(stage_groups, groups - group);
        scales[s / kShare] = reinterpret_cast<const unsigned char*>(first_scale + group * pitch);
      }
      slot.advance(p);
    }
  }

  // Fills a stage with rows row .. row + count - 1 of slot s. Scales that a last block lacks are the last ones again:
  // what they multiply is 0.
  __device__ __forceinline__ void fill(const Ring& ring, const RingPlace& at, unsigned char* stage, int s, int row,
                                       int count, int stage_groups, int producer, int lane) const {
    const bool scaled = s % kShare == 0;
    const int there = present[s / kShare];
    begin_fill(ring, at, count * (4 * words[s] + (scaled ? 2 * stage_groups : 0)), producer, lane);
    copy_runs(ring, at, stage, kStageRows * 4, codes[s] + row * 4, pitch * 4, words[s], count * 4, producer);
    if (scaled) {
      unsigned char* place = stage + kStageCodes;
      copy_runs(ring, at, place, kStageRows * 2, scales[s / kShare] + row * 2, pitch * 2, there, count * 2, producer);
      if (there < stage_groups)
        copy_runs(ring, at, place + there * kStageRows * 2, kStageRows * 2, last_scales + row * 2, 0,
                  stage_groups - there, count * 2, producer);
    }
    end_fill();
  }
};

// Where things lie in dynamic shared memory: the tables, the ring, the sums, those received.
struct PsumbookLayout {
  int chunk, stages, stage_bytes, stage_groups;
  int ring, sums, received, bytes;  // offsets; the whole
  int share_rows;                   // rows of a range that each block of the cluster stores
  Shares units;                     // slots that share a scale stay in one block
  Ranges ranges;
};

// Scale groups that a stage has room for, those of the 8 words of a block; 0 where blocks differ in how they begin.
inline int stage_groups(const Product& p) {
  const int words = int(p.words_per_group.value);
  if (words % 8 == 0 || words == p.words) return 1;
  return 8 % words == 0 ? 8 / words : 0;
}

// Sums that arrive have a place of their own, or, with `late`, that of the tables once all blocks are done with them.
inline PsumbookLayout make_psumbook_layout(const Product& p, int share, int cluster, int chunk, int stages, bool late) {
  const int units = (p.words + 7) / 8 * p.num_codebooks / share;
  PsumbookLayout layout;
  layout.units = {units / cluster, units % cluster};
  layout.share_rows = (p.rows_per_range + 4 * cluster - 1) / (4 * cluster) * 4;
  layout.ranges = make_ranges(p, false);
  layout.chunk = chunk;
  layout.stages = stages;
  layout.stage_groups = stage_groups(p);
  layout.stage_bytes = kStageCodes + layout.stage_groups * kStageRows * 2;
  layout.ring = chunk * kSlotBytes;
  layout.sums = layout.ring + stages * layout.stage_bytes;
  const int own = layout.sums, sent = own + p.tokens * p.rows_per_range * 4;  // a block alone sends nothing
  layout.received = cluster == 1 ? own : late ? 0 : sent;
  layout.bytes = sent + (cluster == 1 || late ? 0 : p.tokens * cluster * layout.share_rows * 4);
  return layout;
}

}  // namespace codegemm::cuda
