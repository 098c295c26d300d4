#include "cpu/tiling.h"

#include "cpu/pool.h"

namespace codegemm::cpu {

void tile(const Weight& stored, uint8_t* tiled, int threads) {
  const Tiling tiling(stored);
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
