#!/usr/bin/env bash
# Compiles every Triton kernel, in every variant that can be launched, for sm_80, sm_90 and sm_100. Needs no GPU; fails
# when one does not compile, spills registers or wants more shared memory than a block may have. What did not change comes
# from the cache in build/. Then the budget of machine code: products of
# warp groups, 128-bit loads, no local memory, instructions an entry of the step kernel.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton}
unset TRITON_INTERPRET
"$python" -m experiments.kernel_table --check
"$python" -m experiments.machine_code --check
