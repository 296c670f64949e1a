// head.h on the CPU: pieces of each product shared among threads. Which thread does a piece changes nothing of its result.
#include "head.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "rows.h"
#include "threads.h"

namespace pyunictokens {
namespace {

constexpr std::int64_t kEntries = 48;     // of a piece
constexpr std::int64_t kTokenPanels = 4;  // of tokens whose scores are formed and used before the next, at most

std::int64_t groups(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

// Calls body(first, last, inner_first, inner_last) for pieces that cover outer x inner: `grain` items of the outer range with all
// of the inner one, or with a part where there would be fewer than four pieces a thread.
template <typename Body>
void share(std::int64_t outer, std::int64_t grain, std::int64_t inner, int threads, const Body& body) {
  const std::int64_t pieces = groups(outer, grain);
  const std::int64_t parts = std::min<std::int64_t>(inner, groups(4 * threads, pieces));
  parallel_for(pieces * parts, 1, threads, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t each = first; each < last; ++each) {
      const std::int64_t piece = each / parts, part = each % parts;
      body(piece * grain, std::min(outer, (piece + 1) * grain), inner * part / parts, inner * (part + 1) / parts);
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

  // Calls body(block) for one block of entries after the other, its weight packed.
  template <typename Body>
  void blocks(const Body& body) const {
    const std::int64_t size = args.weight_type == FloatType::kFloat32 ? 4 : 2;
    const std::int64_t lines = std::min(args.block, args.entries), most = head_block(lines);
    for (std::int64_t first = 0, last; first < args.entries; first = last) {
      const std::int64_t line = first % lines;
      last = std::min({first + most, first - line + lines, args.entries});
      HeadBlock block{args, first, lines};
      block.entries = last - first;
      block.weight = static_cast<const char*>(args.weight) + first * args.width * size;
      block.bias = args.bias == nullptr ? nullptr : args.bias + first;
      block.scores = args.scores + line * rows.panel;
      parallel_for(block.entries, kEntries, threads,
                   [&](std::int64_t begin, std::int64_t end) { rows.pack_weight(block, begin, end); });
      body(block);
    }
  }

  // score(entries, panels), softmax(panels) and hidden(columns, panels) over a whole block: each thread takes some tokens through
  // all three, while their scores are in its cache; or, where there are too few tokens, shares each of the three.
  template <typename Score, typename Softmax, typename Hidden>
  void over_tokens(const HeadBlock& block, const Score& score, const Softmax& softmax, const Hidden& hidden) const {
    const std::int64_t tokens = token_panels();
    if (tokens >= 2 * threads) {
      const std::int64_t grain = std::min(kTokenPanels, tokens / (2 * threads));
      parallel_for(tokens, grain, threads, [&](std::int64_t first, std::int64_t last) {
        score(0, block.entries, first, last);
        softmax(first, last);
        hidden(0, column_panels(), first, last);
      });
      return;
    }
    share(block.entries, kEntries, tokens, threads, score);
    parallel_for(tokens, 1, threads, softmax);
    share(column_panels(), 1, tokens, threads, hidden);
  }
};

}  // namespace

void head_logprob_cpu(const HeadArgs& args, float* lse, float* logp, float* entropy, int threads, CpuLevel level) {
  const Head head{args, rows_of(level), threads};
  std::vector<HeadSums> sums(std::size_t(args.rows), HeadSums{-INFINITY, -INFINITY, 0.0, 0.0});
  head.pack_tokens();
  head.blocks([&](const HeadBlock& block) {
    head.over_tokens(
        block,
        [&](std::int64_t first, std::int64_t last, std::int64_t first_panel, std::int64_t last_panel) {
          head.rows.score_piece(block, first, last, first_panel, last_panel);
        },
        [&](std::int64_t first, std::int64_t last) {
          for (; first < last; ++first) head.rows.sums_panel(block, first, sums.data(), entropy != nullptr);
        },
        [](std::int64_t, std::int64_t, std::int64_t, std::int64_t) {});
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
    head.over_tokens(
        block,
        [&](std::int64_t first, std::int64_t last, std::int64_t first_panel, std::int64_t last_panel) {
          if (!held) rows.score_piece(block, first, last, first_panel, last_panel);
        },
        [&](std::int64_t first, std::int64_t last) {
          for (; first < last; ++first) rows.gradient_panel(block, first, lse, slope);
        },
        [&](std::int64_t first, std::int64_t last, std::int64_t first_panel, std::int64_t last_panel) {
          if (d_hidden != nullptr) rows.hidden_piece(block, first, last, first_panel, last_panel, d_hidden);
        });
    if (d_weight != nullptr)
      share(block.entries, kEntries, head.column_panels(), threads,
            [&](std::int64_t first, std::int64_t last, std::int64_t first_panel, std::int64_t last_panel) {
              rows.weight_piece(block, first, last, first_panel, last_panel, d_weight + block.first * args.width);
            });
    if (d_bias != nullptr)
      parallel_for(block.entries, 256, threads, [&](std::int64_t first, std::int64_t last) {
        rows.bias_piece(block, first, last, d_bias + block.first);
      });
  });
}

}  // namespace pyunictokens
