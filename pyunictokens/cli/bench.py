"""`pyunictokens bench`: hand over to the benchmark suite of the source tree.

The suite, its peers and its results live in benchmarks/ and are no part of an installed package.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..utils.errors import UserError

SUITES = {
    "rollout": "benchmarks.run_cpu",
    "memory": "benchmarks.update_memory",
    "ops": "benchmarks.ops",
    "rewards": "benchmarks.rewards_batch",
}
"""What can be measured, and the module that does it."""


def source_tree() -> Path:
    """The folder that holds benchmarks/: the clone this package is installed from, or the present folder."""
    for folder in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (folder / "benchmarks" / "run_cpu.py").is_file():
            return folder
    raise UserError("the benchmarks live in the source tree: clone it, and run this there")


def bench(
    context: typer.Context,
    suite: Annotated[str | None, typer.Argument(help="rollout, memory, ops or rewards; all when left out.")] = None,
) -> None:
    """Measure this library against its peers and write benchmarks/results/. Takes minutes; leave the machine alone.

    What stands behind the suite's name goes to it: for rollout --only, --rounds, --steps, --tokens, --threads, --out;
    for memory --timesteps, --width, --device, --out; for ops --device, --smoke, --operations, --peers, --rounds,
    --share, --budget, --threads, --no-memory, --tables, --out; for rewards --device, --rows, --rounds, --threads,
    --table, --out. Peers of ops that are not installed are listed as such: pip install -e '.[bench]' brings them.

    Examples:

        pyunictokens bench

        pyunictokens bench rollout --only text --rounds 3

        pyunictokens bench memory --timesteps 5 50

        pyunictokens bench ops --smoke
    """
    if suite is not None and suite not in SUITES:
        raise UserError(f"suite {suite!r}: must be {' or '.join(SUITES)}, with its own options behind it")
    root = source_tree()
    for name in [suite] if suite else list(SUITES):
        code = subprocess.run([sys.executable, "-m", SUITES[name], *context.args], cwd=root, check=False).returncode
        if code:
            raise typer.Exit(code)
