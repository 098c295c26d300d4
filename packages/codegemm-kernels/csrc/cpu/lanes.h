// Vectors of floats as wide as a register, from and to the stored dtypes, for loops that are compiled once an
// instruction set. Internal linkage, see floats.h.
#pragma once
#include <cstring>

#include "cpu/floats.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace codegemm::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
using Lanes = VectorOf<float>::type;
using Bits = VectorOf<uint32_t>::type;
using Integers = VectorOf<int32_t>::type;
using HalfBits = VectorOf<uint16_t>::type;
using Bytes = VectorOf<int8_t>::type;

inline Lanes all(float value) { return value - Lanes{}; }

template <class Vector>
inline Vector read(const void* from) {
  Vector result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

inline Lanes load(const float* from) { return read<Lanes>(from); }

inline Lanes load(const BFloat16* from) {
  return reinterpret_cast<Lanes>(__builtin_convertvector(read<HalfBits>(from), Bits) << 16);
}

inline Lanes load(const Half* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(_mm512_cvtph_ps(read<__m256i>(from)));
#elif defined(__AVX2__)
  return reinterpret_cast<Lanes>(_mm256_cvtph_ps(read<__m128i>(from)));
#else
  Lanes result;
  for (int i = 0; i < kLanes; ++i) result[i] = widen(from[i]);
  return result;
#endif
}

inline Lanes load(const int8_t* from) {
  return __builtin_convertvector(__builtin_convertvector(read<Bytes>(from), Integers), Lanes);
}

inline void store(Lanes value, float* to) { std::memcpy(to, &value, sizeof value); }

inline void store(Lanes value, BFloat16* to) {
  const Bits bits = reinterpret_cast<Bits>(value);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const auto is_nan = reinterpret_cast<Bits>(value != value);
  const HalfBits half = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), HalfBits);
  std::memcpy(to, &half, sizeof half);
}

inline void store(Lanes value, Half* to) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_cvtps_ph(reinterpret_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &half, sizeof half);
#elif defined(__AVX2__)
  const __m128i half = _mm256_cvtps_ph(reinterpret_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &half, sizeof half);
#else
  for (int i = 0; i < kLanes; ++i) to[i] = narrow<Half>(value[i]);
#endif
}

// The first `count` lanes from and to memory, the others zero and untouched.
template <class T>
inline Lanes load(const T* from, int64_t count) {
  if (count >= kLanes) return load(from);
  T values[kLanes] = {};
  std::memcpy(values, from, size_t(count) * sizeof(T));
  return load(values);
}

template <class T>
inline void store(Lanes value, T* to, int64_t count) {
  if (count >= kLanes) return store(value, to);
  T values[kLanes];
  store(value, values);
  std::memcpy(to, values, size_t(count) * sizeof(T));
}

// Lane i of the result is lane i ^ with of the value.
inline Lanes exchanged(Lanes value, int with) {
  Integers from;
  for (int i = 0; i < kLanes; ++i) from[i] = i ^ with;
  return __builtin_shuffle(value, from);
}

inline float total(Lanes value) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) value += exchanged(value, half);
  return value[0];
}

// Lane i is the total of values[i]: neighbours are added until one register is left.
inline Lanes totals(const Lanes* values) {
  Lanes sums[kLanes];
  Integers even, odd;
  for (int i = 0; i < kLanes; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) sums[i] = values[i];
#pragma GCC unroll 4
  for (int count = kLanes / 2; count > 0; count /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      const Lanes a = sums[2 * i], b = sums[2 * i + 1];
      sums[i] = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
    }
  }
  return sums[0];
}

// A NaN in `a` stays one.
inline Lanes largest(Lanes a, Lanes b) { return a < b ? b : a; }

inline float largest(Lanes value) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) value = largest(value, exchanged(value, half));
  return value[0];
}

// e^x to about 1e-7, at most 1.6e38 and at least 1e-38; a polynomial of Cephes on [-ln 2 / 2, ln 2 / 2].
inline Lanes exponential(Lanes x) {
  x = x > 88 ? all(88) : x;
  x = x < -87 ? all(-87) : x;
  const Lanes magic = all(12582912.f);  // 1.5 * 2^23: adding it rounds to integers
  const Lanes n = (x * 1.44269504088896341f + magic) - magic;
  const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes sum = r * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * r + 8.3334519073e-3f;
  sum = sum * r + 4.1665795894e-2f;
  sum = sum * r + 1.6666665459e-1f;
  sum = sum * r + 5.0000001201e-1f;
  const Integers exponent = (__builtin_convertvector(n, Integers) + 127) << 23;
  return (sum * r * r + r + 1) * reinterpret_cast<Lanes>(exponent);
}

inline Lanes hyperbolic_tangent(Lanes x) { return 1 - 2 / (1 + exponential(2 * x)); }

}  // namespace
}  // namespace codegemm::cpu
