// The step kernel's team code (maskgit_team.h) with real threads, for the thread sanitizer: a program of its own, built by
// .ci/sanitize.sh. What the emulation cannot see, a barrier that is missing, is a race here. Several blocks run at once and
// hand over to the one that finishes last, as on a GPU: a fence and an atomic addition there, acquire and release here.
// Prints "same" where codes and log-probs are those of the emulation, bit for bit. -DDROP_BARRIER=each|one leaves the wait out of
// that call, so that one sees the sanitizer object.
#include "maskgit_team.h"

#include <atomic>
#include <barrier>
#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

namespace pyunictokens {
namespace {

#define SAME_each 1
#define SAME_one 2
#define CODE_OF_(name) SAME_##name
#define CODE_OF(name) CODE_OF_(name)
#ifdef DROP_BARRIER
constexpr int kDropped = CODE_OF(DROP_BARRIER);
#else
constexpr int kDropped = 0;
#endif

struct Block {
  explicit Block(int threads) : gate(threads), tops(std::size_t(threads)), sums(std::size_t(threads)) {}
  std::barrier<> gate;
  std::vector<unsigned long long> tops;  // of max() and sum(), used once a row, as the kernel's shared memory is
  std::vector<float> sums;
  team::Shared shared;
};

struct ThreadTeam {
  Block& block;
  std::uint32_t me;

