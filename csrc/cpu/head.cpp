// head.h on the CPU: pieces of each product shared among threads. Which thread does a piece changes nothing of its result.
#include "head.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "rows.h"
#include "threads.h"

namespace pyunictokens {
namespace {

constexpr std::int64_t kEntries = 48;  // of a piece: what a thread packs for itself, to be multiplied with every token

std::int64_t groups(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

// Calls body(first, last, inner_first, inner_last, scratch) for pieces that cover outer x inner: `grain` items of the outer
// range with all of the inner one, or with a part where there would be fewer than four pieces a thread.
template <typename Body>
void share(std::int64_t outer, std::int64_t grain, std::int64_t inner, std::size_t scratch, int threads,
           const Body& body) {
  const std::int64_t pieces = groups(outer, grain);
  const std::int64_t parts = std::min<std::int64_t>(inner, groups(4 * threads, pieces));
  parallel_for(pieces * parts, 1, threads, [&](std::int64_t first, std::int64_t last) {
    const auto room = std::unique_ptr<float[]>(new float[scratch + 16]);
    float* aligned = room.get() + (64 - reinterpret_cast<std::uintptr_t>(room.get()) % 64) / sizeof(float) % 16;
    for (std::int64_t each = first; each < last; ++each) {
      const std::int64_t piece = each / parts, part = each % parts;
      body(piece * grain, std::min(outer, (piece + 1) * grain), inner * part / parts, inner * (part + 1) / parts,
           aligned);
    }
  });
}

struct Head {
  const HeadArgs& args;
  const Rows& rows;
  int threads;

  std::int64_t token_panels() const { return groups(args.rows, rows.panel); }
  std::int64_t column_panels() const { return groups(args.width, rows.panel); }

  template <typename Body>
  void panels(std::int64_t count, const Body& body) const {
    parallel_for(count, 1, threads, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t panel = first; panel < last; ++panel) body(panel);
    });
  }

  void pack_tokens() const {
    panels(token_panels(), [&](std::int64_t panel) { rows.pack_tokens(args, panel); });
  }

  // Calls body(block) for one block of entries after the other.
  template <typename Body>
  void blocks(const Body& body) const {
    const std::int64_t size = args.weight_type == FloatType::kFloat32 ? 4 : 2;
    for (std::int64_t first = 0; first < args.entries; first += args.block) {
      HeadBlock block{args, first};
      block.entries = std::min(args.block, args.entries - first);
      block.weight = static_cast<const char*>(args.weight) + first * args.width * size;
      block.bias = args.bias == nullptr ? nullptr : args.bias + first;
      body(block);
    }
  }

  void scores(const HeadBlock& block) const {
    share(block.entries, kEntries, token_panels(), std::size_t(kEntries * padded(args.width)), threads,
          [&](std::int64_t first, std::int64_t last, std::int64_t first_panel, std::int64_t last_panel,
              float* scratch) { rows.score_piece(block, first, last, first_panel, last_panel, scratch); });
  }
};

}  // namespace

void head_logprob_cpu(const HeadArgs& args, float* lse, float* logp, float* entropy, int threads, CpuLevel level) {
  const Head head{args, rows_of(level), threads};
  std::vector<HeadSums> sums(std::size_t(args.rows), HeadSums{-INFINITY, -INFINITY, 0.0, 0.0});
  head.pack_tokens();
  head.blocks([&](const HeadBlock& block) {
    head.scores(block);
    head.panels(head.token_panels(),
                [&](std::int64_t panel) { head.rows.sums_panel(block, panel, sums.data(), entropy != nullptr); });
  });
  for (std::int64_t row = 0; row < args.rows; ++row) {
    const HeadSums& each = sums[std::size_t(row)];
    const double log_sum = std::log(each.sum);
    lse[row] = float(double(each.top) + log_sum);
    logp[row] = float(double(each.chosen) - double(each.top) - log_sum);
    if (entropy != nullptr) entropy[row] = float(log_sum - each.weighted / each.sum);
  }
}

void head_backward_cpu(const HeadArgs& args, const float* lse, const float* slope, bool held, float* d_hidden,
                       float* d_weight, float* d_bias, int threads, CpuLevel level) {
  const Head head{args, rows_of(level), threads};
  const Rows& rows = head.rows;
  if (!held) head.pack_tokens();
  if (d_weight != nullptr)
    head.panels(head.column_panels(), [&](std::int64_t panel) { rows.pack_columns(args, panel); });
  head.blocks([&](const HeadBlock& block) {
    if (!held) head.scores(block);
    head.panels(head.token_panels(), [&](std::int64_t panel) { rows.gradient_panel(block, panel, lse, slope); });
    if (d_hidden != nullptr)
      share(head.column_panels(), 1, head.token_panels(), std::size_t(rows.depth) * rows.panel, threads,
            [&](std::int64_t first, std::int64_t last, std::int64_t first_panel, std::int64_t last_panel,
                float* scratch) {
              for (std::int64_t panel = first; panel < last; ++panel)
                rows.hidden_piece(block, panel, first_panel, last_panel, d_hidden, scratch);
            });
    if (d_weight != nullptr)
      share(block.entries, kEntries, head.column_panels(), std::size_t(kEntries * padded(args.rows)), threads,
            [&](std::int64_t first, std::int64_t last, std::int64_t first_panel, std::int64_t last_panel,
                float* scratch) {
              rows.weight_piece(block, first, last, first_panel, last_panel, d_weight + block.first * args.width,
                                scratch);
            });
    if (d_bias != nullptr)
      parallel_for(block.entries, 256, threads, [&](std::int64_t first, std::int64_t last) {
        rows.bias_piece(block, first, last, d_bias + block.first);
      });
  });
}

}  // namespace pyunictokens
