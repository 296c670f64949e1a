// The three matrix products of head.h in float32, for the instruction set that PYUNICTOKENS_LEVEL names.
//
// One micro-kernel does all the arithmetic: a tile of up to kTileRows x kPanel results stays in registers while the steps of
// the contraction go by, and each step multiplies one number of every row with one panel of columns. That keeps the
// multipliers busy if what it reads lies close together; so matrices are kept in panels:
//
//   scores  [tokens / kPanel][lines][kPanel]     a panel holds kPanel tokens, one line per entry
//   packed  [width / kPanel][entries][kPanel]    a block of the weight, for the scores and the gradient of hidden states;
//           [tokens / kPanel][width][kPanel]     behind it hidden states for the scores, and behind them
//           [width / kPanel][tokens][kPanel]     hidden states for the gradient of the weight
//
// The scores are written once in this layout and read in it by everything after: as lanes of tokens by the softmax, as rows
// by both gradients. Tokens and columns beyond the last are zero. Sums run in one order, whatever the threads. How it stands
// to torch's product: python -m benchmarks.choices. It does not know blocks, threads or gradients of what; head.cpp does.
#include "lanes.h"
#include "rows.h"

namespace pyunictokens {
namespace PYUNICTOKENS_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kWide = 16, kTileRows = 12;
#elif defined(__AVX__)
constexpr int kWide = 8, kTileRows = 6;
#else
constexpr int kWide = 4, kTileRows = 6;
#endif
constexpr int kPanel = 2 * kWide;
// Rows of a piece, which stay in the innermost caches while columns go by.
constexpr std::int64_t kGroup = 48;
// Steps of a tile between two lines of its results that are fetched ahead: together they would hold up the operands.
constexpr std::int64_t kFetch = 8;

typedef float Wide __attribute__((vector_size(4 * kWide), aligned(4), may_alias));

inline std::int64_t panels(std::int64_t count) { return (count + kPanel - 1) / kPanel; }

// The second and the third part of `packed`.
inline float* tokens_of(const HeadArgs& args) { return args.packed + padded(args.width) * head_block(args.block); }
inline float* columns_of(const HeadArgs& args) { return tokens_of(args) + padded(args.width) * padded(args.rows); }

// c [rows][kPanel] = (or, with add, +=) the sum over blocks and steps of a[row] b[step]. How far apart rows and steps of `a` lie
// is known at compile time; the next block lies a_block after the last. b is contiguous.
struct Product {
  const float* a;
  std::int64_t a_block;
  const float* b;
  std::int64_t blocks, steps;
  float* c;
  std::int64_t c_stride;
  bool add;
};

template <int R, int RowStride, int StepStride>
void tile(const Product& product) {
  const std::int64_t steps = product.steps, c_stride = product.c_stride;
  const float *a = product.a, *b = product.b;
  float* c = product.c;
  Wide sum[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    sum[r][0] = sum[r][1] = Wide{};
  }
  std::int64_t fetched = 0;
  for (std::int64_t block = 0; block < product.blocks; ++block, a += product.a_block, b += steps * kPanel)
    for (std::int64_t k = 0; k < steps;) {
      if (fetched < R) {
        __builtin_prefetch(c + fetched * c_stride, 1);
        __builtin_prefetch(c + fetched * c_stride + kWide, 1);
        ++fetched;
      }
      const std::int64_t end = k + kFetch < steps ? k + kFetch : steps;
      for (; k < end; ++k) {
        const Wide low = *reinterpret_cast<const Wide*>(b + k * kPanel);
        const Wide high = *reinterpret_cast<const Wide*>(b + k * kPanel + kWide);
        for (int r = 0; r < R; ++r) {
          const float x = a[r * RowStride + k * StepStride];
          sum[r][0] += x * low;
          sum[r][1] += x * high;
        }
      }
    }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    Wide* low = reinterpret_cast<Wide*>(c + r * c_stride);
    Wide* high = reinterpret_cast<Wide*>(c + r * c_stride + kWide);
    *low = product.add ? *low + sum[r][0] : sum[r][0];
    *high = product.add ? *high + sum[r][1] : sum[r][1];
  }
}

