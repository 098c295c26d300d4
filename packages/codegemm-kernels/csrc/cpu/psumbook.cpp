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
  explicit Segments(const Weight& weight)
      : group_words(weight.in_features / (4 * weight.vector_length) / weight.num_groups),
        words(std::min<int64_t>(group_words, std::max(1, kMaxLookups / 4 / weight.num_codebooks))),
        per_group((group_words + words - 1) / words),
        count(per_group * weight.num_groups) {}

  int64_t group(int64_t segment) const { return segment / per_group; }
  int64_t first_word(int64_t segment) const { return group(segment) * group_words + segment % per_group * words; }
  int length(int64_t segment) const { return int(std::min(words, group_words - segment % per_group * words)); }

  int64_t group_words, words, per_group, count;
};

// Codebooks in fp32 as [m, v, 256], entries in table_order.
template <class T>
void arrange_codebooks(const Weight& weight, float* to) {
  const T* from = static_cast<const T*>(weight.codebooks);
  const int v = weight.vector_length;
  for (int i = 0; i < weight.num_codebooks; ++i) {
    for (int e = 0; e < 256; ++e) {
      float* column = to + i * v * 256 + table_order(e);
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

template <class T>
void write_outputs(const Gemm& call, const float* sums, int64_t sum_stride, int64_t first, int64_t rows) {
  const T* bias = static_cast<const T*>(call.bias);
  for (int64_t i = 0; i < call.rows; ++i) {
    T* y = static_cast<T*>(call.y) + i * call.weight.out_features;
    for (int64_t n = first; n < first + rows; ++n) {
      const float sum = sums[i * sum_stride + n];
      y[n] = narrow<T>(bias == nullptr ? sum : sum + widen(bias[n]));
    }
  }
}

void gemm_few_tokens(const Gemm& call, int threads) {
  thread_local Scratch codebook_memory, input_memory, table_memory, unit_memory, sum_memory;
  const Weight& weight = call.weight;
  const int m = weight.num_codebooks, v = weight.vector_length, tokens = int(call.rows);
  const int64_t N = weight.out_features, K = weight.in_features;
  const int planes = weight.dtype == DType::kFloat32 ? 3 : 2;
  const Segments segments(weight);

  float* codebooks = codebook_memory.get<float>(int64_t(m) * v * 256);
  float* x = input_memory.get<float>(tokens * K);
  with_type(weight.dtype, [&](auto type) {
    arrange_codebooks<decltype(type)>(weight, codebooks);
    widen_inputs<decltype(type)>(call, x);
  });

  const int64_t segment_bytes = segments.words * m * 4 * kMaxPlanes * 256;
  const int64_t stretch = std::max<int64_t>(1, std::min(segments.count, kTableBytes / (segment_bytes * tokens)));
  const int64_t table_stride = stretch * segment_bytes, sum_stride = (N + kChunkRows - 1) / kChunkRows * kChunkRows;
  uint8_t* tables = table_memory.get<uint8_t>(table_stride * tokens);
  TableUnit* units = unit_memory.get<TableUnit>(stretch * tokens);
  float* sums = sum_memory.get<float>(sum_stride * tokens);

  // Two blocks a thread or more, so that a thread that is held up does not hold up the rest.
  const int64_t share = (N / (2 * int64_t(threads)) + kChunkRows) / kChunkRows * kChunkRows;
  const int64_t block_rows = std::min<int64_t>(kMaxBlockRows, share);
  const int element = weight.dtype == DType::kFloat32 ? 4 : 2;

  for (int64_t start = 0; start < segments.count; start += stretch) {
    const int64_t count = std::min(stretch, segments.count - start);
    parallel_for(count * tokens, threads, [&](int64_t task) {
      const int64_t token = task / count, at = task % count, segment = start + at;
      avx512::build_tables({codebooks, x + token * K + segments.first_word(segment) * 4 * v, m, v,
                            segments.length(segment), planes, tables + token * table_stride + at * segment_bytes,
                            units + token * stretch + at});
    });
    parallel_for((N + block_rows - 1) / block_rows, threads, [&](int64_t block) {
      const int64_t n = block * block_rows, rows = std::min(block_rows, N - n);
      if (start == 0) {
        const int64_t padded = (rows + kChunkRows - 1) / kChunkRows * kChunkRows;
        for (int i = 0; i < tokens; ++i) std::fill_n(sums + i * sum_stride + n, padded, 0.0f);
      }
      for (int64_t at = 0; at < count; ++at) {
        const int64_t segment = start + at, word = segments.first_word(segment);
        avx512::add_lookups({weight.codes + word * N + n, N, K / (4 * v) * N, m, segments.length(segment), int(rows),
                             tokens, tables + at * segment_bytes, table_stride, units + at, stretch,
                             static_cast<const char*>(weight.scales) + (segments.group(segment) * N + n) * element,
                             weight.dtype, sums + n, sum_stride});
      }
      if (start + count == segments.count) {
        with_type(weight.dtype, [&](auto type) { write_outputs<decltype(type)>(call, sums, sum_stride, n, rows); });
      }
    });
  }
}

}  // namespace

void gemm_by_psumbook(const Gemm& call, int threads) {
  const int element = call.weight.dtype == DType::kFloat32 ? 4 : 2;
  for (int64_t token = 0; token < call.rows; token += kMaxTokens) {
    Gemm part = call;
    part.x = static_cast<const char*>(call.x) + token * call.x_row_stride * element;
    part.y = static_cast<char*>(call.y) + token * call.weight.out_features * element;
    part.rows = std::min<int64_t>(kMaxTokens, call.rows - token);
    gemm_few_tokens(part, threads);
  }
}

}  // namespace codegemm::cpu
