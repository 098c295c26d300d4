#include "cpu/step_loops_inline.h"

namespace codegemm::cpu::portable {
const StepLoops kStepLoops = kLoops;
}
