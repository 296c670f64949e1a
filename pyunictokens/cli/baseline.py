"""`pyunictokens baseline …`: train the rivals of the paper's tables on a concept folder.

The methods are those of `baselines/`; this file opens what they are handed and shows their plans.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..utils.errors import UserError
from .shell import (
    Bars,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    OverridesArgument,
    TokenizerOption,
    VisionOption,
    VqOption,
    command,
    console,
    guarded,
)
from .table_options import RATE, RateOption

if TYPE_CHECKING:
    import torch

    from ..baselines.base import Method, Plan

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Other methods, trained on the same concept folder for the paper's tables.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    model: ModelOption = None,
    vq: VqOption = None,
    tokenizer: TokenizerOption = None,
    vision: VisionOption = None,
    config: ConfigOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
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
    from ..baselines.base import Job, run
    from ..baselines.registry import method
    from ..config.settings import from_mapping, load_yaml, with_overrides
    from ..data.folder import load_concept
    from ..models.bundle import Sources
    from ..runs.bundle import load_scorers, open_bundle, resolved_dtype
    from ..toy.model import toy_folder
    from ..train.costs import sizes_of
    from ..utils.devices import check_training_dtype, pick_device, pick_dtype
    from ..utils.signals import Stopped, stop_on_signals

    chosen = method(name)
    if not chosen.masked and (given := [flag for flag, part in (("--vq", vq), ("--tokenizer", tokenizer)) if part]):
        raise UserError(f"{' and '.join(given)}: {name} trains no masked model, it takes --model alone")
    named = Sources(model, vq, tokenizer, vision)
    sources = Sources.choose(named) if chosen.masked else named
    settings = chosen.defaults(chosen.masked and sources.is_toy)
    if config is not None:
        settings = from_mapping(type(settings), load_yaml(config), base=settings, origin=str(config))
    settings = with_overrides(settings, [*([f"seed={seed}"] if seed is not None else []), *(overrides or [])])
    dtype = resolved_dtype(sources, device, dtype)
    place, kind = pick_device(device), pick_dtype(dtype)
    check_training_dtype(kind, resume)
    data = load_concept(root, concept)
    out = out or Path("baselines") / name / data.name
    weights = str(toy_folder() / "showo") if sources.is_toy else sources.model
    job = Job(data, out, settings, sources, place, kind, lambda: open_bundle(sources, str(place), dtype), resume=resume)
    if chosen.masked:
        job.costs = sizes_of(weights)
    if plan:
        _show_plan(chosen, job.settings, chosen.plan(job), place, kind, rate)
        return
    if chosen.masked:
        scorers = load_scorers(sources, place) if data.kind == "human" else None
        job.face_embedding = scorers.face_embedding if scorers is not None else None
    try:
        with Bars() as bars, stop_on_signals(bars.say) as stop:
            job.progress, job.stop = bars, stop
            trained = run(chosen, job)
    except Stopped as stopped:  # asked for, and saved: a good end
        console().print(f"{stopped}; go on with the same command and --resume", markup=False)
        return
    facts = ", ".join(f"{key} {value}" for key, value in trained.facts.items() if not isinstance(value, list))
    console().print(f"{out}: {trained.title}" + (f" ({facts})" if facts else ""), markup=False)
    more = command("evaluate", "table", root, "--name", data.name, "-m", f"{name}:{out}")
    console().print(f"a row of a table: {more}", markup=False)


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


def _show_plan(
    method: Method[Any],
    settings: object,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    rate: float | None,
) -> None:
    """What a training takes, in lines."""
    from ..utils.profiling import matrix_rate

    lines = [f"{method.row(settings)}: {method.about}", f"steps      {plan.steps}"]
    if plan.flops:
        useful, where = RATE * 1e12, f"at {RATE:g} TFLOP/s"
        if rate is not None:
            useful, where = rate * 1e12, f"at {rate:g} TFLOP/s"
        elif device.type == "cpu":
            useful = matrix_rate(device, dtype) / 4
            where = f"on this CPU at a quarter of its matrix rate, {useful / 1e12:.2g} TFLOP/s"
        lines.append(f"minutes    about {plan.flops / useful / 60:.2g} ({plan.flops / 1e12:.3g} TFLOP {where})")
    elif plan.steps:
        lines.append("minutes    not known before the model is here")
    if plan.memory:
        lines.append(f"memory     about {plan.memory / 2**30:.2g} GiB and activations")
    lines += [f"to fetch   {each}" for each in plan.downloads]
    lines += [f"needed     {each}" for each in plan.needs]
    lines += list(plan.notes)
    for line in lines:
        console().print(line, markup=False)


app.command("train")(guarded(train))
app.command("list")(guarded(methods))
