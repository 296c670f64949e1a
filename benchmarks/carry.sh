#!/usr/bin/env bash
# Builds the compiled core for the Python and the card of another machine, so that its minutes are not spent on a build:
#
#     bash benchmarks/carry.sh                                 # python3.12, sm_90a → build/carried/_core.cpython-312-….so
#     PYTHON=python3.11 TARGET=80-real bash benchmarks/carry.sh
#
# PYTHON needs its headers and nothing else; cmake, ninja and pybind11 come from TOOLS (default .venv/bin/python). Carry
# build/carried/ beside the tree: `benchmarks/gpu.sh` takes the core from there. NVCC names a compiler off the PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3.12}
TARGET=${TARGET:-90a-real}
TOOLS=${TOOLS:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
for candidate in "$PYTHON" "$HOME"/.pyenv/versions/"${PYTHON#python}"*/bin/python; do # a shim may be there and not run
  found=$("$candidate" -c 'import sys; print(sys.executable)' 2>/dev/null) && break
done
[ -n "${found:-}" ] || { echo "$PYTHON: does not run here; set PYTHON to the interpreter whose core is wanted"; exit 1; }
PYTHON=$found
TOOLS=$(cd "$(dirname "$(command -v "$TOOLS")")" && pwd)/$(basename "$TOOLS")
NVCC=${NVCC:-$("$TOOLS" -c 'from benchmarks.gpu import find_nvcc; print(find_nvcc() or "")')}
[ -n "$NVCC" ] || { echo "nvcc: not on the PATH, in CUDA_HOME or under /usr/local/cuda*; set NVCC"; exit 1; }

tool() { PATH="$(dirname "$TOOLS"):$PATH" command -v "$1" || { echo "$1 is needed: pip install $1" >&2; exit 1; }; }
build=build/carry-$("$PYTHON" -c 'import sys; print(sys.implementation.cache_tag)')
mkdir -p build/carried
CUDACXX="$NVCC" "$(tool cmake)" -S . -B "$build" -G Ninja -DCMAKE_MAKE_PROGRAM="$(tool ninja)" -DCMAKE_BUILD_TYPE=Release \
  -DPYUNICTOKENS_CUDA=on -DPYUNICTOKENS_CUDA_ARCHITECTURES="$TARGET" -DPYUNICTOKENS_OUTPUT="$PWD/build/carried" \
  -DPYUNICTOKENS_VERSION="$(sed -n 's/^__version__ = "\(.*\)"/\1/p' pyunictokens/__init__.py)" \
  -DPython_EXECUTABLE="$PYTHON" -Dpybind11_DIR="$("$TOOLS" -c 'import pybind11; print(pybind11.get_cmake_dir())')" \
  > build/carry.log
"$(tool cmake)" --build "$build" --parallel "${JOBS:-2}" >> build/carry.log
ls -l build/carried
