"""`pyunictokens demo`: everything on the toy, start to finish."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .shell import Bars, DeviceOption, DtypeOption, OverridesArgument, SeedOption, console, plain_table, say

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..evaluate.result import EvalResult


def demo(
    overrides: OverridesArgument = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the demo; an earlier one is replaced.")] = Path(
        "demo"
    ),
    kind: Annotated[str, typer.Option("--kind", help="human, animal or object.")] = "animal",
    prompts: Annotated[
        bool, typer.Option("--prompts", help="The other form of reinforcement: a list of prompts, no concept.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
) -> None:
    """Teach the toy model one drawn concept, start to finish, and report what changed.

    Settings are those of `train`, from its toy preset. With --prompts a model of scenes with up to four things is
    reinforced on a list of prompts instead, as `reinforce` does it, and measured on others that never train; on a CPU
    that multiplies bfloat16 it computes in it unless --dtype says otherwise.

    Examples:

        pyunictokens demo

        pyunictokens demo --kind human --seed 3 --out demo_human

        pyunictokens demo grpo.steps=10 evaluation.samples=2

        pyunictokens demo --prompts --out reinforce steps=300
    """
    from ..runs.demo import run_demo
    from ..runs.prompt_demo import run_prompt_demo

    started = time.monotonic()
    if prompts:
        with Bars() as bars:
            found = run_prompt_demo(out, seed=seed, words=overrides or [], device=device, dtype=dtype, progress=bars)
        say(found.sentence)
        minutes, seconds = divmod(round(time.monotonic() - started), 60)
        say(f"{minutes} min {seconds} s; the curve: {found.curve}, pictures: {found.pictures}")
        return
    with Bars() as bars:
        outcome = run_demo(out, kind=kind, seed=seed, words=overrides or [], device=device, dtype=dtype, progress=bars)
    show_results(outcome.results)
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    say(f"{minutes} min {seconds} s; the report: {outcome.report}")


def show_results(results: Mapping[str, EvalResult]) -> None:
    """The table of headline measures, one column an evaluation."""
    from ..runs.demo import headline_rows

    titles = ["", *results, *(["change [95 %]"] if len(results) > 1 else [])]
    table = plain_table(*titles, right=results)
    for row in headline_rows(results):
        table.add_row(*row[: len(titles)])
    console().print(table)
