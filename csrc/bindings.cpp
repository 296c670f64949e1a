// The only file that knows Python. Every function takes raw addresses as integers, with their sizes; shapes, dtypes, devices
// and contiguity are checked by pyunictokens/ops/backends/cpu.py before an address crosses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "gelu.h"
#include "grpo_loss.h"
#include "head.h"
#include "maskgit_step.h"
#include "maskgit_step_cuda.h"
#include "noise.h"
#include "norm_rotary.h"
#include "philox.h"

#ifdef PYUNICTOKENS_WITH_CUDA
#include "cuda_info.h"
#include "graph_loop.h"
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

// Sizes that no address can be read by: an error in words, not a division by zero.
void require(bool good, const char* what) {
  if (!good) throw py::value_error(what);
}

MaskgitStepArgs step_args(std::uintptr_t logits, int type, std::int64_t batch, std::int64_t positions,
                          std::int64_t entries, std::int64_t stride_batch, std::int64_t stride_position,
                          std::uintptr_t codes, std::uintptr_t mask_len, std::uintptr_t temperature, std::uint64_t seed,
                          std::uintptr_t sample_ids, std::uintptr_t step, std::uint32_t stream,
                          std::uintptr_t token_gumbel, std::uintptr_t rank_gumbel, std::uintptr_t out_codes,
                          std::uintptr_t out_chosen, std::uintptr_t out_logp, std::uintptr_t out_masked) {
  require(batch >= 1 && positions >= 1 && entries >= 1,
          "maskgit_step: batch, positions and entries must be at least 1");
  require(logits && codes && mask_len && temperature && sample_ids && step && out_codes && out_chosen && out_logp &&
              out_masked,
          "maskgit_step: an address is 0");
  MaskgitStepArgs args{};
  args.logits = at<const void>(logits);
  args.type = FloatType(type);
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
  return args;
}

template <typename Result, typename... Fields>
std::tuple<Fields...> fields_of(Result (*)(Fields...));
using StepFields = decltype(fields_of(&step_args));  // what step_args takes, as one tuple from Python

void maskgit_step(const StepFields& step, int threads, const std::string& level) {
  const MaskgitStepArgs args = std::apply(step_args, step);
  const CpuLevel chosen_level = level_named(level);
  py::gil_scoped_release release;
  maskgit_step_cpu(args, threads < 1 ? 1 : threads, chosen_level);
}
// strides: those of mask_len, temperature, sample_ids and step, 0 or 1 each
MaskgitStepCudaArgs step_cuda_args(const StepFields& step, const std::array<std::int64_t, 4>& strides,
                                   std::uintptr_t keys, std::uintptr_t done) {
  const MaskgitStepArgs args = std::apply(step_args, step);
  return {args,
          strides[0],
          strides[1],
          strides[2],
          strides[3],
          at<std::uint32_t>(keys),
          at<std::uint32_t>(done),
          philox_keys(args.seed)};
}

void maskgit_step_emulated_by(const StepFields& step, const std::array<std::int64_t, 4>& strides, std::uintptr_t keys,
                              int threads, bool cached) {
  const MaskgitStepCudaArgs args = step_cuda_args(step, strides, keys, 0);
  if (threads < 1) throw py::value_error("threads must be at least 1");
  py::gil_scoped_release release;
  maskgit_step_emulated(args, threads, cached);
}

#ifdef PYUNICTOKENS_WITH_CUDA
void maskgit_step_on_gpu(const StepFields& step, const std::array<std::int64_t, 4>& strides, std::uintptr_t keys,
                         std::uintptr_t done, int device, std::uintptr_t stream) {
  const MaskgitStepCudaArgs args = step_cuda_args(step, strides, keys, done);
  const std::string error = maskgit_step_cuda(args, device, at<void>(stream));
  if (!error.empty()) throw std::runtime_error("maskgit_step could not be launched: " + error);
}

