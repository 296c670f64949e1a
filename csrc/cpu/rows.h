// What maskgit_step.cpp and the three compilations of maskgit_rows.h agree on.
#pragma once

#include <cstdint>

#include "maskgit_step.h"

namespace pyunictokens {

struct RowTask {
  std::int64_t entries;  // K
  std::int64_t known;    // the code that stands here, or -1
  std::uint64_t seed, sample;
  std::uint32_t step, position, stream;
  const float* gumbel;  // K explicit values, or null
};

// tile_max: scratch of at least K / 64 + 1 floats.
using RowFunction = void (*)(const void* logits, LogitsType type, const RowTask& task, float* tile_max,
                             std::int64_t* chosen, float* logp);

namespace baseline {
void row(const void*, LogitsType, const RowTask&, float*, std::int64_t*, float*);
}
namespace avx2 {
void row(const void*, LogitsType, const RowTask&, float*, std::int64_t*, float*);
}
namespace avx512 {
void row(const void*, LogitsType, const RowTask&, float*, std::int64_t*, float*);
}

}  // namespace pyunictokens
