// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3"
// (SC'11). A pure function of (counter, key): no state, so any thread, backend or batch can form any number on its own.
// How counters are laid out over samples, steps and codes is said in noise.h.
#pragma once

#include <cstdint>

#include "portable.h"

namespace pyunictokens {

constexpr std::uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // round multipliers
constexpr std::uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // key increments
constexpr int kPhiloxRounds = 10;

struct PhiloxBlock {
  std::uint32_t word[4];
};

PYUNICTOKENS_HD static inline PhiloxBlock philox4x32(PhiloxBlock counter, std::uint32_t key0, std::uint32_t key1) {
  std::uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const std::uint64_t p0 = std::uint64_t(kPhiloxM0) * c0, p1 = std::uint64_t(kPhiloxM1) * c2;
    c0 = std::uint32_t(p1 >> 32) ^ c1 ^ key0;
    c1 = std::uint32_t(p1);
    c2 = std::uint32_t(p0 >> 32) ^ c3 ^ key1;
    c3 = std::uint32_t(p0);
    key0 += kPhiloxW0;
    key1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// The keys of every round, for who forms many blocks under one seed: a GPU reads them as constants, and a round is then two
// products and two logical operations.
struct PhiloxKeys {
  std::uint32_t word[2 * kPhiloxRounds];
};

PYUNICTOKENS_HD static inline PhiloxKeys philox_keys(std::uint64_t seed) {
  PhiloxKeys keys;
  for (std::uint32_t round = 0; round < std::uint32_t(kPhiloxRounds); ++round) {
    keys.word[2 * round] = std::uint32_t(seed) + round * kPhiloxW0;
    keys.word[2 * round + 1] = std::uint32_t(seed >> 32) + round * kPhiloxW1;
  }
  return keys;
}

PYUNICTOKENS_HD static inline PhiloxBlock philox4x32(PhiloxBlock counter, const PhiloxKeys& keys) {
  std::uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const std::uint64_t p0 = std::uint64_t(kPhiloxM0) * c0, p1 = std::uint64_t(kPhiloxM1) * c2;
    c0 = std::uint32_t(p1 >> 32) ^ c1 ^ keys.word[2 * round];
    c1 = std::uint32_t(p1);
    c2 = std::uint32_t(p0 >> 32) ^ c3 ^ keys.word[2 * round + 1];
    c3 = std::uint32_t(p0);
  }
  return {{c0, c1, c2, c3}};
}

// What blocks whose counters differ in the lower bits of their last word alone have in common. That word does not reach all
// others before the fourth round: of the first three rounds two products are left to each block, and no key.
struct PhiloxPrefix {
  std::uint32_t word[5];
};

PYUNICTOKENS_HD static inline PhiloxPrefix philox_prefix(const PhiloxBlock& counter, const PhiloxKeys& keys) {
  const std::uint64_t p0 = std::uint64_t(kPhiloxM0) * counter.word[0], p1 = std::uint64_t(kPhiloxM1) * counter.word[2];
  const std::uint64_t q0 = std::uint64_t(kPhiloxM0) * (std::uint32_t(p1 >> 32) ^ counter.word[1] ^ keys.word[0]);
  const std::uint64_t r1 = std::uint64_t(kPhiloxM1) * (std::uint32_t(q0 >> 32) ^ std::uint32_t(p0) ^ keys.word[3]);
  return {{std::uint32_t(p0 >> 32) ^ counter.word[3] ^ keys.word[1], std::uint32_t(p1) ^ keys.word[2],
           std::uint32_t(r1 >> 32) ^ keys.word[4], std::uint32_t(q0) ^ keys.word[5], std::uint32_t(r1) ^ keys.word[6]}};
}

// philox4x32 of the counter that `prefix` was made of, with `low` in its last word: bits that are zero there.
PYUNICTOKENS_HD static inline PhiloxBlock philox4x32(const PhiloxPrefix& prefix, std::uint32_t low,
                                                     const PhiloxKeys& keys) {
  const std::uint64_t second = std::uint64_t(kPhiloxM1) * (prefix.word[0] ^ low);
  const std::uint64_t third = std::uint64_t(kPhiloxM0) * (std::uint32_t(second >> 32) ^ prefix.word[1]);
  std::uint64_t p0 = std::uint64_t(kPhiloxM0) * (std::uint32_t(second) ^ prefix.word[2]);
  std::uint64_t p1 = std::uint64_t(kPhiloxM1) * (std::uint32_t(third >> 32) ^ prefix.word[3]);
  std::uint32_t c0 = std::uint32_t(p1 >> 32) ^ prefix.word[4], c1 = std::uint32_t(p1);
  std::uint32_t c2 = std::uint32_t(p0 >> 32) ^ std::uint32_t(third) ^ keys.word[7], c3 = std::uint32_t(p0);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 4; round < kPhiloxRounds; ++round) {
    p0 = std::uint64_t(kPhiloxM0) * c0;
    p1 = std::uint64_t(kPhiloxM1) * c2;
    c0 = std::uint32_t(p1 >> 32) ^ c1 ^ keys.word[2 * round];
    c1 = std::uint32_t(p1);
    c2 = std::uint32_t(p0 >> 32) ^ c3 ^ keys.word[2 * round + 1];
    c3 = std::uint32_t(p0);
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace pyunictokens