// The tile of 1 <= rows <= R rows.
template <int R, int RowStride, int StepStride>
inline void tile_of(int rows, const Product& product) {
  if (rows == R)
    tile<R, RowStride, StepStride>(product);
  else if constexpr (R > 1)
    tile_of<R - 1, RowStride, StepStride>(rows, product);
}

// The same where only the first `columns` of the tile exist in c.
template <int RowStride, int StepStride>
inline void tile_within(int rows, std::int64_t columns, const Product& product) {
  if (columns >= kPanel) {
    tile_of<kTileRows, RowStride, StepStride>(rows, product);
    return;
  }
  float whole[kTileRows * kPanel];
  Product apart = product;
  apart.c = whole;
  apart.c_stride = kPanel;
  apart.add = false;
  tile_of<kTileRows, RowStride, StepStride>(rows, apart);
  for (int r = 0; r < rows; ++r)
    for (std::int64_t i = 0; i < columns; ++i) {
      float& to = product.c[r * product.c_stride + i];
      to = (product.add ? to : 0.0f) + whole[r * kPanel + i];
    }
}

// How many of `left` rows the next tile takes, so that the tiles of a piece are of like size.
inline int next_rows(std::int64_t left) {
  const std::int64_t tiles = (left + kTileRows - 1) / kTileRows;
  return int((left + tiles - 1) / tiles);
}

// kPanel numbers, those past `count` as 0.
template <typename T>
inline void copy_line(const T* from, std::int64_t count, float* to) {
  if (count >= kPanel)
    for (int i = 0; i < kPanel; ++i) to[i] = widen(from[i]);
  else
    for (int i = 0; i < kPanel; ++i) to[i] = i < count ? widen(from[i]) : 0.0f;
}

// --- Scores ---------------------------------------------------------------------------------------------------------------

// Tokens of one panel of `packed`, for the scores: [width][kPanel].
void pack_tokens(const HeadArgs& args, std::int64_t panel) {
  const std::int64_t width = args.width, whole = panels(width) * kPanel, first = panel * kPanel;
  const std::int64_t count = args.rows - first < kPanel ? args.rows - first : kPanel;
  float* to = tokens_of(args) + panel * whole * kPanel;
  float square[kPanel]
              [kPanel + 1];  // an odd distance: what is read one after the other lies in different lines of the cache
  for (std::int64_t start = 0; start < whole; start += kPanel, to += kPanel * kPanel) {
    const std::int64_t columns = width - start < kPanel ? width - start : kPanel;
    if (count < kPanel || columns < kPanel) std::memset(square, 0, sizeof(square));
    for (std::int64_t i = 0; i < count; ++i)
      std::memcpy(square[i], args.hidden + (first + i) * width + start, sizeof(float) * std::size_t(columns));
    for (int d = 0; d < kPanel; ++d)
      for (int i = 0; i < kPanel; ++i) to[d * kPanel + i] = square[i][d];
  }
}

template <typename T>
inline void pack_rows(const HeadBlock& args, const T* weight, std::int64_t first, std::int64_t last) {
  for (std::int64_t entry = first; entry < last; ++entry) {
    const T* from = weight + entry * args.width;
    float* line = args.packed + entry * kPanel;
    for (std::int64_t start = 0; start < args.width; start += kPanel, line += args.entries * kPanel)
      copy_line(from + start, args.width - start, line);
  }
}

// Entries [first, last) of the block's weight.
void pack_weight(const HeadBlock& args, std::int64_t first, std::int64_t last) {
  if (args.weight_type == FloatType::kBFloat16)
    pack_rows(args, static_cast<const BFloat16*>(args.weight), first, last);
  else if (args.weight_type == FloatType::kFloat16)
    pack_rows(args, static_cast<const Float16*>(args.weight), first, last);
  else
    pack_rows(args, static_cast<const float*>(args.weight), first, last);
}

