// The psumbook product: tables of the dot products of an input vector with all 256 codebook entries, then one lookup a
// code. How it is cut up is in psumbook.cpp; here is what a processor has to bring.
#pragma once
#include <cstdint>

#include "codegemm.h"

namespace codegemm::cpu {

constexpr int kChunkRows = 64;  // sums are kept for whole chunks
constexpr int kMaxBlockRows =
    1024;                      // rows of W handled together, so that a table serves many lookups once it is loaded
constexpr int kMaxTokens = 4;  // rows of x handled together: with kMaxBlockRows their sums fill half of the L1 cache

// How to read the tables of a segment where they hold integers; see psumbook_avx512.cpp.
struct TableUnit {
  float unit;
  int planes;
};

// A segment is a run of words within one scale group.
struct SegmentTables {
  const float* codebooks;  // in fp32, [m, v, 256], entries in the kernel's order
  const float* x;          // the inputs of the segment, 4·words·v of them
  int num_codebooks;
  int vector_length;
  int words;
  DType dtype;      // of the call, for the precision of the tables
  uint8_t* tables;  // out: one for each lookup of a row, [words, m, 4]
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
  int tokens;             // up to kMaxTokens
  const uint8_t* tables;  // of the first token
  int64_t table_stride;   // bytes from token to token
  const TableUnit* units;
  int64_t unit_stride;
  const void* scales;  // of the first row
  DType dtype;
  float* sums;  // of the first row, readable and writable up to a multiple of kChunkRows rows
  int64_t sum_stride;
};

// The inner loops for a processor.
struct PsumbookKernel {
  void (*build_tables)(const SegmentTables& job);
  void (*add_lookups)(const SegmentLookups& job);
  // y[0 .. rows) = sums + bias, rounded; bias may be null, sums is readable up to a multiple of kChunkRows rows.
  void (*write_outputs)(const float* sums, const void* bias, void* y, DType dtype, int64_t rows);
  int (*place)(int entry);  // where build_tables wants an entry of a codebook
  int table_bytes;          // room for a table
  int max_lookups;          // lookups of a row in a segment
};

namespace portable {
extern const PsumbookKernel kPsumbook;
}

namespace avx512 {
extern const PsumbookKernel kPsumbook;
}

void gemm_by_psumbook(const Gemm& call, const PsumbookKernel& kernel, int threads);

}  // namespace codegemm::cpu