std::uintptr_t build_graph_loop(std::uintptr_t step, std::uintptr_t keep_going, std::uintptr_t left, int device) {
  GraphLoop* loop = nullptr;
  const std::string error =
      graph_loop_build(at<void>(step), at<std::int32_t>(keep_going), at<std::int32_t>(left), device, &loop);
  if (!error.empty()) throw std::runtime_error("the loop of a captured step could not be built: " + error);
  return reinterpret_cast<std::uintptr_t>(loop);
}

void launch_graph_loop(std::uintptr_t loop, std::uintptr_t stream) {
  const std::string error = graph_loop_launch(at<GraphLoop>(loop), at<void>(stream));
  if (!error.empty()) throw std::runtime_error("the loop of a captured step could not be launched: " + error);
}

void destroy_graph_loop(std::uintptr_t loop) { graph_loop_destroy(at<GraphLoop>(loop)); }
#endif

void grpo_loss(std::uintptr_t logp, int logp_type, std::uintptr_t old_logp, int old_type, std::uintptr_t ref_logp,
               int ref_type, std::int64_t tokens, std::int64_t tokens_per_advantage, std::uintptr_t advantages,
               std::uintptr_t alpha, std::int64_t alpha_stride, std::uintptr_t mask, double rollouts, double clip_low,
               double clip_high, double beta, std::uintptr_t d_logp, std::uintptr_t out, int threads,
               const std::string& level) {
  require(tokens >= 0 && (tokens == 0 || tokens_per_advantage >= 1) && alpha_stride >= 0,
          "grpo_loss: a size is out of range");
  require(tokens == 0 || (logp && old_logp && advantages && alpha && out), "grpo_loss: an address is 0");
  GrpoLossArgs args{};
  args.logp = at<const void>(logp);
  args.old_logp = at<const void>(old_logp);
  args.ref_logp = at<const void>(ref_logp);
  args.logp_type = FloatType(logp_type);
  args.old_type = FloatType(old_type);
  args.ref_type = FloatType(ref_type);
  args.tokens = tokens;
  args.tokens_per_advantage = tokens_per_advantage;
  args.advantages = at<const float>(advantages);
  args.alpha = at<const float>(alpha);
  args.alpha_stride = alpha_stride;
  args.mask = at<const bool>(mask);
  args.rollouts = rollouts;
  args.clip_low = clip_low;
  args.clip_high = clip_high;
  args.beta = beta;
  args.d_logp = at<float>(d_logp);
  args.out = at<float>(out);
  const CpuLevel chosen_level = level_named(level);
  py::gil_scoped_release release;
  grpo_loss_cpu(args, threads < 1 ? 1 : threads, chosen_level);
}

// The fields of HeadArgs in their order.
using HeadFields = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::uintptr_t, int, std::int64_t,
                              std::uintptr_t, double, std::uintptr_t, std::int64_t, std::uintptr_t, std::uintptr_t>;

HeadArgs head_args(const HeadFields& fields) {
  const auto& [hidden, rows, width, weight, type, entries, bias, inverse_temperature, target, block, scores, packed] =
      fields;
  require(rows >= 0 && width >= 1 && entries >= 1 && block >= 1, "head: width, entries and block must be at least 1");
  require(rows == 0 || (hidden && weight && target && scores && packed), "head: an address is 0");
  HeadArgs args;
  args.hidden = at<const float>(hidden);
  args.rows = rows;
  args.width = width;
  args.weight = at<const void>(weight);
  args.weight_type = FloatType(type);
  args.entries = entries;
  args.bias = at<const float>(bias);
  args.inverse_temperature = float(inverse_temperature);
  args.target = at<const std::int64_t>(target);
  args.block = block;
  args.scores = at<float>(scores);
  args.packed = at<float>(packed);
  return args;
}

void head_logprob(const HeadFields& fields, std::uintptr_t lse, std::uintptr_t logp, std::uintptr_t entropy,
                  int threads, const std::string& level) {
  const CpuLevel chosen_level = level_named(level);
  const HeadArgs args = head_args(fields);
  py::gil_scoped_release release;
  head_logprob_cpu(args, at<float>(lse), at<float>(logp), at<float>(entropy), threads < 1 ? 1 : threads, chosen_level);
}

