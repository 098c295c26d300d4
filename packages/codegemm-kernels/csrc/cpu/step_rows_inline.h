// What several operations of a step do with a row; internal linkage, see floats.h.
#pragma once
#include "cpu/lanes.h"
#include "cpu/step_loops.h"

namespace codegemm::cpu {
namespace {

// As a store and a load would round.
template <class T>
inline Lanes rounded(Lanes value) {
  T memory[kLanes];
  store(value, memory);
  return load(memory);
}

template <>
inline Lanes rounded<float>(Lanes value) {
  return value;
}

template <class T>
inline T* row_of(const Rows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + row * rows.stride;
}

template <class T>
inline float inverse_rms(const T* x, int64_t count, float eps) {
  Lanes squares[2] = {};
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    const Lanes a = load(x + i, count - i);
    squares[0] += a * a;
    if (count - i <= kLanes) break;
    const Lanes b = load(x + i + kLanes, count - i - kLanes);
    squares[1] += b * b;
  }
  return 1 / __builtin_sqrtf(total(squares[0] + squares[1]) / float(count) + eps);
}

template <class T>
inline Lanes scaled(const T* x, int64_t count, float inverse, const T* weight, float offset) {
  return load(x, count) * inverse * (load(weight, count) + offset);
}

template <class T>
inline void widen_as(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) store(load(from + i, count - i), to + i, count - i);
}

}  // namespace
}  // namespace codegemm::cpu
