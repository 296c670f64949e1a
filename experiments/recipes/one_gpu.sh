#!/usr/bin/env bash
# One concept on one GPU, from photos to a report, on real Show-o weights.
#
#   DATA=mydata CONCEPT=mug SHOWO=weights/show-o-512x512 VQ=weights/magvitv2 PHI=weights/phi-1_5 \
#       bash experiments/recipes/one_gpu.sh
#
# The three weight folders are described in docs/real-weights.md. Started again, it goes on where it stopped: the same
# line serves a machine that may be taken away at any time. REWARDS names the reward models; by default those of rewards.yaml here.
# DRY_RUN=1 prints the commands and runs none.
set -euo pipefail

: "${DATA:?the data folder, the one that holds concept/train/}"
: "${CONCEPT:?the name of the concept in it}"
: "${SHOWO:?folder or hub id of the Show-o checkpoint}"
: "${VQ:?folder or hub id of MAGVIT-v2}"
: "${PHI:?folder with the tokenizer.json of Phi-1.5}"
REWARDS=${REWARDS:-experiments/recipes/rewards.yaml}
OUT=${OUT:-runs/$CONCEPT}

run() { echo "+ $*"; [ -n "${DRY_RUN:-}" ] || "$@"; }

# the folder first: every problem is reported at once, and nothing is changed
run pyunictokens data check "$DATA" "$CONCEPT"

# The paper's settings are the default. bfloat16 halves the memory of activations; sums, loss and optimizer stay in
# float32. checkpoint_every=5 loses at most five steps to a crash; keep_best=1 keeps the best checkpoint beside the last.
RESUME=()
if [ -f "$OUT/config.yaml" ]; then RESUME=(--resume); fi
run pyunictokens train "$DATA" "$CONCEPT" --out "$OUT" ${RESUME[@]+"${RESUME[@]}"} \
  --model "$SHOWO" --vq "$VQ" --tokenizer "$PHI" --rewards "$REWARDS" --preset paper --dtype bfloat16 \
  grpo.checkpoint_every=5 grpo.keep_best=1 grpo.reward_timeout=600