  void wait() const { block.gate.arrive_and_wait(); }
  std::uint32_t size() const { return std::uint32_t(block.tops.size()); }
  template <typename F>
  void each(F&& f) const {
    f(me);
    if (kDropped != SAME_each) wait();
  }
  template <typename F>
  void one(F&& f) const {
    if (me == 0) f();
    if (kDropped != SAME_one) wait();
  }
  template <typename F>
  unsigned long long max(F&& f) const {
    block.tops[me] = f(me);
    wait();
    unsigned long long value = 0;
    for (const unsigned long long each : block.tops) value = value < each ? each : value;
    return value;
  }
  template <typename F>
  float sum(F&& f) const {
    block.sums[me] = f(me);
    wait();
    float value = 0.0f;
    for (const float each : block.sums) value += each;
    return value;
  }
  static void raise(unsigned long long* to, unsigned long long value) {
    unsigned long long now = __atomic_load_n(to, __ATOMIC_RELAXED);
    while (now < value && !__atomic_compare_exchange_n(to, &now, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
  static std::uint32_t add(std::uint32_t* to, std::uint32_t value) {
    return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
  }
  static unsigned long long peek(const unsigned long long* from) { return __atomic_load_n(from, __ATOMIC_RELAXED); }
  template <typename T>
  static T fresh(const T* from) {
    return *from;
  }
};

// What one thread of one block does in the kernel, row after row.
template <typename T, bool cached>
void run(const MaskgitStepCudaArgs& args, Block& block, std::uint32_t me, std::uint32_t first, std::uint32_t blocks,
         std::vector<team::Pack<T>>& cache) {
  const ThreadTeam team{block, me};
  const std::uint32_t positions = std::uint32_t(args.step.positions);
  const std::uint32_t rows = std::uint32_t(args.step.batch) * positions;
  for (std::uint32_t r = first; r < rows; r += blocks) {
    const std::uint32_t b = r / positions;
    team::row<ThreadTeam, T, cached>(team, args, b, r - b * positions, cached ? cache.data() : nullptr, block.shared);
    if (me == 0) block.shared.last = __atomic_fetch_add(args.done + b, 1u, __ATOMIC_ACQ_REL) == positions - 1;
    team.wait();
    if (block.shared.last) {
      team::select(team, args, b, block.shared);
      if (me == 0) args.done[b] = 0;
    }
    team.wait();  // on a GPU the next row is another block's
  }
}

template <typename T>
T narrow(float value);
template <>
float narrow<float>(float value) {
  return value;
}
template <>
BFloat16 narrow<BFloat16>(float value) {
  return {std::uint16_t(bits_of_float(value) >> 16)};
}

template <typename T, bool cached>
bool same(FloatType type, int threads, int blocks, std::int64_t batch, std::int64_t positions, std::int64_t entries) {
  const std::size_t rows = std::size_t(batch * positions), samples = std::size_t(batch),
                    running_blocks = std::size_t(blocks);
  std::vector<T> logits(rows * std::size_t(entries));
  std::vector<std::int64_t> codes(rows), mask_len(samples), ids(samples), step(samples);
  std::vector<float> temperature(samples, 0.7f);
  const PhiloxKeys rounds = philox_keys(99);
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const PhiloxBlock noise = philox4x32({{std::uint32_t(i), 1, 2, 3}}, rounds);
    logits[i] = narrow<T>(6.0f * (float(noise.word[0]) * 0x1p-32f - 0.5f));
  }
  for (std::size_t r = 0; r < rows; ++r) codes[r] = r % 4 == 3 ? std::int64_t(r) % entries : -1;
  for (std::size_t b = 0; b < samples; ++b) {
    mask_len[b] = positions / 3;
    ids[b] = std::int64_t(7 + b);
    step[b] = std::int64_t(b);
  }
  struct Out {
    std::vector<std::int64_t> codes, chosen;
    std::vector<float> logp;
    std::vector<char> masked;
    std::vector<std::uint32_t> keys;
  };
  const auto out = [&] {
    return Out{std::vector<std::int64_t>(rows), std::vector<std::int64_t>(rows), std::vector<float>(rows),
               std::vector<char>(rows), std::vector<std::uint32_t>(rows)};
  };
  Out threaded = out(), emulated = out();
  std::vector<std::uint32_t> done(samples, 0);
  const auto arguments = [&](Out& to) {
    const MaskgitStepArgs one{logits.data(),   type,
                              batch,           positions,
                              entries,         positions * entries,
                              entries,         codes.data(),
                              mask_len.data(), temperature.data(),
                              1234567,         ids.data(),
                              step.data(),     0,
                              nullptr,         nullptr,
                              to.codes.data(), to.chosen.data(),
                              to.logp.data(),  reinterpret_cast<bool*>(to.masked.data())};
    return MaskgitStepCudaArgs{one, 1, 1, 1, 1, to.keys.data(), done.data(), philox_keys(one.seed)};
  };
  const MaskgitStepCudaArgs args = arguments(threaded);
  const std::size_t packs = std::size_t(team::packs_of<T>(entries));
  std::vector<std::vector<team::Pack<T>>> caches(running_blocks);
  for (auto& cache : caches) cache.resize(packs);
  {
    std::vector<std::unique_ptr<Block>> held;
    std::vector<std::jthread> running;
    for (int block = 0; block < blocks; ++block) {
      held.push_back(std::make_unique<Block>(threads));
      for (int me = 0; me < threads; ++me) {
        running.emplace_back([&, own = held.back().get(), block, me] {
          run<T, cached>(args, *own, std::uint32_t(me), std::uint32_t(block), std::uint32_t(blocks),
                         caches[std::size_t(block)]);
        });
      }
    }
    running.clear();
  }
  maskgit_step_emulated(arguments(emulated), threads, cached);
  return threaded.codes == emulated.codes && threaded.chosen == emulated.chosen && threaded.masked == emulated.masked &&
         std::memcmp(threaded.logp.data(), emulated.logp.data(), rows * sizeof(float)) == 0;
}

}  // namespace
}  // namespace pyunictokens

int main() {
  using namespace pyunictokens;
  bool all = true;
  all &= same<BFloat16, true>(FloatType::kBFloat16, 256, 1, 1, 5, 2100);  // a block as it is launched
  all &= same<BFloat16, true>(FloatType::kBFloat16, 32, 4, 2, 9, 301);    // blocks that hand over
  all &= same<BFloat16, false>(FloatType::kBFloat16, 32, 3, 2, 7, 515);
  all &= same<float, true>(FloatType::kFloat32, 48, 3, 2, 8, 203);
  std::puts(all ? "same" : "DIFFERENT");
  return all ? 0 : 1;
}
