// The psumbook product: tables of the dot products of an input vector with all 256 codebook entries, then one lookup a
// code. How a product is cut up is in psumbook.cpp; here is what an instruction set has to bring.
#pragma once
#include <cstdint>
#include <memory>

#include "codegemm.h"
#include "cpu/pool.h"
#include "cpu/tiling.h"

namespace codegemm::cpu {

// The tables of one token and segment. Integer tables share a unit. Where few inputs are far larger than the rest, the
// rest would have too few steps of it: then a second pass over the same codes has tables for the others.
struct Tables {
  uint8_t* memory;  // of both passes, [2, lookups, table_bytes]
  float units[2];   // NaN if an entry is not finite
  int passes;       // 1 or 2
};

struct BuildTables {
  const Weight* weight;
  const void* prepared;  // codebooks, see PsumbookKernel
  const void* x;         // inputs of the segment, positions · v of them in the weight's dtype
  int positions;
};

// Adds one tile's part of y for one token: sums[row] += scale[row] · unit · (sum of the row's lookups).
struct LookUp {
  const uint8_t* codes;  // [lookups, rows]
  const uint8_t* tables;
  float unit;
  int lookups;
  int rows;            // up to kTileRows
  const void* scales;  // of the first row
  DType dtype;
  float* sums;  // readable and writable up to kTileRows rows
};

// The inner loops for an instruction set.
struct PsumbookKernel {
  void (*prepare)(const Weight& weight,
                  void* prepared);  // the codebooks as build wants them, up to 16 + m · v · 384 floats
  void (*build)(const BuildTables& job, Tables* tables);
  void (*look_up)(const LookUp& job);
  // y[0 .. rows) = parts summed in order + bias, rounded; part p starts at sums + p · stride; bias may be null.
  void (*write)(const float* sums, int parts, int64_t stride, const void* bias, void* y, DType dtype, int64_t rows);
  void (*tile)(const Weight& weight, const Tiling& tiling, int64_t segment, int64_t block, uint8_t* tile);
  int table_bytes;  // room for a table
  int max_rows;     // rows of x up to which this beats torch's product with dequantised weights
};

const PsumbookKernel& psumbook_kernel();  // for this processor

// Products of as many rows each, cut into tasks: what gemm_by_psumbook runs, and what a recorded step keeps.
class Products : public Phases {
 public:
  virtual int64_t prepared_floats() const = 0;  // of memory that the prepared codebooks take
  virtual int64_t sums_floats() const = 0;      // that a run takes
  // Prepares the codebooks for the runs that follow, which use both, aligned to a cache line.
  virtual void prepare(float* prepared, float* sums) = 0;
};

std::unique_ptr<Products> psumbook_products(const Gemm* calls, int count, int threads);
void gemm_by_psumbook(const Gemm* calls, int count, int threads);

namespace portable {
extern const PsumbookKernel kPsumbook;
}
namespace avx2 {
extern const PsumbookKernel kPsumbook;
}
namespace avx512 {
extern const PsumbookKernel kPsumbook;
}
namespace neon {
extern const PsumbookKernel kPsumbook;
}
namespace vbmi {
extern const PsumbookKernel kPsumbook;
}

}  // namespace codegemm::cpu
