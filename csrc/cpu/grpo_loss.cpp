// grpo_loss.h on the CPU: fixed blocks of tokens shared among threads, their sums added in order.
#include "grpo_loss.h"

#include <algorithm>
#include <vector>

#include "rows.h"
#include "threads.h"

namespace pyunictokens {

void grpo_loss_cpu(const GrpoLossArgs& args, int threads, CpuLevel level) {
  constexpr std::int64_t kBlock = 4096;
  const auto block = rows_of(level).grpo;
  std::vector<GrpoSums> sums(std::size_t((args.tokens + kBlock - 1) / kBlock));
  parallel_for(args.tokens, kBlock, threads, [&](std::int64_t first, std::int64_t last) {
    block(args, first, last, &sums[std::size_t(first / kBlock)]);
  });
  GrpoSums all{};
  for (const GrpoSums& one : sums) {
    all.loss += one.loss;
    all.clipped += one.clipped;
    all.kl += one.kl;
    all.ratio += one.ratio;
    all.ratio_max = one.ratio_max <= all.ratio_max ? all.ratio_max : one.ratio_max;
    all.count += one.count;
  }
  const double count = double(std::max<std::int64_t>(all.count, 1));
  args.out[0] = float(all.loss);
  args.out[1] = float(all.clipped / count);
  args.out[2] = float(all.kl / count);
  args.out[3] = all.ratio_max;
  args.out[4] = float(all.ratio / count);
}

}  // namespace pyunictokens
