#!/usr/bin/env bash
# First the step kernel's team code with 256 real threads under ThreadSanitizer: a barrier that is missing is a race there;
# the same with a barrier left out on purpose must be caught. Then the CPU core under AddressSanitizer and
# UndefinedBehaviorSanitizer: builds it in a folder of its own, beside nothing that is installed, and runs the core's tests
# with it. Any report ends the run. `--threads` does the first part alone. PYTHON chooses the interpreter (it needs torch,
# pytest, cmake, ninja and pybind11), BUILD the folder.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
PYTHON=$("$PYTHON" -c 'import sys; print(sys.executable)')
BUILD=${BUILD:-build/sanitize}
flags="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"

threads() { # extra flags, name
  "${CXX:-g++}" -std=c++20 -O1 -g -fsanitize=thread -Wall -Wextra -Werror -Wno-unknown-pragmas $1 -Icsrc/include -Icsrc/cuda \
    csrc/cuda/maskgit_threads.cpp csrc/cpu/maskgit_emulated.cpp -pthread -o "$BUILD/$2"
  TSAN_OPTIONS=halt_on_error=1 timeout 300 "$BUILD/$2"
}
mkdir -p "$BUILD"
threads "" threads
for dropped in each one; do
  if threads "-DDROP_BARRIER=$dropped" "dropped-$dropped" > "$BUILD/dropped.log" 2>&1; then
    echo "a barrier left out of $dropped() went unseen"
    exit 1
  fi
  grep -q "data race" "$BUILD/dropped.log" || { tail -5 "$BUILD/dropped.log"; exit 1; }
done
[ "${1:-}" != --threads ] || { echo "the step kernel's threads agree, and a missing barrier is seen"; exit 0; }

tool() { command -v "$(dirname "$PYTHON")/$1" || command -v "$1"; }
mkdir -p "$BUILD/core"
BUILD=$(cd "$BUILD" && pwd)
rm -f "$BUILD"/core/*
"$(tool cmake)" -S . -B "$BUILD" -G Ninja -DCMAKE_MAKE_PROGRAM="$(tool ninja)" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DCMAKE_CXX_FLAGS="$flags" -DPYUNICTOKENS_CUDA=off -DPYUNICTOKENS_WERROR=ON -DPYUNICTOKENS_OUTPUT="$BUILD/core" \
  -DPython_EXECUTABLE="$PYTHON" -Dpybind11_DIR="$("$PYTHON" -c 'import pybind11; print(pybind11.get_cmake_dir())')" \
  -DPYUNICTOKENS_VERSION="$("$PYTHON" -c 'from importlib.metadata import version; print(version("pyunictokens"))')" \
  > "$BUILD/configure.log"
"$(tool cmake)" --build "$BUILD" --parallel 2

# A plugin of pytest puts this core where the package looks for the installed one. Python and torch are not instrumented,
# so leaks are not looked for (what lives until an interpreter ends is theirs).
cat > "$BUILD/core/sanitized_core.py" <<'END'
import importlib.util, pathlib, sys

path = next(pathlib.Path(__file__).parent.glob("_core*"))
spec = importlib.util.spec_from_file_location("pyunictokens._core", path)
sys.modules["pyunictokens._core"] = core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)

def pytest_sessionfinish():
    from pyunictokens.ops.backends import cpu
    assert cpu.core() is core, "the tests ran with another core"
END
runtime=$("${CXX:-g++}" -print-file-name=libasan.so)
library=$("${CXX:-g++}" -print-file-name=libstdc++.so)
LD_PRELOAD="$runtime $library" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
  PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$BUILD/core" "$PYTHON" -m pytest -q -p no:cacheprovider -p sanitized_core \
  tests/ops/test_cpu_core.py tests/ops/test_cpu_pointwise.py tests/ops/test_cuda_core.py tests/ops/test_maskgit_step.py "$@"
echo "no sanitizer had anything to say"
