// Which random number belongs to which choice: the layout every backend follows (docs/ops.md says it for readers).
//
//   key     = (seed[31:0], seed[63:32])
//   counter = (sample[31:0], sample[63:32], step << 16 | position, stream << 28 | lane / 4),   word = lane % 4
//
// sample is the caller's own id of a rollout, never its place in a batch, so a rollout draws the same noise in any batch.
// A word w becomes v = min((float32(w) + 0.5) * 2^-32, 1 - 2^-24), every operation rounded to nearest even: in (0, 1) and
// the same bits everywhere. u = 1 - v is the uniform, E = -log(u) = -log1p(-v) an exponential variate, -log(E) a Gumbel
// one. Going through v keeps the upper Gumbel tail, the one that argmax looks at, at full relative precision.
#pragma once

#include <cmath>
#include <cstdint>

#include "philox.h"

namespace pyunictokens {

enum NoiseStream : std::uint32_t {
  kTokenStream = 0,  // lane k: codebook entry k at this position
  kRankStream = 1,   // lane 0: the re-masking noise of this position
  kTextStream = 2,   // position 0, lane k: vocabulary entry k of answer token `step`
};

constexpr std::int64_t kMaxStep = 65535, kMaxPosition = 65535;
constexpr std::int64_t kMaxLanes = std::int64_t(1) << 30;

PYUNICTOKENS_HD static inline PhiloxBlock noise_counter(std::uint64_t sample, std::uint32_t step,
                                                        std::uint32_t position, std::uint32_t stream) {
  return {{std::uint32_t(sample), std::uint32_t(sample >> 32), step << 16 | position, stream << 28}};
}

PYUNICTOKENS_HD static inline std::uint32_t noise_word(PhiloxBlock counter, std::uint32_t lane, std::uint64_t seed) {
  counter.word[3] |= lane >> 2;
  counter = philox4x32(counter, std::uint32_t(seed), std::uint32_t(seed >> 32));
  const std::uint32_t* word = counter.word;  // no index from a variable: on a GPU it would send the block to memory
  return lane & 2 ? (lane & 1 ? word[3] : word[2]) : (lane & 1 ? word[1] : word[0]);
}

PYUNICTOKENS_HD static inline float noise_exponential(std::uint32_t word) {
  const float v = (float(word) + 0.5f) * 0x1p-32f, limit = 1.0f - 0x1p-24f;
  return -std::log1p(-(v < limit ? v : limit));
}

}  // namespace pyunictokens
