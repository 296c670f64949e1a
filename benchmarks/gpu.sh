#!/usr/bin/env bash
# What a machine with an NVIDIA GPU has to say, in commands of at most seven minutes:
#
#     bash benchmarks/gpu.sh --first      # environment, core, smoke, tests, operations, images; then one page of goals
#     bash benchmarks/gpu.sh --second     # GRPO steps, answers, each lever of a rollout step on and off, the other cases,
#                                         # torch.compile; merges with --first
#     bash benchmarks/gpu.sh --dry-run    # both, every stage, on a machine without a GPU: proves that the script runs
#
# Every stage is a process of its own with a time limit of its own, and writes its numbers as it goes: one that fails,
# hangs or takes the device down leaves the others their time. Results lie in $OUT (default build/gpu): one JSON a stage,
# ops-gpu.json, engine-gpu.json, tests.xml, a log each, summary.txt. SECONDS_ALL (420) bounds the whole. A core for this
# Python that benchmarks/carry.sh built (build/carried/) is taken as it is; else nvcc builds one for this card; what was
# fallen back to is said with "!!!". PYTHON chooses the interpreter. Nothing is downloaded.
set -uo pipefail

mode="${1:---help}"
case "$mode" in --first | --second | --dry-run) ;; *) sed -n '2,16p' "$0"; exit 2 ;; esac
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="$(realpath -m "${OUT:-$root/build/gpu}")"
python="${PYTHON:-python3}"
all="${SECONDS_ALL:-420}"
device=cuda patience=1
kept="$root/build/gpu-first" # where --second, called on the same machine, finds what --first wrote
export PYTHONUNBUFFERED=1 PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$root/build/triton}"
mkdir -p "$out"
cd "$root"
SECONDS=0

left() { echo $((all - SECONDS)); }

stage() { # name, seconds at most, command: never fails, says how it ended
  local name=$1 limit=$2 code=0 began=$SECONDS
  shift 2
  limit=$((limit * patience))
  [ "$(left)" -lt "$limit" ] && limit=$(left)
  if [ "$limit" -lt 5 ]; then echo "[$SECONDS s] $name: left out, $(left) s are left"; return 0; fi
  echo "[$SECONDS s] $name: begins, at most $limit s"
  timeout -k 5 "$limit" "$@" 2>&1 | tee "$out/$name.log" | tail -n "${LINES_SHOWN:-15}"
  code=${PIPESTATUS[0]}
  case $code in 0) local how="ended well" ;; 124 | 137) local how="RAN OUT OF TIME" ;; *) local how="FAILED ($code)" ;; esac
  echo "[$SECONDS s] $name: $how after $((SECONDS - began)) s"
  return 0
}

again() { # a suite that lost the device to an error goes on in a new process, twice at most
  for _ in 1 2 3; do
    "$@" && return 0
    [ $? = 3 ] || return 1
    echo "the device was lost: on in a new process"
  done
}
export -f again

ops=("$python" -m benchmarks.ops --device $device --resume --out "$out/ops-gpu.json")
engine=("$python" -m benchmarks.engine_gpu --device $device --resume --out "$out/engine-gpu.json" --budget 88)
tests=("$python" -m pytest -q -m gpu --tb=short -p no:cacheprovider --junitxml "$out/tests.xml")
"$python" -c 'import xdist' 2>/dev/null && tests+=(-n 8 --dist loadfile) || echo "!!! pytest-xdist is not installed: tests run one by one"
proofs=(tests/gpu/test_values.py tests/gpu/test_rotary.py tests/gpu/test_scores.py tests/gpu/test_head.py tests/gpu/test_fused_gelu.py tests/gpu/test_graph_loop.py tests/gpu/test_capture.py tests/gpu/test_rollout.py)
if [ "$mode" = --dry-run ]; then
  device=cpu patience=10 all=3000 # a machine that others use as well may take its time: nothing is measured
  ops=("$python" -m benchmarks.ops --device cpu --smoke --resume --out "$out/ops-gpu.json")
  engine=("$python" -m benchmarks.engine_gpu --device cpu --smoke --resume --out "$out/engine-gpu.json" --budget 3000)
  tests=("$python" -m pytest -q -m "not gpu" --tb=short -p no:cacheprovider --junitxml "$out/tests.xml" -k "grpo_loss and cpu")
  proofs=(tests/gpu/test_capture.py)
elif ! timeout 60 "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "torch finds no GPU here; --dry-run goes through every stage without one"
  exit 1
fi

first() {
  stage environment 40 "$python" -m benchmarks.gpu environment --device $device --out "$out"
  stage core 90 "$python" -m benchmarks.gpu core --device $device --out "$out"
  stage smoke 45 "$python" -m benchmarks.gpu smoke --device $device --out "$out"
  stage tests 120 "${tests[@]}" "${proofs[@]}"
  stage ops 105 bash -c 'again "$@"' ops "${ops[@]}" --budget 80 --skip-peers compile ours-reference
  stage engine 95 bash -c 'again "$@"' engine "${engine[@]}" --only images batched published
}

second() {
  if [ ! -e "$out/ops-gpu.json" ] && [ -d "$kept" ]; then cp -n "$kept"/*.json "$kept"/*.xml "$out"/ 2>/dev/null || true; fi
  stage grpo 120 bash -c 'again "$@"' engine "${engine[@]}" --only grpo answers --grpo-steps 10 --budget 112
  stage levers 95 bash -c 'again "$@"' engine "${engine[@]}" --only levers --budget 86
  stage more-ops 90 bash -c 'again "$@"' ops "${ops[@]}" --budget 68 --skip-peers compile ours-reference
  stage more-engine 60 bash -c 'again "$@"' engine "${engine[@]}" --only image small published batched --budget 52
  stage compile 50 "$python" -m benchmarks.ops --device $device --out "$out/ops-compile.json" --budget 28 \
    --peers ours-triton ours-cuda compile
}

LINES_SHOWN=40
case "$mode" in
  --first) first ;;
  --second) second ;;
  --dry-run)
    first
    stage grpo 120 "${engine[@]}" --only grpo answers
    stage levers 95 "${engine[@]}" --only levers
    ;;
esac
"$python" -m benchmarks.gpu summary --device $device --out "$out" | tee "$out/summary.txt"
if [ "$mode" = --first ]; then mkdir -p "$kept" && cp -f "$out"/*.json "$out"/*.xml "$kept"/ 2>/dev/null || true; fi
echo "[$SECONDS s] all of it lies in $out"
