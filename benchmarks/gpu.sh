#!/usr/bin/env bash
# Everything a machine with an NVIDIA GPU has to say about the operations, in one command: build, prove, measure.
#
#     bash benchmarks/gpu.sh              # build, then `pytest -m gpu` (at most 8 minutes), then the benchmarks (at most 9)
#     bash benchmarks/gpu.sh --test       # build, then the tests alone
#     bash benchmarks/gpu.sh --bench      # build, a short proof of correctness, then the benchmarks alone
#     bash benchmarks/gpu.sh --engine     # build, prove the captured loop, then the rollout engine at full size (at most 9)
#     bash benchmarks/gpu.sh --dry-run    # without a GPU: says what it would build and run, measures tiny shapes on the CPU
#
# The report goes to $OUT/ops-gpu.json (of --engine: engine-gpu.json) with the logs beside it; without OUT to
# benchmarks/results/ops-<machine>.json, the logs to build/. BENCH_SECONDS and TEST_SECONDS (540, 480) bound the parts. Wants a Python with torch, triton, pytest, cmake,
# ninja and pybind11 (PYTHON chooses it) and nvcc; nothing is downloaded. Alternatives that are not installed are listed as
# such: pip install -e '.[bench]'.
set -euo pipefail

mode="${1:-all}"
case "$mode" in all | --test | --bench | --engine | --dry-run) ;; *) sed -n '2,15p' "$0"; exit 2 ;; esac
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="$(realpath -m "${OUT:-$root/build}")"
python="${PYTHON:-python3}"
tests_limit="${TEST_SECONDS:-480}" bench_limit="${BENCH_SECONDS:-540}"
export PYTHONUNBUFFERED=1
mkdir -p "$out"
cd "$root"

build=("$python" -m pip install --quiet --no-build-isolation --no-deps -e .)
first=("$python" -m pytest -q -m gpu tests/gpu/test_values.py)
suite=("$python" -m pytest -q -m gpu --durations=15 tests)
# No case starts in the last 90 seconds, so that the last one ends inside the limit; the report is saved after each.
bench=("$python" -m benchmarks.ops --device cuda --budget $((bench_limit - 90)))
loop=("$python" -m pytest -q -m gpu tests/gpu/test_graph_loop.py)
engine=("$python" -m benchmarks.engine_gpu --device cuda --budget $((bench_limit - 40)))

if [ "$mode" = --dry-run ]; then
  echo "would build: ${build[*]}"
  echo "would run: ${first[*]}"
  echo "would run: ${suite[*]}"
  echo "would run: ${bench[*]}"
  echo "would run: ${loop[*]}"
  echo "would run: ${engine[*]}"
  "$python" -m benchmarks.ops --device cpu --smoke --peers ours-reference ours-cpu eager --out "$out/ops-dry-run.json"
  "$python" -m benchmarks.engine_gpu --device cpu --smoke --out "$out/engine-dry-run.json"
  exit 0
fi

"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "torch finds no GPU here; try --dry-run")'
"$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'
PYUNICTOKENS_CUDA=auto "${build[@]}"

if [ "$mode" = --engine ]; then
  timeout "$tests_limit" "${loop[@]}" 2>&1 | tee "$out/gpu-loop.log" || echo "the captured loop failed a test: see gpu-loop.log"
  timeout "$bench_limit" "${engine[@]}" ${OUT:+--out "$out/engine-gpu.json"} 2>&1 | tee "$out/gpu-engine.log"
  exit "${PIPESTATUS[0]}"
fi

# Correctness first: nothing is measured that is not right. The whole suite may fail on something no benchmark needs; then
# the numbers are still taken, and the exit code says that a test failed.
timeout "$tests_limit" "${first[@]}" 2>&1 | tee "$out/gpu-values.log"
failed=0
if [ "$mode" != --bench ]; then
  timeout "$tests_limit" "${suite[@]}" 2>&1 | tee "$out/gpu-tests.log" || failed=1
fi
if [ "$mode" != --test ]; then
  timeout "$bench_limit" "${bench[@]}" ${OUT:+--out "$out/ops-gpu.json"} 2>&1 | tee "$out/gpu-bench.log"
fi
[ $failed = 0 ] || { echo "a GPU test failed: $out/gpu-tests.log"; exit 1; }
