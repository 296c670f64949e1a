// The inner loop of maskgit_step: one row of K logits -> one code and its log-probability. Compiled per instruction set
// (all_rows.h).
//
// Choosing argmax_k(l_k + g_k), g = -log(E), is choosing argmax_k(e_k / E_k) with e_k = exp(l_k - max l), and the e_k are
// needed for the softmax anyway. Because E >= v, an entry can only win against the best score so far if e >= best * v. That
// test needs no logarithm, so of a few thousand entries about ten pay for one. The race starts with the largest logit as
// the one to beat; a tile whose largest logit cannot win even with the smallest possible E = 2^-33 draws no noise at all.
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "lanes.h"
#include "noise.h"
#include "rows.h"

namespace pyunictokens {
namespace PYUNICTOKENS_LEVEL {
namespace {

// The 64 words of blocks first .. first + 15: out[4 * j + w] is word w of block first + j.
// With vectors, a 64-bit lane holds one 32-bit word of the state and, above it, bits that nothing reads: the widening
// multiply takes the lower halves only. Two sets of blocks, `a` and `b`, then share a vector of words; the blocks are dealt
// out so that transposing inside 128-bit lanes leaves the words in order.
#if defined(__AVX512F__)

inline void philox_tile(PhiloxBlock counter, std::uint32_t first, std::uint64_t seed, std::uint32_t* out) {
  __m512i state[2][4], *a = state[0], *b = state[1];
  for (int w = 0; w < 4; ++w) a[w] = b[w] = _mm512_set1_epi64(std::int64_t(counter.word[w]));
  const __m512i base = _mm512_set1_epi64(std::int64_t(counter.word[3] | first));
  a[3] = _mm512_add_epi64(base, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11));
  b[3] = _mm512_add_epi64(base, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15));
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  std::uint32_t k0 = std::uint32_t(seed), k1 = std::uint32_t(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
    for (auto& c : state) {
      const __m512i p0 = _mm512_mul_epu32(c[0], m0), p1 = _mm512_mul_epu32(c[2], m1);
      c[0] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c[1], key0, 0x96);  // exclusive or of three
      c[2] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c[3], key1, 0x96);
      c[1] = p1;
      c[3] = p0;
    }
  }
  for (int w = 0; w < 4; ++w) a[w] = _mm512_mask_blend_epi32(0xAAAA, a[w], _mm512_slli_epi64(b[w], 32));
  const __m512i low01 = _mm512_unpacklo_epi32(a[0], a[1]), high01 = _mm512_unpackhi_epi32(a[0], a[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(a[2], a[3]), high23 = _mm512_unpackhi_epi32(a[2], a[3]);
  _mm512_storeu_si512(out, _mm512_unpacklo_epi64(low01, low23));
  _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(low01, low23));
  _mm512_storeu_si512(out + 32, _mm512_unpacklo_epi64(high01, high23));
  _mm512_storeu_si512(out + 48, _mm512_unpackhi_epi64(high01, high23));
}

#elif defined(__AVX2__)

inline void philox_half_tile(PhiloxBlock counter, std::uint32_t first, std::uint64_t seed, std::uint32_t* out) {
  __m256i state[2][4], *a = state[0], *b = state[1];
  for (int w = 0; w < 4; ++w) a[w] = b[w] = _mm256_set1_epi64x(std::int64_t(counter.word[w]));
  const __m256i base = _mm256_set1_epi64x(std::int64_t(counter.word[3] | first));
  a[3] = _mm256_add_epi64(base, _mm256_setr_epi64x(0, 4, 1, 5));
  b[3] = _mm256_add_epi64(base, _mm256_setr_epi64x(2, 6, 3, 7));
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  std::uint32_t k0 = std::uint32_t(seed), k1 = std::uint32_t(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
    for (auto& c : state) {
      const __m256i p0 = _mm256_mul_epu32(c[0], m0), p1 = _mm256_mul_epu32(c[2], m1);
      c[0] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c[1]), key0);
      c[2] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c[3]), key1);
      c[1] = p1;
      c[3] = p0;
    }
  }
  for (int w = 0; w < 4; ++w) a[w] = _mm256_blend_epi32(a[w], _mm256_slli_epi64(b[w], 32), 0xAA);
  const __m256i low01 = _mm256_unpacklo_epi32(a[0], a[1]), high01 = _mm256_unpackhi_epi32(a[0], a[1]);
  const __m256i low23 = _mm256_unpacklo_epi32(a[2], a[3]), high23 = _mm256_unpackhi_epi32(a[2], a[3]);
  __m256i* to = reinterpret_cast<__m256i*>(out);
  _mm256_storeu_si256(to, _mm256_unpacklo_epi64(low01, low23));
  _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi64(low01, low23));
  _mm256_storeu_si256(to + 2, _mm256_unpacklo_epi64(high01, high23));
  _mm256_storeu_si256(to + 3, _mm256_unpackhi_epi64(high01, high23));
}

