"""compute-sanitizer over small calls of everything: no wrong access, no race, no unequal barrier.

On the CPU the same calls run without the tool (the C++ core has AddressSanitizer runs of its own in .ci/sanitize.sh).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOUND = 86
"""Exit code of the tool where it found something."""


def _tool() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def test_small_calls_run_on_the_cpu() -> None:
    from tests.gpu import small_calls

    assert small_calls.main("cpu") >= 14


@pytest.mark.gpu
@pytest.mark.parametrize("check", ["memcheck", "racecheck", "synccheck"])
def test_nothing_is_found(check: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device here")
    tool = _tool()
    if tool is None:
        pytest.skip("compute-sanitizer is not installed here")
    command = [
        tool,
        "--tool",
        check,
        "--error-exitcode",
        str(FOUND),
        sys.executable,
        "-m",
        "tests.gpu.small_calls",
        "cuda",
    ]
    # Every tensor its own allocation, or the allocator's pool hides an access beyond a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, env=environment)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{check} did not end within 150 s here")
    text = done.stdout + done.stderr
    if re.search(r"Device not supported|device is not supported", text):
        pytest.skip("compute-sanitizer does not support this machine's GPU")
    assert done.returncode == 0, text[-4000:]
