// What this processor can run; decided once, at the first call.
#pragma once

namespace codegemm::cpu {

enum class InstructionSet { kPortable, kAvx2, kAvx512Vbmi };

InstructionSet instruction_set();
const char* features();

// Use the kernels of a lesser instruction set from now on, so that one machine can test them all; the name is one of
// those that features() returns. False when there is none of this name or the processor cannot run it.
bool limit_features(const char* name);

}  // namespace codegemm::cpu
