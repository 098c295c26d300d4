// fp16 and bf16 to and from fp32, in plain integer arithmetic. Internal linkage: included by files that are compiled
// for different instruction sets, whose versions must not be merged by the linker.
#pragma once
#include <cstdint>
#include <cstring>

#include "codegemm.h"

namespace codegemm::cpu {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float widen(float value) { return value; }

inline float widen(BFloat16 value) { return from_bits(uint32_t(value.bits) << 16); }

inline float widen(Half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude << 13));  // infinities and NaNs
  // Shifting puts the fp16 exponent into the fp32 field, 112 too small; the product mends it, subnormals included.
  const float scaled = from_bits(magnitude << 13) * 0x1p+112f;
  return from_bits(sign | to_bits(scaled));
}

template <class T>
T narrow(float value);

template <>
inline float narrow<float>(float value) {
  return value;
}

template <>
inline BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40u)};  // a NaN stays one
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};                  // round to nearest even
}

template <>
inline Half narrow<Half>(float value) {
  const uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: let the adder round at the last bit of an fp16 subnormal
    return {uint16_t(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13))};
}

// Calls f with a value of the C++ type of `dtype`.
template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat16:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
  }
}

template <class T>
void widen_all(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}

}  // namespace
}  // namespace codegemm::cpu
