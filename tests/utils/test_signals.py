"""Workers of a pool end with the process that started them, also while they work and while they wait."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

CODE = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from pyunictokens.utils.signals import end_with_parent_process

if __name__ == "__main__":
    pool = ProcessPoolExecutor(2, multiprocessing.get_context(sys.argv[1]), end_with_parent_process)
    pool.submit(time.sleep, 60)
    pool.submit(os.getpid).result()
    print(*pool._processes, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_no_worker_outlives_its_parent(start: str, tmp_path: Path) -> None:
    (tmp_path / "pool.py").write_text(CODE)
    command = [sys.executable, tmp_path / "pool.py", start]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = parent.stdout.readline().split()
        parent.kill()
    assert len(workers) == 2
    until = time.monotonic() + 30
    while any(Path("/proc", worker).exists() for worker in workers):
        assert time.monotonic() < until
        time.sleep(0.05)
