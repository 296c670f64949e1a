#!/usr/bin/env bash
# Twenty toy concepts on two cores with tiny settings: shows what `train --concepts` does, in minutes, without weights.
#
#   bash experiments/recipes/twenty_toys.sh            # runs/toys/report.html
#   N=4 STEPS=1 bash experiments/recipes/twenty_toys.sh
#
# Kill it whenever you like and start it again: finished concepts stay, the others go on from their last checkpoint.
# DRY_RUN=1 prints the commands and runs none.
set -euo pipefail

N=${N:-20}
STEPS=${STEPS:-2}
WORKERS=${WORKERS:-2}
DATA=${DATA:-runs/toys/data}
OUT=${OUT:-runs/toys/runs}

run() { echo "+ $*"; [ -n "${DRY_RUN:-}" ] || "$@"; }

KINDS=(animal human object)
for ((i = 0; i < N; i++)); do
  if [ ! -f "$DATA/concept/test/toy$i/truth.json" ]; then
    run pyunictokens data toy "$DATA" "toy$i" --kind "${KINDS[i % 3]}" --seed "$((100 + i))"
  fi
done

run pyunictokens train --concepts all --workers "$WORKERS" "$DATA" --out "$OUT" \
  stages.max_steps=20 grpo.steps="$STEPS" grpo.group_size=3 grpo.timesteps=4 grpo.sample_every=0 \
  evaluation.samples=1 evaluation.timesteps=4
