// How the psumbook product is cut up. For few rows of x, K is split into parts, so that a thread builds the tables of
// its part once, keeps them in its first-level cache and reads its codes from front to back. Each part has sums of its
// own, which are added in order at the end: the result depends neither on the number of threads nor on which did what.
// For kTokens rows and more there is one part and nothing to add up: rows of x are then what threads share out. Where
// neither gives all threads work, the rows of W are split too.
#include "cpu/psumbook.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/features.h"
#include "cpu/pool.h"
#include "cpu/scratch.h"

namespace codegemm::cpu {
namespace {

constexpr int64_t kTokens = 8;          // rows of x handled together, to bound the memory for tables and sums
constexpr int64_t kTasksPerThread = 2;  // so that a thread that is held up does not hold up the rest
constexpr int kStripBlocks = 32;        // blocks that pass from token to token: 128 KB of codes stay in an L2 cache
constexpr int64_t kOutputRows = 4096;   // rows that a task of the last phase adds up

// Parts of K, the same for any number of threads, and so is the result. Each costs a pass over N sums a token; too few,
// and many threads have to split rows and build the same tables.
int64_t parts_of(int64_t rows) { return rows >= kTokens ? 1 : rows >= 4 ? 2 : rows >= 2 ? 4 : 8; }

int64_t ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Product {
 public:
  Product(const Gemm& call, const PsumbookKernel& kernel, int threads)
      : call_(call),
        kernel_(kernel),
        weight_(call.weight),
        tiling_(call.weight),
        element_(weight_.dtype == DType::kFloat32 ? 4 : 2),
        parts_(std::min(tiling_.segments(), parts_of(call.rows))),
        groups_(std::clamp(ceil(wanted(threads), parts_), ceil(call.rows, kTokens), call.rows)),
        ranges_(std::clamp<int64_t>(wanted(threads) / (parts_ * groups_), 1, 1 + tiling_.blocks() / 8)),
        padded_(tiling_.blocks() * kTileRows) {}

  int64_t prepared_floats() const { return int64_t(weight_.num_codebooks) * weight_.vector_length * 384 + 16; }
  int64_t sums_floats() const { return whole() ? 16 : parts_ * call_.rows * padded_; }

  void prepare(float* prepared, float* sums) {
    prepared_ = prepared;
    sums_ = sums;
    kernel_.prepare(weight_, prepared_);
  }

  // The first phase is lookups; the second adds up the parts, if there may be several.
  int64_t phases() const { return whole() ? 1 : 2; }

  int64_t tasks(int64_t phase) const {
    return phase == 0 ? parts_ * groups_ * ranges_ : call_.rows * ceil(weight_.out_features, kOutputRows);
  }

  void run(int64_t phase, int64_t task) const {
    if (phase == 1) {
      const int64_t token = task % call_.rows, n = task / call_.rows * kOutputRows;
      return write(sums_ + token * padded_ + n, token, n, std::min(kOutputRows, weight_.out_features - n));
    }
    const int64_t range = task % ranges_, group = task / ranges_ % groups_, part = task / ranges_ / groups_;
    const int64_t token = group * call_.rows / groups_, tokens = (group + 1) * call_.rows / groups_ - token;
    const int64_t block = range * tiling_.blocks() / ranges_, end = (range + 1) * tiling_.blocks() / ranges_;
    if (!whole()) return look_up(part, token, tokens, block, end, sums_ + (part * call_.rows + token) * padded_);
    thread_local Scratch memory;
    float* sums = memory.get<float>(tokens * padded_);
    look_up(part, token, tokens, block, end, sums);
    const int64_t n = block * kTileRows, rows = std::min(end * kTileRows, weight_.out_features) - n;
    for (int64_t i = 0; i < tokens; ++i) write(sums + i * padded_ + n, token + i, n, rows);
  }

 private:
  // Known from the rows alone, so that all products of a group have the same phases.
  bool whole() const { return call_.rows >= kTokens; }

  int64_t wanted(int64_t threads) const { return threads == 1 ? 1 : whole() ? threads : kTasksPerThread * threads; }

  // Sums of a part of K for some tokens and blocks, [tokens, padded_].
  void look_up(int64_t part, int64_t token, int64_t tokens, int64_t first_block, int64_t end, float* sums) const {
    thread_local Scratch table_memory, tile_memory;
    const int64_t token_bytes = 2 * kTileLookups * kernel_.table_bytes;
    Tables tables[kTokens];
    for (int64_t i = 0; i < tokens; ++i) {
      tables[i].memory = table_memory.get<uint8_t>(tokens * token_bytes) + i * token_bytes;
      std::fill_n(sums + i * padded_ + first_block * kTileRows, (end - first_block) * kTileRows, 0.0f);
    }
    const int64_t last = (part + 1) * tiling_.segments() / parts_;
    for (int64_t segment = part * tiling_.segments() / parts_; segment < last; ++segment) {
      for (int64_t i = 0; i < tokens; ++i) build(token + i, segment, &tables[i]);
      for (int64_t block = first_block; block < end; block += kStripBlocks) {
        const int64_t strip_end = std::min(end, block + kStripBlocks);
        const uint8_t* codes = reinterpret_cast<const uint8_t*>(weight_.codes) + tiling_.offset(segment, block);
        if (!weight_.tiled) {
          uint8_t* tile = tile_memory.get<uint8_t>(kStripBlocks * kTileRows * kTileLookups);
          codes = tile;
          for (int64_t b = block; b < strip_end; ++b) {
            kernel_.tile(weight_, tiling_, segment, b, tile);
            tile += tiling_.rows(b) * tiling_.lookups(segment);
          }
        }
        const Strip strip{segment, block, strip_end, codes};
        for (int64_t i = 0; i < tokens; ++i) add_strip(strip, tables[i], sums + i * padded_);
      }
    }
  }

  void build(int64_t token, int64_t segment, Tables* tables) const {
    const int64_t at = token * call_.x_row_stride + tiling_.first_position(segment) * weight_.vector_length;
    kernel_.build({&weight_, prepared_, static_cast<const char*>(call_.x) + at * element_, tiling_.positions(segment)},
                  tables);
  }

  // Blocks of a segment whose codes are in the cache.
  struct Strip {
    int64_t segment, block, end;
    const uint8_t* codes;
  };

  void add_strip(const Strip& strip, const Tables& tables, float* sums) const {
    const int lookups = tiling_.lookups(strip.segment);
    const char* scales =
        static_cast<const char*>(weight_.scales) + tiling_.group(strip.segment) * weight_.out_features * element_;
    for (int pass = 0; pass < tables.passes; ++pass) {
      const uint8_t* tile = strip.codes;
      for (int64_t b = strip.block; b < strip.end; ++b) {
        kernel_.look_up({tile, tables.memory + pass * lookups * kernel_.table_bytes, tables.units[pass], lookups,
                         tiling_.rows(b), scales + b * kTileRows * element_, weight_.dtype, sums + b * kTileRows});
        tile += tiling_.rows(b) * lookups;
      }
    }
  }

  // y of one token and some rows from n on, from the sums of the parts.
  void write(const float* sums, int64_t token, int64_t n, int64_t rows) const {
    const char* bias = static_cast<const char*>(call_.bias);
    char* y = static_cast<char*>(call_.y) + (token * weight_.out_features + n) * element_;
    kernel_.write(sums, int(parts_), call_.rows * padded_, bias == nullptr ? nullptr : bias + n * element_, y,
                  weight_.dtype, rows);
  }

  const Gemm call_;
  const PsumbookKernel& kernel_;
  const Weight weight_;
  const Tiling tiling_;
  const int element_;     // bytes of a float
  const int64_t parts_;   // of K
  const int64_t groups_;  // of the rows of x
  const int64_t ranges_;  // of the rows of W
  const int64_t padded_;  // N rounded up to whole blocks
  float *prepared_ = nullptr, *sums_ = nullptr;
};

class Group : public Products {
 public:
  Group(const Gemm* calls, int count, int threads) {
    for (int i = 0; i < count; ++i) products_.emplace_back(calls[i], psumbook_kernel(), threads);
  }

