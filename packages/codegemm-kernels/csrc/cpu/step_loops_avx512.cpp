#include "cpu/step_loops_inline.h"

#if defined(__AVX512BW__)
namespace codegemm::cpu::avx512 {
const StepLoops kStepLoops = kLoops;
}
#endif
