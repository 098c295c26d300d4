// What this processor can run; decided once, at the first call. The environment variable CODEGEMM_CPU names a lesser
// instruction set to use.
#pragma once

namespace codegemm::cpu {

#if defined(__aarch64__)
enum class InstructionSet { kPortable, kNeon };
#else
enum class InstructionSet { kPortable, kAvx2, kAvx512, kAvx512Vbmi };
#endif

InstructionSet instruction_set();
const char* features();

bool has_matrix_tiles();  // AMX, with which torch multiplies bf16 several times faster

// Use the kernels of a lesser instruction set from now on, so that one machine can test them all; the name is one of
// those that features() returns. False when there is none of this name or the processor cannot run it.
bool limit_features(const char* name);

}  // namespace codegemm::cpu
