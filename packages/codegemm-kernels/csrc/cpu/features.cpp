#include "cpu/features.h"

namespace codegemm::cpu {

namespace {

InstructionSet detect() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi")) {
    return InstructionSet::kAvx512Vbmi;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kPortable;
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet found = detect();
  return found;
}

const char* features() {
  switch (instruction_set()) {
    case InstructionSet::kAvx512Vbmi:
      return "avx512vbmi";
    case InstructionSet::kAvx2:
      return "avx2";
    case InstructionSet::kPortable:
      break;
  }
  return "portable";
}

}  // namespace codegemm::cpu
