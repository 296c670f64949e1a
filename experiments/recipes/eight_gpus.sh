#!/usr/bin/env bash
# Many concepts on the GPUs of one machine: a job a concept, a GPU a job, as many at a time as there are GPUs.
#
#   DATA=mydata SHOWO=... VQ=... PHI=... bash experiments/recipes/eight_gpus.sh
#
# Concepts do not depend on each other, so this needs no communication between GPUs. What is done is not done again; a
# job that breaks down is taken up again from its last checkpoint, twice. The table is runs/all/results.csv, the page
# runs/all/report.html. DRY_RUN=1 prints the command and runs nothing.
set -euo pipefail

: "${DATA:?the data folder, the one that holds concept/train/}"
: "${SHOWO:?folder or hub id of the Show-o checkpoint}"
: "${VQ:?folder or hub id of MAGVIT-v2}"
: "${PHI:?folder with the tokenizer.json of Phi-1.5}"
REWARDS=${REWARDS:-paper}
OUT=${OUT:-runs/all}
WORKERS=${WORKERS:-8}

run() { echo "+ $*"; [ -n "${DRY_RUN:-}" ] || "$@"; }

# --device auto gives worker i the GPU i (modulo their number); OMP_NUM_THREADS is shared out likewise
run pyunictokens train --concepts "${CONCEPTS:-all}" --workers "$WORKERS" --retries 2 "$DATA" --out "$OUT" \
  --model "$SHOWO" --vq "$VQ" --tokenizer "$PHI" --rewards "$REWARDS" --preset paper --dtype bfloat16 \
  grpo.checkpoint_every=5 grpo.keep_best=1
