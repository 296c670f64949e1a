"""`pyunictokens bench`: hand over to the benchmark suite of the source tree.

The suite, its peers and its results live in benchmarks/ and are no part of an installed package.
"""

from __future__ import annotations

import os
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
    "models": "benchmarks.models",
}
"""What can be measured, and the module that does it."""
CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
"""Options go to the suite, and so does --help behind its name."""
HELP = ("-h", "--help")
TOOLS = {"compare": "benchmarks.compare", "plan": "benchmarks.plan"}
"""What works on results or shapes and measures nothing."""


def source_tree() -> Path:
    """The folder that holds benchmarks/: the clone this package is installed from, or the present folder."""
    for folder in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (folder / "benchmarks" / "run_cpu.py").is_file():
            return folder
    raise UserError("the benchmarks live in the source tree: clone it, and run this there")


def bench(
    context: typer.Context,
    suite: Annotated[
        str | None, typer.Argument(help="rollout, memory, ops, rewards or models (all when left out), compare or plan.")
    ] = None,
) -> None:
    """Measure this library against its peers. Takes minutes; leave the machine alone.

    Results go to benchmarks/results/ of the clone when called inside it, else to benchmark-results/ beside the caller;
    --out is relative to the caller.

    What stands behind the suite's name goes to it: for rollout --only, --rounds, --steps, --tokens, --threads, --out;
    for memory --timesteps, --width, --device, --out; for ops --device, --smoke, --operations, --peers, --skip-peers,
    --shape, --rounds, --share, --budget, --threads, --no-memory, --resume, --tables, --out; for rewards --device,
    --rows, --rounds, --threads, --table, --out; for models --only, --rounds, --threads, --smoke, --out. Peers of ops
    that are not installed are listed as such: pip install -e '.[bench]' brings them. `pyunictokens bench SUITE --help`
    tells all of a suite's own.

    Examples:

        pyunictokens bench

        pyunictokens bench rollout --only text --rounds 3

        pyunictokens bench memory --timesteps 5 50

        pyunictokens bench ops --smoke

        pyunictokens bench ops --shape maskgit_step:B=18,N=1024,K=8192

        pyunictokens bench compare before.json after.json --fail-above 5%

        pyunictokens bench plan --shape R=9,T=50,N=1024,D=2048,K=8192
    """
    if suite in HELP:
        typer.echo(context.get_help())
        return
    known = {**SUITES, **TOOLS}
    if suite is not None and suite not in known:
        raise UserError(f"suite {suite!r}: must be {' or '.join(known)}, with its own options behind it")
    paths = [str(source_tree()), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The suite is found there, and not in a folder of the caller that has the same name.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    encoding = os.environ.get("PYTHONIOENCODING", "").partition(":")[0] or sys.stdout.encoding or "utf-8"
    environment["PYTHONIOENCODING"] = f"{encoding}:backslashreplace"  # signs that the terminal lacks end nothing
    for name in [suite] if suite else list(SUITES):
        command = [sys.executable, "-m", known[name], *context.args]
        code = subprocess.run(command, env=environment, check=False).returncode
        if code:
            raise typer.Exit(code)
