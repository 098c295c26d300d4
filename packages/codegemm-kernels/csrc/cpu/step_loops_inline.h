// The loops of step_loops.h for whatever instruction set the including file is compiled for; internal linkage, see
// floats.h.
#pragma once
#include "cpu/step_attention_inline.h"

namespace codegemm::cpu {
namespace {

// --- Norms -----------------------------------------------------------------------------------------------------------

template <class T>
void add_norm_as(const AddNorm& op, int64_t row) {
  const int64_t width = op.width;
  T *residual = static_cast<T*>(op.residual) + row * width, *y = static_cast<T*>(op.y) + row * width;
  if (op.branch != nullptr) {
    const T* branch = static_cast<const T*>(op.branch) + row * width;
    const T* weight = static_cast<const T*>(op.branch_norm.weight);
    const float inverse = weight == nullptr ? 1 : inverse_rms(branch, width, op.branch_norm.eps);
    for (int64_t i = 0; i < width; i += kLanes) {
      const int64_t left = width - i;
      const Lanes added = weight == nullptr
                              ? load(branch + i, left)
                              : rounded<T>(scaled(branch + i, left, inverse, weight + i, op.branch_norm.offset));
      store(load(residual + i, left) + added, residual + i, left);
    }
  }
  const T* weight = static_cast<const T*>(op.norm.weight);
  const float inverse = inverse_rms(residual, width, op.norm.eps);
  for (int64_t i = 0; i < width; i += kLanes) {
    store(scaled(residual + i, width - i, inverse, weight + i, op.norm.offset), y + i, width - i);
  }
}

void add_norm(const AddNorm& op, int64_t row) {
  with_type(op.dtype, [&](auto type) { add_norm_as<decltype(type)>(op, row); });
}

// --- Dense products --------------------------------------------------------------------------------------------------

void widen(const void* from, DType dtype, int64_t count, float* to) {
  with_type(dtype, [&](auto type) { widen_as(static_cast<const decltype(type)*>(from), count, to); });
}

// Rows n .. n + Outputs - 1 of W with M rows of x.
template <class T, int Outputs, int M>
void dense_block(const Dense& op, const float* x, int64_t n, int64_t row) {
  const int64_t K = op.in_features;
  const T* weight = static_cast<const T*>(op.weight) + n * K;
  x += row * K;
  Lanes sums[M][Outputs] = {};
  int64_t k = 0;
  // The hardware stops fetching at the ends of pages, and so of many rows: the next block is fetched by hand.
  const char* next = reinterpret_cast<const char*>(weight + Outputs * K);
  for (; k + kLanes <= K; k += kLanes) {
    for (unsigned line = 0; line < Outputs * kLanes * sizeof(T); line += 64) __builtin_prefetch(next + line, 0, 2);
    next += Outputs * kLanes * sizeof(T);
    Lanes inputs[M];
    for (int m = 0; m < M; ++m) inputs[m] = load(x + m * K + k);
    for (int o = 0; o < Outputs; ++o) {
      const Lanes w = load(weight + o * K + k);
      for (int m = 0; m < M; ++m) sums[m][o] += w * inputs[m];
    }
  }
  if (k < K) {
    for (int o = 0; o < Outputs; ++o) {
      const Lanes w = load(weight + o * K + k, K - k);
      for (int m = 0; m < M; ++m) sums[m][o] += w * load(x + m * K + k, K - k);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int o = 0; o < Outputs; ++o) {
      const float bias = op.bias == nullptr ? 0 : cpu::widen(static_cast<const T*>(op.bias)[n + o]);
      static_cast<T*>(op.y)[(row + m) * op.out_features + n + o] = narrow<T>(total(sums[m][o]) + bias);
    }
  }
}

template <class T, int Outputs>
void dense_rows(const Dense& op, const float* x, int64_t n) {
  int64_t row = 0;
  for (; row + 4 <= op.rows; row += 4) dense_block<T, Outputs, 4>(op, x, n, row);
  for (; row + 2 <= op.rows; row += 2) dense_block<T, Outputs, 2>(op, x, n, row);
  if (row < op.rows) dense_block<T, Outputs, 1>(op, x, n, row);
}

void dense(const Dense& op, const float* x, int64_t first, int64_t last) {
  with_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    int64_t n = first;
    for (; n + 4 <= last; n += 4) dense_rows<T, 4>(op, x, n);
    for (; n < last; ++n) dense_rows<T, 1>(op, x, n);
  });
}

// --- Gates, scores ---------------------------------------------------------------------------------------------------

inline Lanes activated(Lanes x, Activation activation) {
  if (activation == Activation::kSilu) return x / (1 + exponential(-x));
  // x / 2 · (1 + tanh(u)) is x / (1 + e^(-2u)), with 2u = 2 √(2/π) (x + 0.044715 x³)
  return x / (1 + exponential(x * (x * x * -0.0713548162726009f - 1.59576912160573f)));
}

void gate(const Gate& op, int64_t row, int64_t first, int64_t last) {
  with_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    const T *gates = row_of<T>(op.gate, row), *ups = row_of<T>(op.up, row);
    T* y = static_cast<T*>(op.y) + row * op.width;
    for (int64_t i = first; i < last; i += kLanes) {
      const int64_t left = last - i;
      store(activated(load(gates + i, left), op.activation) * load(ups + i, left), y + i, left);
    }
  });
}

void soft_cap(const SoftCap& op, int64_t first, int64_t last) {
  with_type(op.dtype, [&](auto type) {
    auto* x = static_cast<decltype(type)*>(op.x);
    for (int64_t i = first; i < last; i += kLanes) {
      store(hyperbolic_tangent(load(x + i, last - i) / op.softcap) * op.softcap, x + i, last - i);
    }
  });
}

float peak(const void* scores, DType dtype, int64_t count) {
  float result = -__builtin_inff();
  with_type(dtype, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(scores);
    Lanes best = all(-__builtin_inff()), nan = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const Lanes score = load(from + i);
      best = largest(best, score);
      nan += score * 0;  // NaN for an infinity too
    }
    result = largest(best);
    bool has_nan = false;
    if (total(nan) != 0) {
      for (int64_t j = 0; j < i; ++j) has_nan |= __builtin_isnan(cpu::widen(from[j]));
    }
    for (; i < count; ++i) {
      const float score = cpu::widen(from[i]);
      has_nan |= __builtin_isnan(score);
      result = score > result ? score : result;
    }
    if (has_nan) result = __builtin_nanf("");
  });
  return result;
}

int64_t find(const void* scores, DType dtype, int64_t count, float score) {
  int64_t i = 0;
  with_type(dtype, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(scores);
    const bool nan = __builtin_isnan(score);
    while (i < count && !(nan ? __builtin_isnan(cpu::widen(from[i])) : cpu::widen(from[i]) == score)) ++i;
  });
  return i;
}

constexpr StepLoops kLoops = {add_norm, widen, dense, attend, combine, gate, soft_cap, peak, find};

}  // namespace
}  // namespace codegemm::cpu
