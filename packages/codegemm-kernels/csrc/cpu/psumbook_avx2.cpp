#include "cpu/psumbook_scalar.h"

#if defined(__AVX2__)
namespace codegemm::cpu::avx2 {
const PsumbookKernel kPsumbook = kScalar;
}
#endif
