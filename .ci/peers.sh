#!/usr/bin/env bash
# Installs what the operations are compared with (Liger-Kernel, TRL, cut-cross-entropy) and runs the tests that need them:
# that each peer computes the same values, and the example for TRL. Without this step those tests would be skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
"$python" -m pip install --quiet --disable-pip-version-check ${PIP_FLAGS:-} -c constraints.txt -e '.[bench]'
"$python" -c 'import cut_cross_entropy, liger_kernel, trl'
"$python" -m pytest -q tests/test_benchmarks.py tests/test_examples.py
