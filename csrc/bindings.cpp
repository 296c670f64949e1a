// The only file that knows Python. Every function takes raw addresses as integers, with their sizes; shapes, dtypes, devices
// and contiguity are checked by pyunictokens/ops/_native.py before an address crosses.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "maskgit_step.h"
#include "noise.h"
#include "philox.h"

#ifdef PYUNICTOKENS_WITH_CUDA
#include "cuda_info.h"
#endif

namespace py = pybind11;
using namespace pyunictokens;

namespace {

constexpr const char* kLevelNames[] = {"baseline", "avx2", "avx512"};

py::dict build_info() {
  py::dict info;
  info["version"] = PYUNICTOKENS_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["cpu_level"] = kLevelNames[int(best_cpu_level())];
#ifdef PYUNICTOKENS_WITH_CUDA
  const CudaInfo cuda = cuda_info();
  py::dict entry;
  entry["architectures"] = cuda.architectures;
  entry["runtime_version"] = cuda.runtime_version;
  entry["driver_version"] = cuda.driver_version;
  entry["device_count"] = cuda.device_count;
  entry["error"] = cuda.error;
  info["cuda"] = entry;
#else
  info["cuda"] = py::none();
#endif
  return info;
}

py::tuple philox(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3, std::uint32_t k0,
                 std::uint32_t k1) {
  const PhiloxBlock block = philox4x32({{c0, c1, c2, c3}}, k0, k1);
  return py::make_tuple(block.word[0], block.word[1], block.word[2], block.word[3]);
}

py::list cpu_levels() {
  py::list levels;
  for (int level = 0; level <= int(best_cpu_level()); ++level) levels.append(kLevelNames[level]);
  return levels;
}

CpuLevel level_named(const std::string& name) {
  if (name.empty()) return best_cpu_level();
  for (int level = 0; level <= int(best_cpu_level()); ++level)
    if (name == kLevelNames[level]) return CpuLevel(level);
  throw py::value_error("cpu level '" + name + "' is not in this build or not on this machine");
}

template <typename T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void maskgit_step(std::uintptr_t logits, int type, std::int64_t batch, std::int64_t positions, std::int64_t entries,
                  std::int64_t stride_batch, std::int64_t stride_position, std::uintptr_t codes,
                  std::uintptr_t mask_len, std::uintptr_t temperature, std::uint64_t seed, std::uintptr_t sample_ids,
                  std::uintptr_t step, std::uint32_t stream, std::uintptr_t token_gumbel, std::uintptr_t rank_gumbel,
                  std::uintptr_t out_codes, std::uintptr_t out_chosen, std::uintptr_t out_logp,
                  std::uintptr_t out_masked, int threads, const std::string& level) {
  MaskgitStepArgs args{};
  args.logits = at<const void>(logits);
  args.type = LogitsType(type);
  args.batch = batch;
  args.positions = positions;
  args.entries = entries;
  args.stride_batch = stride_batch;
  args.stride_position = stride_position;
  args.codes = at<const std::int64_t>(codes);
  args.mask_len = at<const std::int64_t>(mask_len);
  args.temperature = at<const float>(temperature);
  args.seed = seed;
  args.sample_ids = at<const std::int64_t>(sample_ids);
  args.step = at<const std::int64_t>(step);
  args.stream = stream;
  args.token_gumbel = at<const float>(token_gumbel);
  args.rank_gumbel = at<const float>(rank_gumbel);
  args.out_codes = at<std::int64_t>(out_codes);
  args.out_chosen = at<std::int64_t>(out_chosen);
  args.out_logp = at<float>(out_logp);
  args.out_masked = at<bool>(out_masked);
  const CpuLevel chosen_level = level_named(level);
  py::gil_scoped_release release;
  maskgit_step_cpu(args, threads < 1 ? 1 : threads, chosen_level);
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Compiled core of pyunictokens: raw addresses in, nothing kept.";
  module.def("build_info", &build_info, "What this build contains and which CUDA driver and devices it finds.");
  module.def("philox4x32", &philox, "One Philox4x32-10 block, for the known-answer test.", py::arg("c0"), py::arg("c1"),
             py::arg("c2"), py::arg("c3"), py::arg("k0"), py::arg("k1"));
  module.def("cpu_levels", &cpu_levels, "The instruction-set levels that can run here, the best last.");
  module.def("maskgit_step", &maskgit_step, "csrc/include/maskgit_step.h on the CPU.", py::arg("logits"),
             py::arg("type"), py::arg("batch"), py::arg("positions"), py::arg("entries"), py::arg("stride_batch"),
             py::arg("stride_position"), py::arg("codes"), py::arg("mask_len"), py::arg("temperature"), py::arg("seed"),
             py::arg("sample_ids"), py::arg("step"), py::arg("stream"), py::arg("token_gumbel"),
             py::arg("rank_gumbel"), py::arg("out_codes"), py::arg("out_chosen"), py::arg("out_logp"),
             py::arg("out_masked"), py::arg("threads"), py::arg("level"));
  module.attr("STREAM_TOKEN") = int(kTokenStream);
  module.attr("STREAM_RANK") = int(kRankStream);
  module.attr("STREAM_TEXT") = int(kTextStream);
}
