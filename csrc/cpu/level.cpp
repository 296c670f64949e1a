// Which instruction set this machine can run, and its compilation of the row loops.
#include "rows.h"

namespace pyunictokens {

CpuLevel best_cpu_level() {
#ifdef PYUNICTOKENS_WITH_X86_LEVELS
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return CpuLevel::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuLevel::kAvx2;
#endif
  return CpuLevel::kBaseline;
}

const Rows& rows_of(CpuLevel level) {
#ifdef PYUNICTOKENS_WITH_X86_LEVELS
  if (level == CpuLevel::kAvx512) return avx512::rows;
  if (level == CpuLevel::kAvx2) return avx2::rows;
#else
  (void)level;
#endif
  return baseline::rows;
}

}  // namespace pyunictokens
