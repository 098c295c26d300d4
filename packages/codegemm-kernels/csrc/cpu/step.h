// A decode step as a list of operations on fixed addresses, run by one call in one parallel region: what a captured
// graph is on a GPU. What differs from step to step (tokens, lengths, the cache) is read from memory as it runs.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "codegemm.h"
#include "cpu/psumbook.h"
#include "cpu/scratch.h"

namespace codegemm::cpu {

// RMSNorm: x / rms(x) * (weight + offset), computed in fp32; no norm at all where weight is null.
struct Norm {
  const void* weight;
  float eps;
  float offset;
};

// Rows that start `stride` elements apart.
struct Rows {
  void* data;
  int64_t stride;
};

// y[r] = table[tokens[r]].
struct Embed {
  const void* table;  // [vocabulary, width]
  const int64_t* tokens;
  void* y;
  int64_t rows, width, vocabulary;
  DType dtype;
};

// residual += branch, normed if it has a norm; y = residual, normed. All are [rows, width]; branch may be null.
struct AddNorm {
  void* residual;
  const void* branch;
  Norm branch_norm, norm;
  void* y;
  int64_t rows, width;
  DType dtype;
};

// y = x Wᵀ + bias for a W [out_features, in_features] that is not quantised; bias may be null.
struct Dense {
  const void* weight;
  Rows x;
  const void* bias;
  void* y;  // [rows, out_features]
  int64_t rows, out_features, in_features;
  DType dtype;
};

// One new token a slot: norms and rotates q and k, appends k and v to the cache at the slot's length, attends.
struct Attention {
  Rows q, k, v;  // [slots, heads · head_dim], [slots, kv_heads · head_dim]
  void* y;       // [slots, heads · head_dim]
  Norm q_norm, k_norm;
  const float *cos, *sin;  // [capacity or more, pairs]; elements i and i + pairs of a head are rotated together
  void *keys, *values;     // [slots, kv_heads, capacity, head_dim] in dtype, or int8 with scales
  float *key_scales, *value_scales;  // [slots, kv_heads, capacity], or null
  const int32_t* lengths;            // [slots], before this token; beyond capacity - 1 they count as that
  int64_t slots, heads, kv_heads, head_dim, pairs, capacity;
  int64_t window;        // keys that a query sees, itself included; 0 for all
  float scale, softcap;  // of the scores; softcap 0 for none
  DType dtype;
};

enum class Activation : int { kSilu = 0, kGeluTanh = 1 };

// y = activation(gate) · up.
struct Gate {
  Rows gate, up;
  void* y;  // [rows, width]
  int64_t rows, width;
  Activation activation;
  DType dtype;
};

// x = softcap · tanh(x / softcap), in place.
struct SoftCap {
  void* x;  // [rows, width]
  int64_t rows, width;
  float softcap;
  DType dtype;
};

// tokens[r] = where the largest of scores[r] is, the first of several; a NaN counts as larger than all else.
struct Choose {
  const void* scores;  // [rows, width]
  int64_t* tokens;
  int64_t rows, width;
  DType dtype;
};

class Step {
 public:
  // `threads` is how many the work is cut up for; a run may have others.
  explicit Step(int threads) : threads_(threads) {}

  void add(const Embed& operation);
  void add(const AddNorm& operation);
  void add(const std::vector<Gemm>& products);  // with as many rows each, side by side
  void add(const Dense& operation);
  void add(const Attention& operation);
  void add(const Gate& operation);
  void add(const SoftCap& operation);
  void add(const Choose& operation);

  // Reads the codebooks again: before the first run and after they have changed. Other weights are read by every run.
  void prepare();
  // Callers on several threads wait for each other. Throws std::out_of_range for a token beyond the vocabulary, and
  // std::logic_error when products have not been prepared.
  void run(int threads);

 private:
  void append(std::unique_ptr<Phases> operation);

  friend class Replay;
  struct Place {
    const Phases* operation;
    int64_t phase;  // of the operation
  };
  int threads_;
  std::vector<std::unique_ptr<Phases>> operations_;
  std::vector<Place> phases_;
  std::vector<Embed> embeds_;
  std::vector<Products*> products_;
  std::vector<Scratch> prepared_;
  Scratch sums_;  // of one operation at a time
  bool ready_ = true;
  std::mutex turn_;
};

}  // namespace codegemm::cpu
