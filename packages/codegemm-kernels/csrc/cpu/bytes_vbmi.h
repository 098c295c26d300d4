// A table of 256 bytes in four registers, which a byte shuffle reads at 64 places at once. Internal linkage, see
// floats.h.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace codegemm::cpu {
namespace {

// Loaded once and kept in a register: GCC would load it again for every use.
inline __m512i pinned(__m512i value) {
  asm("" : "+v"(value));
  return value;
}

struct Bytes {  // no array, which GCC would keep in memory as well
  __m512i a, b, c, d;
};

inline Bytes load_bytes(const uint8_t* table) {
  return {pinned(_mm512_load_si512(table)), pinned(_mm512_load_si512(table + 64)),
          pinned(_mm512_load_si512(table + 128)), pinned(_mm512_load_si512(table + 192))};
}

// upper: the codes of 128 and more.
inline __m512i look(const Bytes& table, __m512i codes, __mmask64 upper) {
  return _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(table.a, codes, table.b),
                                _mm512_permutex2var_epi8(table.c, codes, table.d));
}

}  // namespace
}  // namespace codegemm::cpu
