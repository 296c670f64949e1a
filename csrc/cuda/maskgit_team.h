// One MaskGIT step as a team of threads does it: row() chooses the code of one position, select() puts the least confident
// codes of one sample back to the mask. maskgit_step.cu runs it with a block per row; maskgit_emulated.cpp runs the same
// lines on the host, one thread of the team after the other. A Team offers
//
//   each(f)   f(thread) by every thread, then all wait        max(f), sum(f)   of f(thread), known to all
//   one(f)    f() by one of them, then all wait               raise, add, peek, fresh            memory they share
//
// so nothing that a thread keeps may live from one phase to the next: it is in Shared or in the result of max and sum.
//
// The race is that of the CPU core (maskgit_rows.h): argmax_k(e_k / E_k), e_k = exp(l_k - max l), with E >= v. The largest
// logit runs first. Eight entries that cannot win against it even with the smallest
// E = 2^-33 draw nothing; of the others only entries with e >= best v pay for a logarithm, which is a few of a row. Skipping
// never changes the winner, so the order in which threads arrive does not either. Everything else is done for every unknown
// entry, so its instructions are counted (.ci/aot.sh).
#pragma once

#include <cmath>
#include <cstdint>

#include "maskgit_step_cuda.h"
#include "noise.h"

#ifdef __CUDACC__
#define PYUNICTOKENS_TEAM __device__ __forceinline__
#else
#define PYUNICTOKENS_TEAM inline
#endif