  int64_t prepared_floats() const override { return total(&Product::prepared_floats); }
  int64_t sums_floats() const override { return total(&Product::sums_floats); }

  void prepare(float* prepared, float* sums) override {
    for (Product& product : products_) {
      product.prepare(prepared, sums);
      prepared += product.prepared_floats();
      sums += product.sums_floats();
    }
  }

  int64_t phases() const override { return products_[0].phases(); }

  int64_t tasks(int64_t phase) const override {
    int64_t tasks = 0;
    for (const Product& product : products_) tasks += product.tasks(phase);
    return tasks;
  }

  void run(int64_t phase, int64_t task) const override {
    const Product* product = products_.data();
    while (task >= product->tasks(phase)) task -= product++->tasks(phase);
    product->run(phase, task);
  }

 private:
  int64_t total(int64_t (Product::*size)() const) const {
    int64_t sum = 0;
    for (const Product& product : products_) sum += (product.*size)();
    return sum;
  }

  std::vector<Product> products_;
};

}  // namespace

const PsumbookKernel& psumbook_kernel() {
  switch (instruction_set()) {
#if defined(__x86_64__)
    case InstructionSet::kAvx512Vbmi:
      return vbmi::kPsumbook;
    case InstructionSet::kAvx512:
      return avx512::kPsumbook;
    case InstructionSet::kAvx2:
      return avx2::kPsumbook;
#elif defined(__aarch64__)
    case InstructionSet::kNeon:
      return neon::kPsumbook;
#endif
    default:
      return portable::kPsumbook;
  }
}

std::unique_ptr<Products> psumbook_products(const Gemm* calls, int count, int threads) {
  return std::make_unique<Group>(calls, count, threads);
}

void gemm_by_psumbook(const Gemm* calls, int count, int threads) {
  thread_local Scratch prepared, sums;  // the caller's, for all threads
  Group group(calls, count, threads);
  group.prepare(prepared.get<float>(group.prepared_floats()), sums.get<float>(group.sums_floats()));
  parallel_phases(group, threads);
}

}  // namespace codegemm::cpu
