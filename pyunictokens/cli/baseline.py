"""`pyunictokens baseline …`: train the rivals of the paper's tables on a concept folder.

The methods are those of `baselines/`; this file opens what they are handed and shows their plans.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .groups import MACHINE, MODELS, Machine, Models, spread, useful_rate
from .shell import Bars, ConfigOption, OverridesArgument, command, console, guarded, say
from .table_options import RateOption, TableClipOption

if TYPE_CHECKING:
    from ..baselines.base import Method, Plan, S

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Other methods, trained on the same concept folder for the paper's tables.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@spread
def train(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The method; `baseline list` names all.")],
    root: Annotated[Path, typer.Argument(help="The data folder, in the layout of UnifyBench++.")],
    concept: Annotated[str, typer.Argument(help="The concept.")],
    overrides: OverridesArgument = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of what is learned.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the training in --out where it stopped.")] = (
        False
    ),
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what it takes (minutes, memory, downloads, what is needed); do nothing.")
    ] = False,
    models: Models = MODELS,
    clip: TableClipOption = None,
    config: ConfigOption = None,
    machine: Machine = MACHINE,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Same seed, same result. Default: 0.")] = None,
    rate: RateOption = None,
) -> None:
    """Train one method on one concept. `evaluate table … -m NAME:DIR` then has it as a row.

    Settings are the method's own; their defaults are its published recipe, or what fits the embedded toy where the
    toy is trained (docs/baselines.md).

    Examples:

        pyunictokens baseline train unictokens toydata bo --out baselines/unictokens/bo

        pyunictokens baseline train unictokens mydata bo --model show-o-512 --plan

        pyunictokens evaluate table toydata --name bo -m unictokens:baselines/unictokens/{name} -m showo-tp
    """
    from ..baselines.base import run
    from ..baselines.registry import method
    from ..config.settings import load_yaml
    from ..data.folder import load_concept
    from ..runs.baseline_jobs import make_job, settings_of
    from ..utils.signals import Stopped, stop_on_signals

    chosen, named = method(name), models.sources
    words = [*([f"seed={seed}"] if seed is not None else []), *(overrides or [])]
    settings = settings_of(chosen, named, words, load_yaml(config) if config else None, str(config))
    data = load_concept(root, concept)
    out = out or Path("baselines") / name / data.name
    job = make_job(
        chosen, data, out, named, settings, device=machine.device, dtype=machine.dtype, clip=clip, resume=resume
    )
    if plan:
        _show_plan(chosen, job.settings, chosen.plan(job), machine, rate)
        return
    try:
        with Bars() as bars, stop_on_signals(bars.say) as stop:
            job.progress, job.stop = bars, stop
            trained = run(chosen, job)
    except Stopped as stopped:  # asked for, and saved: a good end
        say(f"{stopped}; go on with the same command and --resume")
        return
    facts = ", ".join(f"{key} {value}" for key, value in trained.facts.items() if not isinstance(value, list))
    say(f"{out}: {trained.title}" + (f" ({facts})" if facts else ""))
    more = command("evaluate", "table", root, "--name", data.name, "-m", f"{name}:{out}")
    say(f"a row of a table: {more}")


def methods() -> None:
    """List the methods that can be trained.

    Examples:

        pyunictokens baseline list
    """
    from rich.table import Table as Grid

    from ..baselines.registry import METHODS, method

    grid = Grid(box=None, padding=(0, 2, 0, 0))
    for title in ("NAME", "row", "trains", "what it learns"):
        grid.add_column(title, no_wrap=title != "what it learns")
    for name in METHODS:
        one = method(name)
        grid.add_row(name, one.title, one.model or "the masked model", one.about)
    console().print(grid)


def _show_plan(method: Method[S], settings: S, plan: Plan, machine: Machine, rate: float | None) -> None:
    """What a training takes, in lines."""
    lines = [f"{method.row(settings)}: {method.about}", f"steps      {plan.steps}"]
    if plan.flops:
        useful, where = useful_rate(rate, machine)
        lines.append(f"minutes    about {plan.flops / useful / 60:.2g} ({plan.flops / 1e12:.3g} TFLOP {where})")
    elif plan.steps:
        lines.append("minutes    not known before the model is here")
    if plan.memory:
        lines.append(f"memory     about {plan.memory / 2**30:.2g} GiB and activations")
    lines += [f"to fetch   {each}" for each in plan.downloads]
    lines += [f"needed     {each}" for each in plan.needs]
    lines += list(plan.notes)
    for line in lines:
        say(line)


app.command("train")(guarded(train))
app.command("list")(guarded(methods))
