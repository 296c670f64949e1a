#!/usr/bin/env bash
# One concept with the reward experts on a GPU of their own: the trainer's GPU keeps its memory for rollouts and updates.
#
#   DATA=mydata CONCEPT=bo SHOWO=... VQ=... PHI=... REWARDS=rewards.yaml bash experiments/recipes/experts_apart.sh
#
# Experts run on EXPERTS_DEVICE, training on GPU 0 (one_gpu.sh, which goes on with a run that is there). For experts on
# other machines start `pyunictokens rewards serve --host 0.0.0.0` there, with the same key, and give their addresses as
# REWARDS=http://a:7000,http://b:7000 to one_gpu.sh. DRY_RUN=1 prints the commands and runs none.
set -euo pipefail

REWARDS=${REWARDS:-paper}
PORT=${PORT:-7000}
EXPERTS_DEVICE=${EXPERTS_DEVICE:-cuda:1}
: "${PYUNICTOKENS_REWARDS_KEY:=$(python3 -c 'import secrets; print(secrets.token_hex(32))')}"
export PYUNICTOKENS_REWARDS_KEY

run() { echo "+ $*"; [ -n "${DRY_RUN:-}" ] || "$@"; }

SERVE=(pyunictokens rewards serve --rewards "$REWARDS" --port "$PORT" --device "$EXPERTS_DEVICE")
echo "+ ${SERVE[*]}"
if [ -z "${DRY_RUN:-}" ]; then
  "${SERVE[@]}" &
  SERVER=$!
  trap 'kill $SERVER 2>/dev/null && wait $SERVER || true' EXIT
  until (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; do
    kill -0 $SERVER || { echo "the experts did not start" >&2; exit 1; }
    sleep 1
  done
fi

REWARDS=http://127.0.0.1:$PORT run bash experiments/recipes/one_gpu.sh
