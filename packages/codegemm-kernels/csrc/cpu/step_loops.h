// The loops of a step's operations other than products with codes. Compiled once an instruction set, from
// step_loops_inline.h.
#pragma once
#include "cpu/step.h"

namespace codegemm::cpu {

constexpr int kKeys = 64;  // scored at a time: their values stay in a first-level cache

// What a share of a slot's keys adds up to, for the query heads of one key head.
struct AttentionPart {
  float* sums;     // [group, padded_head], of values times e^(score - largest)
  float* largest;  // [group], of the scores
  float* weights;  // [group], sums of e^(score - largest)
};

namespace {  // see floats.h

inline int64_t group(const Attention& op) { return op.heads / op.kv_heads; }
inline int64_t padded_head(const Attention& op) { return (op.head_dim + 15) / 16 * 16; }
// Working memory of attend: queries, the new key, scores.
inline int64_t attend_floats(const Attention& op) { return (group(op) + 1) * padded_head(op) + group(op) * kKeys; }

}  // namespace

struct StepLoops {
  void (*add_norm)(const AddNorm& op, int64_t row);
  void (*widen)(const void* from, DType dtype, int64_t count, float* to);
  void (*dense)(const Dense& op, const float* x, int64_t first, int64_t last);  // rows of W; x [rows, K] widened
  // One of `shares` equal parts of a slot's keys; the last part begins by appending the new one.
  void (*attend)(const Attention& op, int64_t slot, int64_t kv_head, int64_t share, int64_t shares, float* memory,
                 const AttentionPart& part);
  void (*combine)(const Attention& op, int64_t slot, int64_t kv_head, const AttentionPart* parts, int64_t shares);
  void (*gate)(const Gate& op, int64_t row, int64_t first, int64_t last);  // columns
  void (*soft_cap)(const SoftCap& op, int64_t first, int64_t last);        // of rows · width elements
  // The largest of some scores, NaN if one is; and where the first of them is that equals `score`, be it NaN.
  float (*peak)(const void* scores, DType dtype, int64_t count);
  int64_t (*find)(const void* scores, DType dtype, int64_t count, float score);
};

const StepLoops& step_loops();  // for this processor

namespace portable {
extern const StepLoops kStepLoops;
}
namespace avx2 {
extern const StepLoops kStepLoops;
}
namespace avx512 {
extern const StepLoops kStepLoops;
}

}  // namespace codegemm::cpu
