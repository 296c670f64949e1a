"""`pyunictokens bench`: hand over to the benchmark suite of the source tree.

The suite, its peers and its results live in benchmarks/ and are no part of an installed package.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import typer

from ..errors import UserError

SUITES = {"cpu": "benchmarks.run_cpu"}


def source_tree() -> Path:
    """The folder that holds benchmarks/: the clone this package is installed from, or the present folder."""
    for folder in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (folder / "benchmarks" / "run_cpu.py").is_file():
            return folder
    raise UserError("the benchmarks live in the source tree: clone it, and run this there")


def bench(context: typer.Context) -> None:
    """Measure this library against its peers and write benchmarks/results/. Takes minutes; leave the machine alone.

    Everything behind `bench` goes to the suite: --only, --rounds, --steps, --tokens, --threads, --out.

    Examples:

        pyunictokens bench

        pyunictokens bench --only text --rounds 3
    """
    command = [sys.executable, "-m", SUITES["cpu"], *context.args]
    code = subprocess.run(command, cwd=source_tree(), check=False).returncode
    if code:
        raise typer.Exit(code)
