#include "cpu/features.h"

#include <atomic>
#include <cstring>

namespace codegemm::cpu {

namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512vbmi"};  // as in InstructionSet, each above the last

InstructionSet detect() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512vnni")) {
    return InstructionSet::kAvx512Vbmi;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return InstructionSet::kAvx2;
  }
#endif
  return InstructionSet::kPortable;
}

std::atomic<InstructionSet>& chosen() {
  static std::atomic<InstructionSet> value{detect()};
  return value;
}

}  // namespace

InstructionSet instruction_set() { return chosen().load(std::memory_order_relaxed); }

const char* features() { return kNames[static_cast<int>(instruction_set())]; }

bool limit_features(const char* name) {
  for (int i = 0; i <= static_cast<int>(detect()); ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      chosen().store(static_cast<InstructionSet>(i));
      return true;
    }
  }
  return false;
}

}  // namespace codegemm::cpu
