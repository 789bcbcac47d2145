// Entry points of the CPU kernels; the instruction set is chosen at run time.
#pragma once

#include <string>

#include "../params.h"

namespace treegrpo::cpu {

void forward(const ForwardParams& params);
void backward(const BackwardParams& params);

// Name of the instruction set in use: avx512, avx2 or portable.
const char* isa();
// Use another one that this machine has ("" for the best); throws std::invalid_argument if it has not. For tests.
void set_isa(const std::string& name);

}  // namespace treegrpo::cpu
