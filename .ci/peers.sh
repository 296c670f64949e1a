#!/usr/bin/env bash
# Installs what the operations are compared with (Liger-Kernel, TRL, cut-cross-entropy) and a package with a real network
# (OCR), and runs the tests that need them: that each peer computes the same values, the example for TRL, and the reading
# of rendered text. Without this step those tests would be skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
"$python" -m pip install --quiet --disable-pip-version-check ${PIP_FLAGS:-} -c constraints.txt -e '.[bench,ocr]'
"$python" -c 'import cut_cross_entropy, liger_kernel, rapidocr_onnxruntime, trl'
"$python" -m pytest -q tests/test_benchmarks.py tests/test_examples.py tests/rewards/test_prompt_rewards.py