void head_backward(const HeadFields& fields, std::uintptr_t lse, std::uintptr_t slope, bool held,
                   std::uintptr_t d_hidden, std::uintptr_t d_weight, std::uintptr_t d_bias, int threads,
                   const std::string& level) {
  const CpuLevel chosen_level = level_named(level);
  const HeadArgs args = head_args(fields);
  py::gil_scoped_release release;
  head_backward_cpu(args, at<const float>(lse), at<const float>(slope), held, at<float>(d_hidden), at<float>(d_weight),
                    at<float>(d_bias), threads < 1 ? 1 : threads, chosen_level);
}

void gelu(std::uintptr_t x, std::uintptr_t grad, std::int64_t count, std::uintptr_t out, int threads,
          const std::string& level) {
  require(count >= 0 && (count == 0 || (x && out)), "gelu: an address is 0, or the count below");
  const CpuLevel chosen_level = level_named(level);
  py::gil_scoped_release release;
  gelu_cpu(at<const float>(x), at<const float>(grad), count, at<float>(out), threads < 1 ? 1 : threads, chosen_level);
}

using Strides = std::array<std::int64_t, 3>;

// The fields of NormRotaryArgs in their order.
using NormRotaryFields =
    std::tuple<std::uintptr_t, Strides, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
               std::uintptr_t, std::uintptr_t, std::int64_t, std::uintptr_t, std::uintptr_t, double>;

HeadStrides head_strides(const Strides& strides) { return {strides[0], strides[1], strides[2]}; }

NormRotaryArgs norm_rotary_args(const NormRotaryFields& fields) {
  const auto& [x, strides, batch, heads, length, width, rotary, cos, sin, angle_batch, weight, bias, eps] = fields;
  require(batch >= 0 && heads >= 0 && length >= 0 && width >= 1 && rotary >= 2 && rotary <= width && rotary % 2 == 0,
          "norm_rotary: a size is out of range");
  require(batch * heads * length == 0 || (x && cos && sin && weight && bias), "norm_rotary: an address is 0");
  return {at<const float>(x),
          head_strides(strides),
          batch,
          heads,
          length,
          width,
          rotary,
          at<const float>(cos),
          at<const float>(sin),
          angle_batch,
          at<const float>(weight),
          at<const float>(bias),
          float(eps)};
}

void norm_rotary(const NormRotaryFields& fields, std::uintptr_t out, const Strides& out_strides, int threads,
                 const std::string& level) {
  const CpuLevel chosen_level = level_named(level);
  const NormRotaryArgs args = norm_rotary_args(fields);
  py::gil_scoped_release release;
  norm_rotary_cpu(args, at<float>(out), head_strides(out_strides), threads < 1 ? 1 : threads, chosen_level);
}

std::int64_t norm_rotary_workspace(const NormRotaryFields& fields) {
  return norm_rotary_sums(norm_rotary_args(fields));
}

