#include "cpu/features.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace codegemm::cpu {

namespace {

// As in InstructionSet, each above the last.
#if defined(__aarch64__)
constexpr const char* kNames[] = {"portable", "neon"};
#else
constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512vbmi"};
#endif

InstructionSet detect() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) {
    return InstructionSet::kPortable;
  }
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
    return InstructionSet::kAvx2;
  }
  const bool bytes = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
  return bytes ? InstructionSet::kAvx512Vbmi : InstructionSet::kAvx512;
#elif defined(__aarch64__)
  return InstructionSet::kNeon;
#else
  return InstructionSet::kPortable;
#endif
}

// The best that is there, up to the one that the environment names.
InstructionSet wanted() {
  const char* name = std::getenv("CODEGEMM_CPU");
  for (int i = 0; name != nullptr && i <= static_cast<int>(detect()); ++i) {
    if (std::strcmp(name, kNames[i]) == 0) return static_cast<InstructionSet>(i);
  }
  return detect();
}

std::atomic<InstructionSet>& chosen() {
  static std::atomic<InstructionSet> value{wanted()};
  return value;
}

}  // namespace

InstructionSet instruction_set() { return chosen().load(std::memory_order_relaxed); }

const char* features() { return kNames[static_cast<int>(instruction_set())]; }

bool has_matrix_tiles() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("amx-tile");
#else
  return false;
#endif
}

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
