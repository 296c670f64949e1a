// One marker for functions that the CPU core, the CUDA kernels and the host emulation of those kernels share.
#pragma once

#ifdef __CUDACC__
#define PYUNICTOKENS_HD __host__ __device__
#else
#define PYUNICTOKENS_HD
#endif
