#include "cpu/step_loops_inline.h"

#if defined(__AVX2__)
namespace codegemm::cpu::avx2 {
const StepLoops kStepLoops = kLoops;
}
#endif
