"""What numbers were taken on and where they go: processor, commit, results folder. Works without git and without torch.

A working tree that was copied without its .git names its commit in UCT_COMMIT.
"""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def processor() -> str:
    """The name of this processor."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str | None:
    """The commit of this tree, with a mark where files differ from it; None where nobody can say."""
    if os.environ.get("UCT_COMMIT"):
        return os.environ["UCT_COMMIT"]
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    except OSError:  # git is not installed
        return None
    return done.stdout.strip() or None


def results() -> Path:
    """Where results go that nobody names a file for: of the clone when called inside it, else beside the caller."""
    here = Path.cwd().resolve()
    if here == ROOT or ROOT in here.parents:
        return ROOT / "benchmarks" / "results"
    return here / "benchmark-results"