inline void philox_tile(PhiloxBlock counter, std::uint32_t first, std::uint64_t seed, std::uint32_t* out) {
  philox_half_tile(counter, first, seed, out);
  philox_half_tile(counter, first + 8, seed, out + 32);
}

#else

inline void philox_tile(PhiloxBlock counter, std::uint32_t first, std::uint64_t seed, std::uint32_t* out) {
  for (std::uint32_t block = 0; block < 16; ++block) {
    PhiloxBlock at = counter;
    at.word[3] |= first + block;
    at = philox4x32(at, std::uint32_t(seed), std::uint32_t(seed >> 32));
    for (int w = 0; w < 4; ++w) out[4 * block + w] = at.word[w];
  }
}

#endif

// The best entry so far of the race, and what an entry must reach to beat it.
struct Race {
  std::int64_t entry;
  double score;
  float test;       // e >= float(word) * test is necessary for winning
  float tile_test;  // a tile whose largest logit lies this far or more below the row's cannot win

  void lead(std::int64_t new_entry, double new_score) {
    entry = new_entry;
    score = new_score;
    test = float(new_score * 0x1p-32 * 0.999999);
    tile_test = float(std::log(new_score) - 22.9);  // log(2^33) = 22.87
  }
};

template <typename T>
void one_row(const T* row, const RowTask& task, float* tile_max, std::int64_t* chosen, float* logp) {
  const std::int64_t entries = task.entries, tiles = (entries + kTile - 1) / kTile;
  float x[kTile], e[kTile], sums[kTile] = {};
  std::int64_t top_tile = 0;
  for (std::int64_t t = 0; t < tiles; ++t) {
    load(row, t * kTile, entries, x);
    tile_max[t] = max_of_tile(x);
    if (tile_max[t] > tile_max[top_tile]) top_tile = t;
  }
  const float top = tile_max[top_tile];
  std::int64_t top_entry = top_tile * kTile;
  while (top_entry < entries - 1 && widen(row[top_entry]) != top) ++top_entry;

  const bool draw = task.known < 0 && task.gumbel == nullptr;
  const PhiloxBlock counter = noise_counter(task.sample, task.step, task.position, task.stream);
  Race race{top_entry, 0.0, 0.0f, 0.0f};
  if (draw)
    race.lead(top_entry, 1.0 / double(noise_exponential(noise_word(counter, std::uint32_t(top_entry), task.seed))));

  float best = -INFINITY;  // of the explicit noise
  for (std::int64_t t = 0; t < tiles; ++t) {
    const std::int64_t start = t * kTile;
    load(row, start, entries, x);
    for (int i = 0; i < kTile; ++i) {
      e[i] = exp_negative(x[i] - top);
      sums[i] += e[i];
    }
    if (draw && !(tile_max[t] - top < race.tile_test)) {
      std::uint32_t words[kTile];
      philox_tile(counter, std::uint32_t(start >> 2), task.seed, words);
      int open = 0;
      const float test = race.test;
      for (int i = 0; i < kTile; ++i) {
        // float(word), rounded once, in operations every instruction set has
        const float word = float(std::int32_t(words[i] >> 16)) * 65536.0f + float(std::int32_t(words[i] & 0xFFFFu));
        open |= e[i] >= word * test;
      }
      for (int i = 0; open && i < kTile && start + i < entries; ++i) {
        if (!(e[i] >= float(words[i]) * race.test)) continue;
        const double score = double(e[i]) / double(noise_exponential(words[i]));
        if (score > race.score || (score == race.score && start + i < race.entry)) race.lead(start + i, score);
      }
    } else if (task.known < 0 && task.gumbel != nullptr) {
      for (int i = 0; i < kTile && start + i < entries; ++i) {
        const float score = x[i] + task.gumbel[start + i];
        if (score > best) {
          best = score;
          race.entry = start + i;
        }
      }
    }
  }
  double sum = 0.0;
  for (int i = 0; i < kTile; ++i) sum += double(sums[i]);
  *chosen = task.known >= 0 ? task.known : race.entry;
  *logp = float(double(widen(row[*chosen])) - double(top) - std::log(sum));
}

void maskgit_row(const void* logits, FloatType type, const RowTask& task, float* tile_max, std::int64_t* chosen,
                 float* logp) {
  if (type == FloatType::kFloat32)
    one_row(static_cast<const float*>(logits), task, tile_max, chosen, logp);
  else if (type == FloatType::kBFloat16)
    one_row(static_cast<const BFloat16*>(logits), task, tile_max, chosen, logp);
  else
    one_row(static_cast<const Float16*>(logits), task, tile_max, chosen, logp);
}

}  // namespace
}  // namespace PYUNICTOKENS_LEVEL
}  // namespace pyunictokens
