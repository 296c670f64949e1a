// The only file that knows Python. Every function takes raw addresses as integers, with their sizes; shapes, dtypes, devices
// and contiguity are checked by pyunictokens/ops/_native.py before an address crosses.
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>

#include "philox.h"

#ifdef PYUNICTOKENS_WITH_CUDA
#include "cuda_info.h"
#endif

namespace py = pybind11;
using namespace pyunictokens;

namespace {

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

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Compiled core of pyunictokens: raw addresses in, nothing kept.";
  module.def("build_info", &build_info, "What this build contains and which CUDA driver and devices it finds.");
  module.def("philox4x32", &philox, "One Philox4x32-10 block, for the known-answer test.", py::arg("c0"), py::arg("c1"),
             py::arg("c2"), py::arg("c3"), py::arg("k0"), py::arg("k1"));
}
