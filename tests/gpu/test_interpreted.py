"""The Triton backend goes through these very tests without a GPU: in a process of its own with the interpreter on."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyunictokens.ops import registry as _dispatch

FILES = ("test_values.py", "test_gradients.py", "test_determinism.py", "test_capture.py")


@pytest.mark.slow
def test_triton_under_the_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter is on already")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed here")
    if "triton" not in _dispatch._table["maskgit_grpo_loss"]:
        pytest.skip("this version has no triton implementation of maskgit_grpo_loss")
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", "-k", "triton"]
    done = subprocess.run(
        [*command, *(str(here / name) for name in FILES)],
        cwd=here.parents[1],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
