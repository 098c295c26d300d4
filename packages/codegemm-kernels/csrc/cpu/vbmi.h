// What tables_vbmi.cpp brings for psumbook_vbmi.cpp.
#pragma once
#include "cpu/avx512.h"
#include "cpu/psumbook.h"

namespace codegemm::cpu::vbmi {

constexpr int kTableBytes = 1024;  // three planes of 256 digits, or two and a line to spare

void prepare(const Weight& weight, void* prepared);
void build(const BuildTables& job, Tables* tables);

}  // namespace codegemm::cpu::vbmi
