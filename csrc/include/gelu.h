// GELU as tanh approximates it: x / (1 + exp(-2u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), which is 0.5 x (1 + tanh u).
#pragma once

#include <cstdint>

#include "cpu_level.h"

namespace pyunictokens {

// out[count] = GELU(x[count]), or grad[count] times its slope there if `grad` is not null. Float32, on at most `threads`
// threads.
void gelu_cpu(const float* x, const float* grad, std::int64_t count, float* out, int threads, CpuLevel level);

}  // namespace pyunictokens
