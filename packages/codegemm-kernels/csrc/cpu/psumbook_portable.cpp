#include "cpu/psumbook_scalar.h"

namespace codegemm::cpu::portable {
const PsumbookKernel kPsumbook = kScalar;
}
