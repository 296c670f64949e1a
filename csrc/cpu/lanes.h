// What the row loops share: tiles of 64 numbers in float32, and the exponential. Compiled per instruction set (all_rows.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "floats.h"

namespace pyunictokens {
namespace PYUNICTOKENS_LEVEL {
namespace {

constexpr int kTile = 64;  // entries handled at once: 16 Philox blocks

// exp(r) = 1 + r + r^2 q(r) for |r| <= log(2) / 2, about 1e-7 relative. T: float, or a vector of them.
template <typename T>
inline T exp_remainder(T r) {
  T q = r * 1.9875691500e-4f + 1.3981999507e-3f;
  q = q * r + 8.3334519073e-3f;
  q = q * r + 4.1665795894e-2f;
  q = q * r + 1.6666665459e-1f;
  return q * r + 5.0000001201e-1f;
}

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
constexpr float kLog2High = 0.693145751953125f, kLog2Low = 1.428606765330187e-6f;  // log(2) in two parts

// x = n log(2) + r; kRound + n is returned, whose low bits are n.
inline float split_exponent(float x, float* r) {
  const float shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  *r = (x - n * kLog2High) - n * kLog2Low;
  return shifted;
}

inline float times_power_of_two(float p, float shifted) {
  return float_of_bits(bits_of_float(p) + ((bits_of_float(shifted) - 0x4B400000u) << 23));
}

// exp(x) for x <= 0, about 1e-7 relative; exp(-87) below -87. Branch-free, so loops over it vectorise.
inline float exp_negative(float x) {
  x = x < -87.0f ? -87.0f : x;
  float r;
  const float shifted = split_exponent(x, &r);
  return times_power_of_two((exp_remainder(r) * r) * r + r + 1.0f, shifted);
}

template <typename T>
inline void load_tile(const T* from, float* to) {
  for (int i = 0; i < kTile; ++i) to[i] = widen(from[i]);
}

inline void load_tile(const float* from, float* to) { std::memcpy(to, from, sizeof(float) * kTile); }

// Entries [start, start + 64) of a row, those past its end as `past`.
template <typename T>
inline void load(const T* row, std::int64_t start, std::int64_t entries, float* to, float past = -INFINITY) {
  if (start + kTile <= entries) {
    load_tile(row + start, to);
    return;
  }
  for (int i = 0; i < kTile; ++i) to[i] = start + i < entries ? widen(row[start + i]) : past;
}

inline float max_of_tile(const float* values) {
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = values[i];
  for (int j = 16; j < kTile; j += 16)
    for (int i = 0; i < 16; ++i) lanes[i] = lanes[i] < values[j + i] ? values[j + i] : lanes[i];
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] < lanes[i + width] ? lanes[i + width] : lanes[i];
  return lanes[0];
}

}  // namespace
}  // namespace PYUNICTOKENS_LEVEL
}  // namespace pyunictokens
