// How the psumbook product is cut up: tables for a stretch of K, then lookups for blocks of rows, stretch after
// stretch.
#include "cpu/psumbook.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/floats.h"
#include "cpu/pool.h"

namespace codegemm::cpu {
namespace {

// Room for the tables of a stretch of K. They are read in order, so the L3 cache is near enough; each stretch costs two
// waits for all threads.
constexpr int64_t kTableBytes = 4 << 20;

// Memory that a thread keeps from call to call, aligned to a cache line.
class Scratch {
 public:
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      memory_.reset(std::aligned_alloc(64, bytes));
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<T*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

// A matrix cut into segments along K.
struct Segments {
  Segments(const Weight& weight, int max_lookups)
      : group_words(weight.in_features / (4 * weight.vector_length) / weight.num_groups),
        words(std::min<int64_t>(group_words, std::max(1, max_lookups / 4 / weight.num_codebooks))),
        per_group((group_words + words - 1) / words),
        count(per_group * weight.num_groups) {}

  int64_t group(int64_t segment) const { return segment / per_group; }
  int64_t first_word(int64_t segment) const { return group(segment) * group_words + segment % per_group * words; }
  int length(int64_t segment) const { return int(std::min(words, group_words - segment % per_group * words)); }

  int64_t group_words, words, per_group, count;
};

// Codebooks in fp32 as [m, v, 256], entry e at place(e).
template <class T>
void arrange_codebooks(const Weight& weight, int (*place)(int), float* to) {
  const T* from = static_cast<const T*>(weight.codebooks);
  const int v = weight.vector_length;
  for (int i = 0; i < weight.num_codebooks; ++i) {
    for (int e = 0; e < 256; ++e) {
      float* column = to + i * v * 256 + place(e);
      for (int t = 0; t < v; ++t) column[t * 256] = widen(from[(i * 256 + e) * v + t]);
    }
  }
}

template <class T>
void widen_inputs(const Gemm& call, float* to) {
  const int64_t K = call.weight.in_features;
  for (int64_t i = 0; i < call.rows; ++i) {
    widen_all(static_cast<const T*>(call.x) + i * call.x_row_stride, K, to + i * K);
  }
}

// One product: its memory and how it is cut into phases. Phase 2s builds the tables of step s, phase 2s + 1 looks up in
// them. A step is a stretch of K for up to kMaxTokens rows of x.
class Product {
 public:
  Product(const Gemm& call, const PsumbookKernel& kernel, int threads)
      : call_(call),
        kernel_(kernel),
        weight_(call.weight),
        segments_(call.weight, kernel.max_lookups),
        batch_(std::min<int64_t>(kMaxTokens, call.rows)),
        segment_bytes_(segments_.words * weight_.num_codebooks * 4 * kernel.table_bytes),
        stretch_(std::max<int64_t>(1, std::min(segments_.count, kTableBytes / (segment_bytes_ * batch_)))),
        stretches_((segments_.count + stretch_ - 1) / stretch_),
        sum_stride_((weight_.out_features + kChunkRows - 1) / kChunkRows * kChunkRows) {
    // Two blocks a thread or more, so that a thread that is held up does not hold up the rest.
    const int64_t share = (weight_.out_features / (2 * int64_t(threads)) + kChunkRows) / kChunkRows * kChunkRows;
    block_rows_ = std::min<int64_t>(kMaxBlockRows, share);
    thread_local Scratch codebook_memory, input_memory, table_memory, unit_memory, sum_memory;
    codebooks_ = codebook_memory.get<float>(int64_t(weight_.num_codebooks) * weight_.vector_length * 256);
    x_ = input_memory.get<float>(call.rows * weight_.in_features);
    tables_ = table_memory.get<uint8_t>(stretch_ * segment_bytes_ * batch_);
    units_ = unit_memory.get<TableUnit>(stretch_ * batch_);
    sums_ = sum_memory.get<float>(sum_stride_ * batch_);
    with_type(weight_.dtype, [&](auto type) {
      arrange_codebooks<decltype(type)>(weight_, kernel.place, codebooks_);
      widen_inputs<decltype(type)>(call, x_);
    });
  }

