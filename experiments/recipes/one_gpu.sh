#!/usr/bin/env bash
# One concept on one GPU, from photos to a report, on real Show-o weights.
#
#   DATA=mydata CONCEPT=mug bash experiments/recipes/one_gpu.sh
#
# MODEL is a word, a hub id or a folder (docs/real-weights.md); beside a folder name VQ and PHI. REWARDS names the reward
# models; by default the paper's. Started again, it goes on where it stopped: the same line serves a machine that may be
# taken away at any time. DRY_RUN=1 prints the commands and runs none.
set -euo pipefail

: "${DATA:?the data folder, the one that holds concept/train/}"
: "${CONCEPT:?the name of the concept in it}"
MODEL=(--model "${MODEL:-${SHOWO:-show-o-512}}" ${VQ:+--vq "$VQ"} ${PHI:+--tokenizer "$PHI"})
REWARDS=${REWARDS:-paper}
OUT=${OUT:-runs/$CONCEPT}

run() { echo "+ $*"; [ -n "${DRY_RUN:-}" ] || "$@"; }

# the folder first: every problem is reported at once, and nothing is changed; then what the run needs
run pyunictokens data check "$DATA" "$CONCEPT"
run pyunictokens train "$DATA" "$CONCEPT" --plan "${MODEL[@]}" --rewards "$REWARDS" --preset paper grpo.keep_best=1

# The paper's settings are the default, and bfloat16 on a GPU; sums, loss and optimizer stay in float32.
# checkpoint_every=5 loses at most five steps to a crash; keep_best=1 keeps the best checkpoint beside the last.
RESUME=()
if [ -f "$OUT/config.yaml" ]; then RESUME=(--resume); fi
run pyunictokens train "$DATA" "$CONCEPT" --out "$OUT" ${RESUME[@]+"${RESUME[@]}"} \
  "${MODEL[@]}" --rewards "$REWARDS" --preset paper \
  grpo.checkpoint_every=5 grpo.keep_best=1 grpo.reward_timeout=600
