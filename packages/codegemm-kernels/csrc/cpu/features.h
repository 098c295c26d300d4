// What this processor can run; decided once, at the first call.
#pragma once

namespace codegemm::cpu {

enum class InstructionSet { kPortable, kAvx2, kAvx512Vbmi };

InstructionSet instruction_set();
const char* features();

}  // namespace codegemm::cpu
