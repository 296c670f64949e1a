// The instruction sets that the CPU part is compiled for. Loops over rows exist once per level and are chosen at run time.
#pragma once

namespace pyunictokens {

enum class CpuLevel : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The best level this build holds and this machine can run.
CpuLevel best_cpu_level();

}  // namespace pyunictokens
