// The psumbook product for 64-bit Arm: two planes of bytes a table, which `tbl` looks up 64 entries at a time.
#include "cpu/psumbook.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include "cpu/integer_tables.h"

namespace codegemm::cpu::neon {
namespace {

constexpr int kTableBytes = 512;  // low bytes, then high bytes, of entries that have kOffset added
constexpr int kOffset = 1 << 13;

void build(const BuildTables& job, Tables* tables) {
  build_integers(job, tables, kTableBytes, [](const int16_t* entries, uint8_t* table) {
    for (int e = 0; e < 256; ++e) {
      table[e] = uint8_t(entries[e] + kOffset);
      table[256 + e] = uint8_t((entries[e] + kOffset) >> 8);
    }
  });
}

// A shuffle gives zero, or leaves the lane as it was, for an index of 64 or more.
inline uint8x16_t look(const uint8_t* table, uint8x16_t codes) {
  uint8x16_t result = vqtbl4q_u8(vld1q_u8_x4(table), codes);
  for (int q = 1; q < 4; ++q) {
    result = vqtbx4q_u8(result, vld1q_u8_x4(table + 64 * q), vsubq_u8(codes, vdupq_n_u8(uint8_t(64 * q))));
  }
  return result;
}

// Adds the lookups of 16 rows.
void look_up_rows(const LookUp& job, const uint8_t* codes, int stride, float* sums) {
  uint16x8_t total[2][2] = {};  // [low or high bytes][half of the rows]
  for (int l = 0; l < job.lookups; ++l, codes += stride) {
    const uint8x16_t code = vld1q_u8(codes);
    for (int plane = 0; plane < 2; ++plane) {
      const uint8x16_t bytes = look(job.tables + l * kTableBytes + 256 * plane, code);
      total[plane][0] = vaddw_u8(total[plane][0], vget_low_u8(bytes));
      total[plane][1] = vaddw_high_u8(total[plane][1], bytes);
    }
  }
  const int32x4_t offset = vdupq_n_s32(-job.lookups * kOffset);
  for (int h = 0; h < 2; ++h) {
    const uint16x4_t low[2] = {vget_low_u16(total[0][h]), vget_high_u16(total[0][h])};
    const uint16x4_t high[2] = {vget_low_u16(total[1][h]), vget_high_u16(total[1][h])};
    for (int q = 0; q < 2; ++q) {
      const uint32x4_t sum = vaddq_u32(vmovl_u16(low[q]), vshll_n_u16(high[q], 8));
      const float32x4_t value = vcvtq_f32_s32(vaddq_s32(vreinterpretq_s32_u32(sum), offset));
      vst1q_f32(sums + 8 * h + 4 * q, vmulq_n_f32(value, job.unit));
    }
  }
}

void look_up(const LookUp& job) {
  float sums[kTileRows];
  int row = 0;
  for (; row + 16 <= job.rows; row += 16) look_up_rows(job, job.codes + row, job.rows, sums + row);
  if (row < job.rows) {  // a copy of the last rows, so that nothing is read past the end of the codes
    uint8_t codes[kTileLookups * 16] = {};
    for (int l = 0; l < job.lookups; ++l) {
      for (int r = row; r < job.rows; ++r) codes[16 * l + r - row] = job.codes[l * job.rows + r];
    }
    float last[16];
    look_up_rows(job, codes, 16, last);
    for (int r = row; r < job.rows; ++r) sums[r] = last[r - row];
  }
  with_type(job.dtype, [&](auto type) {
    const auto* scales = static_cast<const decltype(type)*>(job.scales);
    for (int r = 0; r < job.rows; ++r) job.sums[r] += sums[r] * widen(scales[r]);
  });
}

}  // namespace

const PsumbookKernel kPsumbook = {prepare, build, look_up, write, tile_block, kTableBytes, 16};

}  // namespace codegemm::cpu::neon
#endif
