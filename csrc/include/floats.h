// The float types that a tensor may have, and how one number of each becomes a float32, on the CPU and on a GPU.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

#include "portable.h"

namespace pyunictokens {

enum class FloatType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

PYUNICTOKENS_HD static inline float float_of_bits(std::uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

PYUNICTOKENS_HD static inline std::uint32_t bits_of_float(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

PYUNICTOKENS_HD static inline float widen(float value) { return value; }

PYUNICTOKENS_HD static inline float widen(BFloat16 value) { return float_of_bits(std::uint32_t(value.bits) << 16); }

// The exponent of a float16 is moved into that of a float32 and its bias made good by a product, subnormals included.
PYUNICTOKENS_HD static inline float widen(Float16 value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  const std::uint32_t moved = std::uint32_t(value.bits & 0x7FFFu) << 13;
  const float finite = float_of_bits(moved) * 0x1p112f;
  const std::uint32_t magnitude = moved >= 0x0F800000u ? moved | 0x7F800000u : bits_of_float(finite);
  return float_of_bits(magnitude | std::uint32_t(value.bits & 0x8000u) << 16);
#endif
}

}  // namespace pyunictokens