namespace pyunictokens {
namespace team {

constexpr int kBins = 256, kSections = 16;
constexpr float kSlack = 0.9999f;  // what the tests below may lose to rounding; they only have to be necessary

struct Shared {
  unsigned long long winner;  // score of the race above, complement of the entry below
  PhiloxPrefix noise;         // of the token noise of this position
  std::uint32_t histogram[kBins], sections[kSections];
  unsigned long long limit;  // select(): the largest key that is masked
  std::int64_t remaining;
  bool found, last;
};

template <typename T>
struct alignas(16) Pack {
  static constexpr int kCount = 16 / int(sizeof(T));
  T value[kCount];
};

// Packs that go through the race together, so that what a round of it needs is paid for by eight entries: number p of each
// equal section of the row, which is read without gaps and without bank conflicts.
template <typename T>
constexpr std::uint32_t kTogether = 8 / Pack<T>::kCount;

// Packs of a row, up to a multiple of kTogether; what lies beyond the row is -inf.
template <typename T>
PYUNICTOKENS_HD constexpr std::int64_t packs_of(std::int64_t entries) {
  return (entries + 7) / 8 * kTogether<T>;
}

template <typename T>
struct Row {
  const T* logits;  // K numbers
  std::uint32_t entries, packs;
  bool aligned;    // the address is a multiple of 16
  Pack<T>* cache;  // room for all packs, or null: the row is read again where it is needed
};

PYUNICTOKENS_TEAM void minus_infinity(float* to) { *to = -INFINITY; }
PYUNICTOKENS_TEAM void minus_infinity(BFloat16* to) { to->bits = 0xFF80; }
PYUNICTOKENS_TEAM void minus_infinity(Float16* to) { to->bits = 0xFC00; }

// Packs that can be read as one vector of 16 bytes; the others are read entry by entry.
template <typename T>
PYUNICTOKENS_TEAM std::uint32_t whole_packs(const Row<T>& row) {
  return row.aligned ? row.entries / Pack<T>::kCount : 0;
}

template <typename T, bool cached>
PYUNICTOKENS_TEAM Pack<T> load_whole(const Row<T>& row, std::uint32_t pack) {
  Pack<T> to;
#ifdef __CUDA_ARCH__
  const uint4* from = reinterpret_cast<const uint4*>(row.logits) + pack;
  const uint4 bits = cached ? __ldcs(from) : __ldg(from);  // kept in shared memory: no other cache need hold it
  memcpy(&to, &bits, 16);
#else
  memcpy(&to, row.logits + std::int64_t(pack) * Pack<T>::kCount, 16);
#endif
  return to;
}

template <typename T>
PYUNICTOKENS_TEAM Pack<T> load_parts(const Row<T>& row, std::uint32_t pack) {
  Pack<T> to;
#pragma unroll
  for (int i = 0; i < Pack<T>::kCount; ++i) {
    const std::int64_t k = std::int64_t(pack) * Pack<T>::kCount + i;
    if (k < row.entries)
      to.value[i] = row.logits[k];
    else
      minus_infinity(&to.value[i]);
  }
  return to;
}

// All logits of a pack. Of two bfloat16 that lie in one word the upper is that word without its lower half.
template <typename T>
PYUNICTOKENS_TEAM void widen_all(const Pack<T>& pack, float* x) {
#pragma unroll
  for (int i = 0; i < Pack<T>::kCount; ++i) x[i] = widen(pack.value[i]);
}

PYUNICTOKENS_TEAM void widen_all(const Pack<BFloat16>& pack, float* x) {
  std::uint32_t words[4];
  memcpy(words, &pack, 16);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = float_of_bits(words[i] << 16);
    x[2 * i + 1] = float_of_bits(words[i] & 0xFFFF0000u);
  }
}

template <typename T>
PYUNICTOKENS_TEAM float largest_of(const Pack<T>& pack) {
  float x[Pack<T>::kCount];
  widen_all(pack, x);
#pragma unroll
  for (int wide = Pack<T>::kCount / 2; wide > 0; wide /= 2) {
#pragma unroll
    for (int i = 0; i < wide; ++i) x[i] = std::fmax(x[i], x[i + wide]);
  }
  return x[0];
}

#if defined(__CUDA_ARCH__)
// Two at a time, as the hardware takes the larger of 16-bit numbers.
PYUNICTOKENS_TEAM float largest_of(const Pack<BFloat16>& pack) {
  std::uint32_t words[4];
  memcpy(words, &pack, 16);
  asm("max.bf16x2 %0, %0, %1;" : "+r"(words[0]) : "r"(words[1]));
  asm("max.bf16x2 %0, %0, %1;" : "+r"(words[2]) : "r"(words[3]));
  asm("max.bf16x2 %0, %0, %1;" : "+r"(words[0]) : "r"(words[2]));
  const float low = float_of_bits(words[0] << 16), high = float_of_bits(words[0] & 0xFFFF0000u);
  return low < high ? high : low;
}

PYUNICTOKENS_TEAM float largest_of(const Pack<Float16>& pack) {
  std::uint32_t words[4];
  memcpy(words, &pack, 16);
  asm("max.f16x2 %0, %0, %1;" : "+r"(words[0]) : "r"(words[1]));
  asm("max.f16x2 %0, %0, %1;" : "+r"(words[2]) : "r"(words[3]));
  asm("max.f16x2 %0, %0, %1;" : "+r"(words[0]) : "r"(words[2]));
  const float low = widen(Float16{std::uint16_t(words[0])}), high = widen(Float16{std::uint16_t(words[0] >> 16)});
  return low < high ? high : low;
}
#endif

// One logit again, after the phase that filled the cache.
template <typename T, bool cached>
PYUNICTOKENS_TEAM float logit(const Row<T>& row, std::uint32_t entry) {
  return widen(cached ? row.cache[entry / Pack<T>::kCount].value[entry % Pack<T>::kCount] : row.logits[entry]);
}

constexpr float kLog2e = 1.44269504f, kFused = 0x1p16f;

// To about 1e-7 relative, 0 for -inf: for the sum and for tests with slack.
PYUNICTOKENS_TEAM float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// To about 1e-7 relative, without the slow path that numbers near the ends of the range would need.
PYUNICTOKENS_TEAM float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// An integer that sorts as the number does; -0 and +0 are one.
PYUNICTOKENS_TEAM std::uint32_t sortable(float value) {
  const std::uint32_t bits = bits_of_float(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

PYUNICTOKENS_TEAM float unsorted(std::uint32_t key) {
  return float_of_bits(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

PYUNICTOKENS_TEAM unsigned long long race_key(std::uint32_t score, std::uint32_t entry) {
  return (unsigned long long)(score) << 32 | (0xFFFFFFFFu - entry);
}

PYUNICTOKENS_TEAM float race_score(unsigned long long key) { return float_of_bits(std::uint32_t(key >> 32)); }

// product rounded, then sum rounded, as the reference does it: a tie there must be one here
PYUNICTOKENS_TEAM float sum_of_product(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(__fmul_rn(a, b), c);
#else
  const volatile float product = a * b;
  return product + c;
#endif
}

// What one position needs to know besides its logits.
struct Position {
  std::int64_t known;  // the code that stands here, or -1
  PhiloxBlock counter;
  std::uint64_t seed;
  const float* gumbel;  // K explicit values, or null
};

// Entry i of a round that begins with the pack `pack`.
template <typename T>
PYUNICTOKENS_TEAM std::uint32_t entry_of(const Row<T>& row, std::uint32_t pack, int i) {
  constexpr int kCount = Pack<T>::kCount;
  return kCount * (pack + std::uint32_t(i / kCount) * (row.packs / kTogether<T>)) + std::uint32_t(i % kCount);
}

// The entries of one round run, with e = exp(x - top) up to the common factor that `slack` knows. `best`, slack times the best
// score, was true a moment ago. The blocks are formed together, so that they share the keys. The few entries that may take
// the lead read their logit again: eight fewer registers for all others.
template <class Team, typename T, bool cached>
PYUNICTOKENS_TEAM void race_packs(const Row<T>& row, std::uint32_t pack, float top, const float* e, float best,
                                  float slack, const PhiloxKeys& rounds, Shared& shared) {
  constexpr int kEntries = kTogether<T> * Pack<T>::kCount;
  const PhiloxPrefix prefix = shared.noise;
  PhiloxBlock noise[kEntries / 4];
  bool runs = false;
#pragma unroll
  for (int g = 0; g < kEntries / 4; ++g) {
    noise[g] = philox4x32(prefix, entry_of(row, pack, 4 * g) / 4, rounds);
  }
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    const float one_more = float_of_bits(noise[i / 4].word[i % 4] >> 9 | 0x3F800000u);  // 1 + at most the v of noise.h
    runs |= e[i] >= std::fma(best, one_more, -best);
  }
  if (!runs) return;
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    const std::uint32_t word = noise[i / 4].word[i % 4];
    const float v = float_of_bits(word >> 9 | 0x3F800000u) - 1.0f;
    const std::uint32_t entry = entry_of(row, pack, i);
    if (!(e[i] >= slack * race_score(Team::peek(&shared.winner)) * v) || entry >= row.entries) continue;
    const float score = quotient(std::exp(logit<T, cached>(row, entry) - top), noise_exponential(word));
    Team::raise(&shared.winner, race_key(bits_of_float(score), entry));
  }
}

// Largest logit of a thread's packs and the first pack that holds it; fills the cache on the way.
template <typename T, bool cached>
PYUNICTOKENS_TEAM unsigned long long top_of_thread(const Row<T>& row, std::uint32_t thread, std::uint32_t threads) {
  if (thread >= row.packs) return 0;
  float best = -INFINITY;
  std::uint32_t where = thread, pack = thread;
  const auto take = [&](const Pack<T>& raw) {
    if (cached) row.cache[pack] = raw;
    const float largest = largest_of(raw);
    where = largest > best ? pack : where;
    best = largest > best ? largest : best;
  };
  const std::uint32_t whole = whole_packs(row);
#pragma unroll 4
  for (; pack < whole; pack += threads) take(load_whole<T, cached>(row, pack));
  for (; pack < row.packs; pack += threads) take(load_parts(row, pack));
  return race_key(sortable(best), where);
}

// A thread's share of the sum of exponentials and of the race.
//
// fused: one rounding for x log2 e - top log2 e, at the price of a common factor 1 / scale, by which the rounding of the
// second product multiplies every e: taken into the slack of the race, and out of the sum at the end. That factor is near 1
// where |top| is below kFused, as it is for every model's logits.
template <class Team, typename T, bool cached, bool fused>
PYUNICTOKENS_TEAM float sum_of_thread(const Row<T>& row, const Position& at, const PhiloxKeys& rounds, float top,
                                      std::uint32_t thread, std::uint32_t threads, Shared& shared) {
  constexpr int kCount = Pack<T>::kCount, kEntries = kTogether<T> * kCount;
  const bool draw = at.known < 0 && at.gumbel == nullptr, given = at.known < 0 && at.gumbel != nullptr;
  const float shift = top * kLog2e, scale = fused ? power_of_two(std::fma(top, -kLog2e, shift)) : 1.0f;
  const float slack = kSlack / scale;
  float sum = 0.0f, best_given = -INFINITY;
  std::uint32_t entry = 0;
  const std::uint32_t whole = whole_packs(row), section = row.packs / kTogether<T>;
  for (std::uint32_t pack = thread; pack < section; pack += threads) {
    const float best = draw ? slack * race_score(Team::peek(&shared.winner)) : INFINITY;
    float x[kEntries], e[kEntries], part = 0.0f;
#pragma unroll
    for (std::uint32_t t = 0; t < kTogether<T>; ++t) {
      const std::uint32_t one = pack + t * section;
      const Pack<T> raw = cached        ? row.cache[one]
                          : one < whole ? load_whole<T, cached>(row, one)
                                        : load_parts(row, one);
      widen_all(raw, x + t * kCount);
    }
#pragma unroll
    for (int i = 0; i < kEntries; ++i)
      e[i] = power_of_two(fused ? std::fma(x[i], kLog2e, -shift) : (x[i] - top) * kLog2e);
#pragma unroll
    for (int i = 0; i < kEntries; i += 2) part += e[i] + e[i + 1];
    sum += part;
    if (part >= 0x1p-33f * best)  // at least the largest e, so a test that is only necessary
      race_packs<Team, T, cached>(row, pack, top, e, best, slack, rounds, shared);
    if (given) {
      for (int i = 0; i < kEntries; ++i) {
        const std::uint32_t k = entry_of(row, pack, i);
        if (k >= row.entries) continue;
        const float score = logit<T, cached>(row, k) + at.gumbel[k];
        // a thread does not meet its entries in order, and a tie goes to the first
        entry = score > best_given || (score == best_given && k < entry) ? k : entry;
        best_given = score > best_given ? score : best_given;
      }
    }
  }
  if (given && best_given > -INFINITY) Team::raise(&shared.winner, race_key(sortable(best_given), entry));
  return sum * scale;
}

struct Choice {
  std::int64_t chosen;
  float logp;
};

// The code of one position and its log-probability. Every thread of the team calls it and gets the answer.
template <class Team, typename T, bool cached>
PYUNICTOKENS_TEAM Choice choose(const Team& team, const Row<T>& row, const Position& at, const PhiloxKeys& rounds,
                                Shared& shared) {
  const std::uint32_t threads = team.size();
  const unsigned long long top_key =
      team.max([&](std::uint32_t thread) { return top_of_thread<T, cached>(row, thread, threads); });
  const float top = unsorted(std::uint32_t(top_key >> 32));
  team.one([&] {
    const std::uint32_t pack = 0xFFFFFFFFu - std::uint32_t(top_key);
    std::uint32_t entry = Pack<T>::kCount * pack;
    for (int i = Pack<T>::kCount - 1; i >= 0; --i) {
      const std::uint32_t k = Pack<T>::kCount * pack + std::uint32_t(i);
      if (k < row.entries && logit<T, cached>(row, k) == top) entry = k;
    }
    const bool draw = at.known < 0 && at.gumbel == nullptr;
    const float score = draw ? quotient(1.0f, noise_exponential(noise_word(at.counter, entry, at.seed))) : 0.0f;
    shared.winner = race_key(bits_of_float(score), entry);
    shared.noise = philox_prefix(at.counter, rounds);
  });
  const float sum = team.sum([&](std::uint32_t thread) {
    return std::fabs(top) < kFused
               ? sum_of_thread<Team, T, cached, true>(row, at, rounds, top, thread, threads, shared)
               : sum_of_thread<Team, T, cached, false>(row, at, rounds, top, thread, threads, shared);
  });
  const std::int64_t chosen = at.known >= 0 ? at.known : std::int64_t(0xFFFFFFFFu - std::uint32_t(shared.winner));
  // A code beyond K is an error that only the CPU looks for: here it must not read beyond the row.
  const float x = chosen < row.entries ? logit<T, cached>(row, std::uint32_t(chosen)) : NAN;
  return {chosen, (x - top) - std::log(sum)};
}

// The choice of row (b, n), its outputs, and its key for select().
template <class Team, typename T, bool cached>
PYUNICTOKENS_TEAM void row(const Team& team, const MaskgitStepCudaArgs& all, std::uint32_t b, std::uint32_t n,
                           Pack<T>* cache, Shared& shared) {
  const MaskgitStepArgs& args = all.step;
  const std::int64_t r = std::int64_t(b) * args.positions + n;
  Row<T> row;
  row.logits = static_cast<const T*>(args.logits) + (b * args.stride_batch + n * args.stride_position);
  row.entries = std::uint32_t(args.entries);
  row.packs = std::uint32_t(packs_of<T>(args.entries));
  row.aligned = reinterpret_cast<std::uintptr_t>(row.logits) % 16 == 0;
  row.cache = cache;
  const std::uint64_t sample = std::uint64_t(args.sample_ids[b * all.sample_stride]);
  const std::uint32_t step = std::uint32_t(args.step[b * all.step_stride]);
  const Position at{args.codes[r], noise_counter(sample, step, n, args.stream), args.seed,
                    args.token_gumbel ? args.token_gumbel + r * args.entries : nullptr};
  const Choice choice = choose<Team, T, cached>(team, row, at, all.rounds, shared);
  team.one([&] {
    args.out_chosen[r] = choice.chosen;
    args.out_logp[r] = choice.logp;
    if (at.known >= 0) return;
    const float noise =
        args.rank_gumbel != nullptr
            ? args.rank_gumbel[r]
            : -std::log(noise_exponential(noise_word(noise_counter(sample, step, n, kRankStream), 0, args.seed)));
    all.keys[r] = sortable(sum_of_product(args.temperature[b * all.temperature_stride], noise, choice.logp));
  });
}

// (confidence, position) of a row as one number; no two are equal.
template <class Team>
PYUNICTOKENS_TEAM unsigned long long rank_key(const std::uint32_t* keys, std::uint32_t n) {
  return (unsigned long long)(Team::fresh(keys + n)) << 16 | n;
}

// Radix select, eight bits at a time from the top, of the mask_len smallest keys among the unknown; then the write-back.
template <class Team>
PYUNICTOKENS_TEAM void select(const Team& team, const MaskgitStepCudaArgs& all, std::uint32_t b, Shared& shared) {
  const MaskgitStepArgs& args = all.step;
  const std::uint32_t threads = team.size(), positions = std::uint32_t(args.positions);
  const std::int64_t base = std::int64_t(b) * args.positions;
  const std::int64_t* codes = args.codes + base;
  const std::uint32_t* keys = all.keys + base;
  for (int shift = 40; shift >= 0; shift -= 8) {
    team.each([&](std::uint32_t thread) {
      for (std::uint32_t i = thread; i < kBins; i += threads) shared.histogram[i] = 0;
    });
    team.each([&](std::uint32_t thread) {
      for (std::uint32_t n = thread; n < positions; n += threads) {
        if (codes[n] >= 0) continue;
        const unsigned long long key = rank_key<Team>(keys, n);
        if (shift < 40 && key >> (shift + 8) != shared.limit >> (shift + 8)) continue;
        Team::add(&shared.histogram[key >> shift & 255], 1);
      }
    });
    team.each([&](std::uint32_t thread) {
      for (std::uint32_t s = thread; s < kSections; s += threads) {
        std::uint32_t sum = 0;
        for (std::uint32_t i = 0; i < kBins / kSections; ++i) sum += shared.histogram[kBins / kSections * s + i];
        shared.sections[s] = sum;
      }
    });
    team.one([&] {
      if (shift == 40) {
        std::int64_t unknown = 0;
        for (int s = 0; s < kSections; ++s) unknown += shared.sections[s];
        const std::int64_t wanted = args.mask_len[b * all.mask_len_stride];
        shared.remaining = wanted < unknown ? wanted : unknown;
        shared.limit = 0;
        shared.found = shared.remaining <= 0;  // nothing to mask
        if (shared.found) return;
      }
      std::int64_t rest = shared.remaining;
      std::uint32_t s = 0, bin;
      while (rest > shared.sections[s]) rest -= shared.sections[s++];
      bin = kBins / kSections * s;
      while (rest > shared.histogram[bin]) rest -= shared.histogram[bin++];
      shared.limit |= (unsigned long long)(bin) << shift;
      shared.remaining = rest;
      shared.found = rest == shared.histogram[bin];  // the whole bin, whatever its lower bits
      if (shared.found) shared.limit |= (1ull << shift) - 1;
    });
    if (shared.found) break;
  }
  team.each([&](std::uint32_t thread) {
    for (std::uint32_t n = thread; n < positions; n += threads) {
      const bool masked = codes[n] < 0 && shared.remaining > 0 && rank_key<Team>(keys, n) <= shared.limit;
      args.out_codes[base + n] = masked ? -1 : Team::fresh(args.out_chosen + base + n);
      args.out_masked[base + n] = masked;
    }
  });
}

}  // namespace team
}  // namespace pyunictokens