void norm_rotary_backward(const NormRotaryFields& fields, std::uintptr_t grad, const Strides& grad_strides,
                          std::uintptr_t d_x, const Strides& d_x_strides, std::uintptr_t d_parameters,
                          std::uintptr_t sums, int threads, const std::string& level) {
  const CpuLevel chosen_level = level_named(level);
  const NormRotaryArgs args = norm_rotary_args(fields);
  require(d_parameters == 0 || norm_rotary_sums(args) == 0 || sums, "norm_rotary_backward: a workspace is missing");
  const NormRotaryGradients gradients = {at<const float>(grad),     head_strides(grad_strides), at<float>(d_x),
                                         head_strides(d_x_strides), at<float>(d_parameters),    at<float>(sums)};
  py::gil_scoped_release release;
  norm_rotary_backward_cpu(args, gradients, threads < 1 ? 1 : threads, chosen_level);
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Compiled core of pyunictokens: raw addresses in, nothing kept.";
  module.def("build_info", &build_info, "What this build contains and which CUDA driver and devices it finds.");
  module.def("philox4x32", &philox, "One Philox4x32-10 block, for the known-answer test.", py::arg("c0"), py::arg("c1"),
             py::arg("c2"), py::arg("c3"), py::arg("k0"), py::arg("k1"));
  module.def("cpu_levels", &cpu_levels, "The instruction-set levels that can run here, the best last.");
  module.def("maskgit_step", &maskgit_step, "csrc/include/maskgit_step.h on the CPU.", py::arg("step"),
             py::arg("threads"), py::arg("level"));
  module.def("maskgit_step_emulated", &maskgit_step_emulated_by, "The CUDA kernel's algorithm on the host, for tests.",
             py::arg("step"), py::arg("strides"), py::arg("keys"), py::arg("threads"), py::arg("cached"));
#ifdef PYUNICTOKENS_WITH_CUDA
  module.def("maskgit_step_cuda", &maskgit_step_on_gpu, "csrc/include/maskgit_step_cuda.h: one launch.",
             py::arg("step"), py::arg("strides"), py::arg("keys"), py::arg("done"), py::arg("device"),
             py::arg("stream"));
  module.def("graph_loop_objection", &graph_loop_objection, "csrc/include/graph_loop.h: why it cannot work, or \"\".");
  module.def("graph_loop_build", &build_graph_loop, "csrc/include/graph_loop.h; what it returns must be destroyed.",
             py::arg("step"), py::arg("keep_going"), py::arg("left"), py::arg("device"));
  module.def("graph_loop_launch", &launch_graph_loop, "csrc/include/graph_loop.h: one launch.", py::arg("loop"),
             py::arg("stream"));
  module.def("graph_loop_destroy", &destroy_graph_loop, "csrc/include/graph_loop.h.", py::arg("loop"));
#endif
  module.def("grpo_loss", &grpo_loss, "csrc/include/grpo_loss.h on the CPU.", py::arg("logp"), py::arg("logp_type"),
             py::arg("old_logp"), py::arg("old_type"), py::arg("ref_logp"), py::arg("ref_type"), py::arg("tokens"),
             py::arg("tokens_per_advantage"), py::arg("advantages"), py::arg("alpha"), py::arg("alpha_stride"),
             py::arg("mask"), py::arg("rollouts"), py::arg("clip_low"), py::arg("clip_high"), py::arg("beta"),
             py::arg("d_logp"), py::arg("out"), py::arg("threads"), py::arg("level"));
  module.attr("HEAD_PANEL") = kHeadPanel;
  module.attr("HEAD_BLOCK") = kHeadBlock;
  module.def("head_logprob", &head_logprob, "csrc/include/head.h on the CPU.", py::arg("head"), py::arg("lse"),
             py::arg("logp"), py::arg("entropy"), py::arg("threads"), py::arg("level"));
  module.def("head_backward", &head_backward, "csrc/include/head.h on the CPU.", py::arg("head"), py::arg("lse"),
             py::arg("slope"), py::arg("held"), py::arg("d_hidden"), py::arg("d_weight"), py::arg("d_bias"),
             py::arg("threads"), py::arg("level"));
  module.def("gelu", &gelu, "csrc/include/gelu.h; grad: 0 for the values.", py::arg("x"), py::arg("grad"),
             py::arg("count"), py::arg("out"), py::arg("threads"), py::arg("level"));
  module.def("norm_rotary", &norm_rotary, "csrc/include/norm_rotary.h on the CPU.", py::arg("fields"), py::arg("out"),
             py::arg("out_strides"), py::arg("threads"), py::arg("level"));
  module.def("norm_rotary_sums", &norm_rotary_workspace, "Numbers of the workspace of norm_rotary_backward.",
             py::arg("fields"));
  module.def("norm_rotary_backward", &norm_rotary_backward, "csrc/include/norm_rotary.h on the CPU.", py::arg("fields"),
             py::arg("grad"), py::arg("grad_strides"), py::arg("d_x"), py::arg("d_x_strides"), py::arg("d_parameters"),
             py::arg("sums"), py::arg("threads"), py::arg("level"));
  module.attr("STREAM_TOKEN") = int(kTokenStream);
  module.attr("STREAM_RANK") = int(kRankStream);
  module.attr("STREAM_TEXT") = int(kTextStream);
}
