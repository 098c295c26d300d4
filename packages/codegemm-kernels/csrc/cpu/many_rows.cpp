// How the product for many rows of x is cut up: chunks of rows, for each of which rows of x become integers and then
// threads take columns of y.
#include "cpu/many_rows.h"

#include <algorithm>

#include "cpu/pool.h"
#include "cpu/scratch.h"

#if defined(__x86_64__)
namespace codegemm::cpu {
namespace {

class ManyRows : public Phases {
 public:
  ManyRows(const Gemm& call, Scratch& books, Scratch& integers) : call_(call), blocks_(call.weight) {
    const Weight& weight = call.weight;
    books_.bytes = books.get<uint8_t>(int64_t(weight.num_codebooks) * weight.vector_length * 512);
    vbmi::prepare_books(weight, &books_);
    const int64_t rows = blocks_.count() * std::min(call.rows, kChunkRows);
    x_.stride = std::min(call.rows, kChunkRows);
    char* memory = integers.get<char>(rows * (4 * kBlockWidth + 8) + kChunkRows);
    x_.values = reinterpret_cast<int16_t*>(memory);
    x_.rests = x_.values + rows * kBlockWidth;
    x_.units = reinterpret_cast<float*>(x_.rests + rows * kBlockWidth);
    x_.rest_units = x_.units + rows;
    x_.has_rest = reinterpret_cast<uint8_t*>(x_.rest_units + rows);
  }

  int64_t phases() const override { return 2 * ((call_.rows + kChunkRows - 1) / kChunkRows); }

  int64_t tasks(int64_t phase) const override {
    return phase % 2 == 0 ? rows(phase) : (call_.weight.out_features + kColumns - 1) / kColumns;
  }

  void run(int64_t phase, int64_t task) const override {
    const int64_t first = phase / 2 * kChunkRows;
    if (phase % 2 == 0) return vbmi::to_integers(call_, blocks_, first + task, task, x_);
    thread_local Scratch memory;
    vbmi::multiply_columns({&call_, &blocks_, &books_, &x_, first, rows(phase), task * kColumns,
                            memory.get<char>(vbmi::kManyRowsScratch)});
  }

 private:
  int64_t rows(int64_t phase) const { return std::min(kChunkRows, call_.rows - phase / 2 * kChunkRows); }

  const Gemm call_;
  const Blocks blocks_;
  IntegerBooks books_;
  IntegerRows x_;
};

}  // namespace

void gemm_many_rows(const Gemm& call, int threads) {
  thread_local Scratch books, integers;  // the caller's, for all threads
  parallel_phases(ManyRows(call, books, integers), threads);
}

}  // namespace codegemm::cpu
#endif
