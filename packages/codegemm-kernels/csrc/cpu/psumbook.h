// The psumbook product: tables of the dot products of an input vector with all 256 codebook entries, then one byte
// lookup a code. Tables hold integers of 7-bit digits, one byte plane a digit, so that a byte shuffle looks up 64 codes
// at once and two digits add up within a byte. Two planes (14 bits) serve fp16 and bf16, three (21 bits) fp32 and any
// segment where one input stands out so far that 14 bits would leave the others too few.
#pragma once
#include <cstdint>

#include "codegemm.h"

namespace codegemm::cpu {

constexpr int kMaxPlanes = 3;
constexpr int kMaxLookups = 32;  // lookups of a row in a segment; with 7-bit digits 256 would overflow its sums
constexpr int kChunkRows = 64;   // rows a byte shuffle looks up at once
constexpr int kMaxBlockRows =
    1024;                      // rows of W handled together, so that a table serves many lookups once it is loaded
constexpr int kMaxTokens = 4;  // rows of x handled together: with kMaxBlockRows their digit sums fill half of L1
struct TableUnit {
  float unit;  // zero for inputs of zero, NaN where an entry is not finite
  int planes;
};

// A segment is a run of words within one scale group.
struct SegmentTables {
  const float* codebooks;  // in fp32, [m, v, 256], entries in table_order
  const float* x;          // the inputs of the segment, 4·words·v of them
  int num_codebooks;
  int vector_length;
  int words;
  int planes;       // at least
  uint8_t* tables;  // out: [words, m, 4, planes, 256]
  TableUnit* unit;  // out
};

// Adds a segment's part of y for a block of rows and some tokens.
struct SegmentLookups {
  const uint32_t* codes;  // word of the first row in codebook 0
  int64_t word_stride;    // words from one word of a row to the next: N
  int64_t plane_stride;   // words from one codebook to the next
  int num_codebooks;
  int words;
  int rows;               // up to kMaxBlockRows
  int tokens;             // rows, rounded up to kChunkRows, times tokens is up to kMaxBlockDigits
  const uint8_t* tables;  // of the first token
  int64_t table_stride;   // bytes from token to token
  const TableUnit* units;
  int64_t unit_stride;
  const void* scales;  // of the first row
  DType dtype;
  float* sums;  // of the first row, readable and writable up to a multiple of kChunkRows rows
  int64_t sum_stride;
};

// Where build_tables wants entry e of a codebook: packing 32-bit lanes to bytes interleaves within 128 bits.
inline int table_order(int e) { return (e & ~63) | (e & 12) << 2 | (e & 48) >> 2 | (e & 3); }

void gemm_by_psumbook(const Gemm& call, int threads);

namespace avx512 {
void build_tables(const SegmentTables& job);
void add_lookups(const SegmentLookups& job);
// y[0 .. rows) = sums + bias, rounded; bias may be null, sums is readable up to a multiple of kChunkRows rows.
void write_outputs(const float* sums, const void* bias, void* y, DType dtype, int64_t rows);
}  // namespace avx512

}  // namespace codegemm::cpu
