#!/usr/bin/env bash
# One concept on all GPUs of one machine: the rollouts of each step are dealt over them, a process a GPU.
#
#   DATA=mydata CONCEPT=mug SHOWO=... VQ=... PHI=... GPUS=8 bash experiments/recipes/torchrun.sh
#
# A process that dies ends the others with a line that names it, and torchrun starts all anew, RESTARTS times; they go on
# from the last checkpoint. Started again by hand, it goes on as well. GROUPS_A_STEP questions a step keep many GPUs busy:
# nine rollouts cannot be dealt over sixteen. docs/distributed.md tells the rest. DRY_RUN=1 prints and runs nothing.
set -euo pipefail

: "${DATA:?the data folder, the one that holds concept/train/}"
: "${CONCEPT:?the name of the concept in it}"
: "${SHOWO:?folder or hub id of the Show-o checkpoint}"
: "${VQ:?folder or hub id of MAGVIT-v2}"
: "${PHI:?folder with the tokenizer.json of Phi-1.5}"
REWARDS=${REWARDS:-paper}
OUT=${OUT:-runs/$CONCEPT}
GPUS=${GPUS:-8}
RESTARTS=${RESTARTS:-3}

run() { echo "+ $*"; [ -n "${DRY_RUN:-}" ] || "$@"; }

RESUME=()
if [ -f "$OUT/config.yaml" ]; then RESUME=(--resume); fi
run torchrun --standalone --nproc-per-node "$GPUS" --max-restarts "$RESTARTS" -m pyunictokens train "$DATA" "$CONCEPT" \
  --out "$OUT" ${RESUME[@]+"${RESUME[@]}"} --model "$SHOWO" --vq "$VQ" --tokenizer "$PHI" --rewards "$REWARDS" \
  --preset paper --dtype bfloat16 grpo.groups="${GROUPS_A_STEP:-1}" grpo.checkpoint_every=5 grpo.keep_best=1 \
  grpo.save_in_background=true grpo.reward_timeout=600
