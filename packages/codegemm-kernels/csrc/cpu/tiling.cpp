#include "cpu/tiling.h"

#include <sys/mman.h>

#include "cpu/pool.h"

namespace codegemm::cpu {
namespace {

// A product walks through megabytes of codes once, and a miss in the translation buffer every 4 KB costs it more than
// the lookups there. So the kernel is asked for pages of 2 MB, before the memory is touched; it may decline.
void ask_for_huge_pages(const void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t first = reinterpret_cast<uintptr_t>(memory) & ~(kHuge - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + uintptr_t(bytes) + kHuge - 1) & ~(kHuge - 1);
  if (bytes >= int64_t(kHuge) / 8) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

void tile(const Weight& stored, uint8_t* tiled, int threads) {
  const Tiling tiling(stored);
  ask_for_huge_pages(tiled, tiling.offset(tiling.segments() - 1, 0) + stored.out_features * kTileLookups);
  parallel_for(tiling.segments(), threads, [&](int64_t segment) {
    for (int64_t block = 0; block < tiling.blocks(); ++block) {
      tile_block(stored, tiling, segment, block, tiled + tiling.offset(segment, block));
    }
  });
}

void untile(const Weight& tiled, uint32_t* stored, int threads) {
  const Tiling tiling(tiled);
  const int m = tiled.num_codebooks;
  const int64_t N = tiled.out_features, plane = tiled.in_features / tiled.vector_length * N;
  parallel_for(tiling.segments(), threads, [&](int64_t segment) {
    for (int64_t block = 0; block < tiling.blocks(); ++block) {
      const uint8_t* tile = reinterpret_cast<const uint8_t*>(tiled.codes) + tiling.offset(segment, block);
      for (int lookup = 0; lookup < tiling.lookups(segment); ++lookup) {
        // Segments may end inside a word, so bytes are written and not words.
        const int64_t position = tiling.first_position(segment) + lookup / m;
        uint8_t* byte = reinterpret_cast<uint8_t*>(stored) + lookup % m * plane + position / 4 * 4 * N +
                        block * kTileRows * 4 + position % 4;
        for (int r = 0; r < tiling.rows(block); ++r) byte[4 * r] = *tile++;
      }
    }
  });
}

}  // namespace codegemm::cpu
