// maskgit_step on the CPU: rows shared among threads, then per sample the choice of what is masked again.
#include "maskgit_step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "noise.h"
#include "rows.h"
#include "threads.h"

namespace pyunictokens {
namespace {

// (confidence, position) as one integer that sorts the same way: the least confident first, then the lowest position.
std::uint64_t sort_key(float confidence, std::int64_t position) {
  confidence += 0.0f;  // -0 becomes +0, which is its equal
  std::uint32_t bits;
  std::memcpy(&bits, &confidence, 4);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return std::uint64_t(bits) << 32 | std::uint64_t(position);
}

void mask_again(const MaskgitStepArgs& args, std::int64_t b) {
  const std::int64_t n_positions = args.positions, base = b * n_positions;
  std::vector<std::uint64_t> keys;
  keys.reserve(std::size_t(n_positions));
  for (std::int64_t n = 0; n < n_positions; ++n) {
    args.out_codes[base + n] = args.out_chosen[base + n];
    args.out_masked[base + n] = false;
    if (args.codes[base + n] >= 0) continue;
    float noise;
    if (args.rank_gumbel != nullptr) {
      noise = args.rank_gumbel[base + n];
    } else {
      const PhiloxBlock counter =
          noise_counter(std::uint64_t(args.sample_ids[b]), std::uint32_t(args.step[b]), std::uint32_t(n), kRankStream);
      noise = -std::log(noise_exponential(noise_word(counter, 0, args.seed)));
    }
    // Not one fused operation: the reference rounds the product too, and a tie there must be one here.
    const volatile float scaled = args.temperature[b] * noise;
    keys.push_back(sort_key(args.out_logp[base + n] + scaled, n));
  }
  const std::size_t count = std::size_t(std::min<std::int64_t>(args.mask_len[b], std::int64_t(keys.size())));
  if (count < keys.size()) std::nth_element(keys.begin(), keys.begin() + std::ptrdiff_t(count), keys.end());
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t n = std::int64_t(keys[i] & 0xFFFFFFFFu);
    args.out_codes[base + n] = -1;
    args.out_masked[base + n] = true;
  }
}

}  // namespace

void maskgit_step_cpu(const MaskgitStepArgs& args, int threads, CpuLevel level) {
  const auto row = rows_of(level).maskgit;
  const std::int64_t rows = args.batch * args.positions;
  const std::size_t element = args.type == FloatType::kFloat32 ? 4 : 2;
  const std::int64_t grain = std::max<std::int64_t>(1, 32768 / args.entries);  // pieces of about ten microseconds
  parallel_for(rows, grain, threads, [&](std::int64_t first, std::int64_t last) {
    std::vector<float> tile_max(std::size_t(args.entries / 64 + 1));
    for (std::int64_t r = first; r < last; ++r) {
      const std::int64_t b = r / args.positions, n = r % args.positions;
      const RowTask task{args.entries,
                         args.codes[r],
                         args.seed,
                         std::uint64_t(args.sample_ids[b]),
                         std::uint32_t(args.step[b]),
                         std::uint32_t(n),
                         args.stream,
                         args.token_gumbel ? args.token_gumbel + r * args.entries : nullptr};
      const char* logits = static_cast<const char*>(args.logits) +
                           std::size_t(b * args.stride_batch + n * args.stride_position) * element;
      row(logits, args.type, task, tile_max.data(), args.out_chosen + r, args.out_logp + r);
    }
  });
  parallel_for(args.batch, std::max<std::int64_t>(1, 1024 / args.positions), threads,
               [&](std::int64_t first, std::int64_t last) {
                 for (std::int64_t b = first; b < last; ++b) mask_again(args, b);
               });
}

}  // namespace pyunictokens