// Scores of the entries [first, last) for some panels of tokens.
void score_piece(const HeadBlock& args, std::int64_t first, std::int64_t last, std::int64_t first_panel,
                 std::int64_t last_panel) {
  const std::int64_t blocks = panels(args.width);
  for (std::int64_t group = first; group < last; group += kGroup) {
    const std::int64_t end = last - group < kGroup ? last : group + kGroup;
    for (std::int64_t panel = first_panel; panel < last_panel; ++panel) {
      const float* b = tokens_of(args) + panel * blocks * kPanel * kPanel;
      int rows;
      for (std::int64_t entry = group; entry < end; entry += rows) {
        rows = next_rows(end - entry);
        float* c = args.scores + (panel * args.lines + entry) * kPanel;
        tile_of<kTileRows, kPanel, 1>(
            rows, {args.packed + entry * kPanel, args.entries * kPanel, b, blocks, kPanel, c, kPanel, false});
      }
    }
  }
}

// --- Gradients ------------------------------------------------------------------------------------------------------------

// Columns of one panel of `packed`, for the gradient of the weight: [tokens][kPanel].
void pack_columns(const HeadArgs& args, std::int64_t panel) {
  const std::int64_t first = panel * kPanel, rows = panels(args.rows) * kPanel;
  const std::int64_t count = args.width - first < kPanel ? args.width - first : kPanel;
  float* to = columns_of(args) + panel * rows * kPanel;
  for (std::int64_t row = 0; row < args.rows; ++row, to += kPanel)
    copy_line(args.hidden + row * args.width + first, count, to);
  std::memset(to, 0, sizeof(float) * std::size_t(rows - args.rows) * kPanel);
}

// Panels of columns of d_hidden, for some panels of tokens.
void hidden_piece(const HeadBlock& args, std::int64_t first_column, std::int64_t last_column, std::int64_t first_panel,
                  std::int64_t last_panel, float* d_hidden) {
  for (std::int64_t each = first_column; each < last_column; ++each) {
    const std::int64_t column = each * kPanel;
    const float* b = args.packed + column * args.entries;
    for (std::int64_t panel = first_panel; panel < last_panel; ++panel) {
      const std::int64_t token = panel * kPanel, end = args.rows - token < kPanel ? args.rows - token : kPanel;
      int rows;
      for (std::int64_t i = 0; i < end; i += rows) {
        rows = next_rows(end - i);
        const float* a = args.scores + panel * args.lines * kPanel + i;
        float* c = d_hidden + (token + i) * args.width + column;
        tile_within<1, kPanel>(rows, args.width - column, {a, 0, b, 1, args.entries, c, args.width, args.first > 0});
      }
    }
  }
}

// Entries [first, last) of d_weight, for some panels of columns.
void weight_piece(const HeadBlock& args, std::int64_t first, std::int64_t last, std::int64_t first_panel,
                  std::int64_t last_panel, float* d_weight) {
  const std::int64_t blocks = panels(args.rows), stride = args.lines * kPanel;
  for (std::int64_t panel = first_panel; panel < last_panel; ++panel) {
    const std::int64_t column = panel * kPanel;
    const float* b = columns_of(args) + column * blocks * kPanel;
    int rows;
    for (std::int64_t entry = first; entry < last; entry += rows) {
      rows = next_rows(last - entry);
      const float* a = args.scores + entry * kPanel;
      float* c = d_weight + entry * args.width + column;
      tile_within<kPanel, 1>(rows, args.width - column, {a, stride, b, blocks, kPanel, c, args.width, true});
    }
  }
}

// Entries [first, last) of d_bias.
void bias_piece(const HeadBlock& args, std::int64_t first, std::int64_t last, float* d_bias) {
  for (std::int64_t entry = first; entry < last; ++entry) {
    Wide low{}, high{};
    for (std::int64_t panel = 0; panel < panels(args.rows); ++panel) {
      const float* line = args.scores + (panel * args.lines + entry) * kPanel;
      low += *reinterpret_cast<const Wide*>(line);
      high += *reinterpret_cast<const Wide*>(line + kWide);
    }
    low += high;
    float sum = 0.0f;
    for (int i = 0; i < kWide; ++i) sum += low[i];
    d_bias[entry] += sum;
  }
}

}  // namespace
}  // namespace PYUNICTOKENS_LEVEL
}  // namespace pyunictokens