  int64_t phases() const { return 2 * stretches_ * ((call_.rows + batch_ - 1) / batch_); }

  int64_t tasks(int64_t phase) const {
    const Step step = at(phase);
    return phase % 2 == 0 ? step.count * step.tokens : (weight_.out_features + block_rows_ - 1) / block_rows_;
  }

  void run(int64_t phase, int64_t task) const {
    if (phase % 2 == 0) {
      build(at(phase), task);
    } else {
      look_up(at(phase), task * block_rows_);
    }
  }

 private:
  struct Step {
    int64_t token, tokens;  // rows of x
    int64_t start, count;   // segments
  };

  Step at(int64_t phase) const {
    const int64_t token = phase / 2 / stretches_ * batch_, start = phase / 2 % stretches_ * stretch_;
    return {token, std::min(batch_, call_.rows - token), start, std::min(stretch_, segments_.count - start)};
  }

  void build(const Step& step, int64_t task) const {
    const int64_t token = task / step.count, place = task % step.count, segment = step.start + place;
    const int v = weight_.vector_length;
    const float* x = x_ + (step.token + token) * weight_.in_features + segments_.first_word(segment) * 4 * v;
    kernel_.build_tables({codebooks_, x, weight_.num_codebooks, v, segments_.length(segment), weight_.dtype,
                          tables_ + (token * stretch_ + place) * segment_bytes_, units_ + token * stretch_ + place});
  }

  void look_up(const Step& step, int64_t n) const {
    const int64_t N = weight_.out_features, rows = std::min(block_rows_, N - n);
    const int64_t plane = weight_.in_features / (4 * weight_.vector_length) * N;
    const int element = weight_.dtype == DType::kFloat32 ? 4 : 2;
    if (step.start == 0) {
      const int64_t padded = (rows + kChunkRows - 1) / kChunkRows * kChunkRows;
      for (int64_t i = 0; i < step.tokens; ++i) std::fill_n(sums_ + i * sum_stride_ + n, padded, 0.0f);
    }
    for (int64_t place = 0; place < step.count; ++place) {
      const int64_t segment = step.start + place;
      const void* scales = static_cast<const char*>(weight_.scales) + (segments_.group(segment) * N + n) * element;
      kernel_.add_lookups({weight_.codes + segments_.first_word(segment) * N + n, N, plane, weight_.num_codebooks,
                           segments_.length(segment), int(rows), int(step.tokens), tables_ + place * segment_bytes_,
                           stretch_ * segment_bytes_, units_ + place, stretch_, scales, weight_.dtype, sums_ + n,
                           sum_stride_});
    }
    if (step.start + step.count < segments_.count) return;
    const char* bias = static_cast<const char*>(call_.bias);
    for (int64_t i = 0; i < step.tokens; ++i) {
      char* y = static_cast<char*>(call_.y) + ((step.token + i) * N + n) * element;
      kernel_.write_outputs(sums_ + i * sum_stride_ + n, bias == nullptr ? nullptr : bias + n * element, y,
                            weight_.dtype, rows);
    }
  }

  const Gemm& call_;
  const PsumbookKernel& kernel_;
  const Weight& weight_;
  const Segments segments_;
  const int64_t batch_;          // rows of x in a step
  const int64_t segment_bytes_;  // room for the tables of a segment
  const int64_t stretch_;        // segments in a step
  const int64_t stretches_;
  const int64_t sum_stride_;
  int64_t block_rows_;
  float *codebooks_, *x_, *sums_;
  uint8_t* tables_;
  TableUnit* units_;
};

}  // namespace

void gemm_by_psumbook(const Gemm& call, const PsumbookKernel& kernel, int threads) {
  const Product product(call, kernel, threads);
  parallel_phases(
      product.phases(), threads, [&](int64_t phase) { return product.tasks(phase); },
      [&](int64_t phase, int64_t task) { product.run(phase, task); });
}

}  // namespace codegemm::cpu
