// A small pool of threads for loops over independent items. It does not know what the items are. OpenMP is not used: torch
// brings its own copy of that runtime, and two of them in one process fight over the cores.
#pragma once

#include <cstdint>
#include <functional>

namespace pyunictokens {

// Calls body(first, last) on disjoint ranges of at most `grain` items that together cover [0, count), on up to `threads`
// threads including the calling one. Returns when all is done. Items are handed out as threads become free. A call that
// meets a busy pool (from another thread of the caller's) runs on its own thread alone. Safe after fork().
// body must not throw.
void parallel_for(std::int64_t count, std::int64_t grain, int threads,
                  const std::function<void(std::int64_t, std::int64_t)>& body);

}  // namespace pyunictokens
