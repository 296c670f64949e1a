// The CUDA kernel's algorithm (cuda/maskgit_team.h) run on the host, so that a machine without a GPU can test it.
#include "../cuda/maskgit_team.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace pyunictokens {
namespace {

struct HostTeam {
  std::uint32_t threads;

  std::uint32_t size() const { return threads; }
  template <typename F>
  void each(F&& f) const {
    for (std::uint32_t thread = 0; thread < threads; ++thread) f(thread);
  }
  template <typename F>
  void one(F&& f) const {
    f();
  }
  template <typename F>
  unsigned long long max(F&& f) const {
    unsigned long long value = 0;
    for (std::uint32_t thread = 0; thread < threads; ++thread) value = std::max(value, f(thread));
    return value;
  }
  template <typename F>
  float sum(F&& f) const {
    float value = 0.0f;
    for (std::uint32_t thread = 0; thread < threads; ++thread) value += f(thread);
    return value;
  }
  static void raise(unsigned long long* to, unsigned long long value) { *to = std::max(*to, value); }
  static std::uint32_t add(std::uint32_t* to, std::uint32_t value) {
    *to += value;
    return *to - value;
  }
  static unsigned long long peek(const unsigned long long* from) { return *from; }
  template <typename T>
  static T fresh(const T* from) {
    return *from;
  }
};

template <typename T, bool cached>
void emulate(const MaskgitStepCudaArgs& args, const HostTeam& block) {
  std::vector<team::Pack<T>> cache(std::size_t(team::packs_of<T>(args.step.entries)));
  for (std::uint32_t b = 0; b < args.step.batch; ++b) {
    for (std::uint32_t n = 0; n < args.step.positions; ++n) {
      team::Shared shared;
      std::memset(&shared, 0xA5, sizeof(shared));  // on a GPU it holds whatever was there before
      team::row<HostTeam, T, cached>(block, args, b, n, cached ? cache.data() : nullptr, shared);
    }
    team::Shared shared;
    std::memset(&shared, 0xA5, sizeof(shared));
    team::select(block, args, b, shared);
  }
}

}  // namespace

void maskgit_step_emulated(const MaskgitStepCudaArgs& args, int threads, bool cached) {
  const HostTeam block{std::uint32_t(threads)};
  switch (args.step.type) {
    case FloatType::kFloat32: return cached ? emulate<float, true>(args, block) : emulate<float, false>(args, block);
    case FloatType::kBFloat16:
      return cached ? emulate<BFloat16, true>(args, block) : emulate<BFloat16, false>(args, block);
    default: return cached ? emulate<Float16, true>(args, block) : emulate<Float16, false>(args, block);
  }
}

}  // namespace pyunictokens
