"""`pyunictokens evaluate paper`: Tables 1, 2, 3 and 5 over all concepts of a folder, with a plan first.

What runs and rows the tables have stands in runs/paper.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..utils.errors import UserError
from .evaluate_table import show
from .groups import MACHINE, MODELS, SCORING, Machine, Models, Scoring, spread, useful_rate
from .shell import Bars, ConfigOption, OverridesArgument, as_words, console, say
from .table_options import MODELS_HELP, RateOption
from .train import Preset

if TYPE_CHECKING:
    from ..models.bundle import Sources
    from ..runs.paper import Plan

BY_NUMBER = {"1": ("table1",), "2": ("table2",), "3": ("table3",), "5": ()}
"""Tables of the paper by number; the parts of Table 5 are named by their folders."""


@spread
def paper(
    root: Annotated[
        Path | None,
        typer.Argument(help="The data folder, in the layout of UnifyBench++. With --toy: drawn here. Table 5: none."),
    ] = None,
    overrides: OverridesArgument = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of all runs and tables.")] = Path("paper"),
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done and how long it takes; do nothing.")] = (
        False
    ),
    table: Annotated[
        list[str] | None, typer.Option("--table", metavar="1|2|3|5", help="A table by its number; once for each.")
    ] = None,
    tables: Annotated[
        str | None, typer.Option("--tables", metavar="table1,…", help="Some of table1, table2, table3. Default: all.")
    ] = None,
    toy: Annotated[
        bool, typer.Option("--toy", help="Everything on the embedded toy, on an animal and an object drawn for it.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A trial: a few steps of everything, one item of each task.")
    ] = False,
    name: Annotated[list[str] | None, typer.Option("--name", help="A concept; once for each. Default: all.")] = None,
    model_row: Annotated[list[str] | None, typer.Option("--row", "-m", help=f"One more row. {MODELS_HELP}")] = None,
    rivals: Annotated[
        bool, typer.Option("--rivals/--no-rivals", help="Whether the tables' baselines are trained as well.")
    ] = True,
    yollava: Annotated[Path | None, typer.Option("--yollava", help="Folder of Yo'LLaVA, for Table 5.")] = None,
    mcllava: Annotated[Path | None, typer.Option("--mcllava", help="Folder of MC-LLaVA, for Table 5.")] = None,
    dreambench: Annotated[Path | None, typer.Option("--dreambench", help="Folder of DreamBench, for Table 5.")] = None,
    rewards: Annotated[
        str | None, typer.Option("--rewards", metavar="FILE.yaml", help="Reward models of the runs, as for train.")
    ] = None,
    scoring: Scoring = SCORING,
    preset: Annotated[
        Preset | None, typer.Option("--preset", help="Settings of the runs. Default: toy or paper.")
    ] = None,
    models: Models = MODELS,
    config: ConfigOption = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Runs trained at a time.")] = 1,
    rate: RateOption = None,
    machine: Machine = MACHINE,
) -> None:
    """Train what the paper's tables need, and fill them beside the paper's numbers.

    Ours, the ablations and the rivals (baselines) are trained where their models are on this machine; what cannot be is
    left out with the reason. Stop it and start it again: what is done is not done again.

    Settings of `train` (grpo.steps=20) go to the runs, those of `evaluate table` with `table.` before them
    (table.samples=2) to the tables, those of a rival with its name (yochameleon.steps=100) to it.

    Examples:

        pyunictokens evaluate paper --table 1 --toy

        pyunictokens evaluate paper mydata --plan --model show-o-512

        pyunictokens evaluate paper mydata --out paper --model show-o-512 --workers 8

        pyunictokens evaluate paper --table 5 --dreambench dreambooth --plan --model show-o-512

        pyunictokens evaluate paper toydata --table 1 --name bo grpo.steps=5 table.limit=2
    """
    from ..config.settings import load_yaml
    from ..evaluate.table_files import told as failures_told
    from ..models.bundle import Sources
    from ..runs import paper as work
    from ..runs.baselines import TableConfig
    from ..runs.bundle import PAPER_REWARDS
    from ..runs.paper_run import PaperRun, Told, draw_concepts, with_words
    from ..runs.rivals import PAPER, TOY
    from ..runs.run_dir import Run, RunConfig
    from ..utils.signals import Stopped, stop_on_signals
    from .sweep import _gpus

    if root is not None and "=" in str(root) and not root.exists():  # ROOT may be left out with --toy
        overrides, root = [str(root), *(overrides or [])], None
    others = {"yollava": yollava, "mcllava": mcllava, "dreambench": dreambench}
    wanted = _wanted(table, tables, any(others.values()))
    if toy and models != MODELS:
        raise UserError("--toy is the embedded toy: leave --model and its parts out")
    sources = Sources.choose(models.sources)
    told = Told.of(overrides or [], {rival.key for rival in (*TOY, *PAPER)}, quick)
    base = preset.value if preset else "toy" if sources.is_toy else "paper"
    settings = RunConfig.make(base, load_yaml(config) if config is not None else {}, str(config), told.runs)
    asked = with_words(TableConfig.of(Run(None), sources.is_toy), scoring.protocol, told.tables)
    if root is None and not toy and wanted:
        raise UserError("which data folder? Give ROOT, or --toy for concepts that are drawn")
    clip = scoring.clip_for(sources)
    work_here = PaperRun(
        root or (draw_concepts(out) if wanted else out),
        out,
        wanted,
        {name: folder for name, folder in others.items() if folder is not None},
        list(name or []),
        models.sources,
        settings,
        asked,
        told,
        lambda protocol: scoring.scorer(clip, out / "judge", machine, asked.judged_as, protocol),
        clip,
        scoring.judge_model,
        model_row or (),
        machine.device,
        machine.dtype,
        rivals,
        quick,
        planning=plan,
    )
    trains = any(work.VARIANTS[variant].grpo for variant in work_here.variants)
    rewards = PAPER_REWARDS if rewards is None and trains and not sources.is_toy else rewards
    todo = work_here.plan()
    todo.missing = _missing(sources, scoring.clip, rewards)
    _show_plan(todo, rate, machine)
    if plan:
        return
    options = {**models.given, "--rewards": rewards, "--preset": base, "--config": config and config.absolute()}
    arguments = as_words({**options, "--device": machine.device, "--dtype": machine.dtype})
    with Bars() as bars, stop_on_signals(bars.say) as stop:
        try:
            failed = work_here.train(arguments, workers, _gpus(machine.device), bars, stop, bars.say)
        except Stopped as stopped:
            raise UserError(f"{stopped}; the same command goes on") from None
        for each in work_here.suites:
            made = work_here.fill(each, bars)
            if made is None:
                continue
            say(f"{work.TABLES[each].title}: {out / each / 'table.md'}")
            show(made[0])
            for line in failures_told(made[0].failures, 5):
                say(f"not judged: {line}")
            say(f"beside the paper: {out / each / 'paper.html'}")
    if failed:
        raise UserError(
            f"{len(failed)} trainings are not done ({'; '.join(failed[:5])}): see {out}/runs/VARIANT/.jobs/NAME.log; "
            "the same command takes them up again"
        )


def _wanted(numbers: list[str] | None, names: str | None, others: bool) -> list[str]:
    """Names of the tables over the data folder. Raises UserError for a number that is none."""
    if numbers and names is not None:
        raise UserError("--table and --tables say the same: give one of the two")
    if names is not None or not numbers:
        names = "table1,table2,table3" if names is None else names
        return [table.strip() for table in names.split(",") if table.strip()]
    for number in numbers:
        if number not in BY_NUMBER:
            raise UserError(f"--table {number}: must be one of {', '.join(BY_NUMBER)}")
    if "5" in numbers and not others:
        raise UserError("--table 5: give the folders of its data sets: --yollava, --mcllava, --dreambench")
    return [table for number in dict.fromkeys(numbers) for table in BY_NUMBER[number]]


def _missing(sources: Sources, clip: str | None, rewards: str | None) -> list[str]:
    """Parts that are on no disk here yet: hub ids that were not downloaded, weights of reward models."""
    from ..models.checkpoint import resolve

    found = []
    named = {"model": sources.model, "vq": sources.vq, "tokenizer": sources.tokenizer, "vision": sources.vision}
    for part, where in {**named, "clip": None if clip and "=" in clip else clip}.items():
        if where is None or where == "toy":
            continue
        try:
            resolve(where, offline=True)
        except UserError:
            found.append(f"{part}: {where}")
    if rewards is not None and rewards.lower().endswith((".yaml", ".yml")):
        from ..rewards.load import RewardConfig
        from ..rewards.registry import weight_status
        from ..runs.bundle import read_rewards

        chosen = read_rewards(rewards)
        paths = RewardConfig.from_mapping(chosen).paths() if isinstance(chosen, Mapping) else {}
        found += [f"{each.name}: {each.get}" for each in weight_status(paths) if not each.ok]
    return found


def _show_plan(todo: Plan, rate: float | None, machine: Machine) -> None:
    from rich.table import Table as Grid

    grid = Grid(box=None, padding=(0, 2, 0, 0))
    for title in ("", "", "done", "wanted", "answers to ask", "images to draw", "calls of the judge"):
        grid.add_column(title, justify="left" if not title else "right", no_wrap=not title)
    for variant, (done, wanted) in todo.runs.items():
        grid.add_row("runs", variant, str(done), str(wanted), "", "", "")
    for cell in todo.cells:
        numbers = (cell.there, cell.records, cell.open_answers, cell.open_images, cell.judge_calls)
        grid.add_row(cell.table, cell.model, *map(str, numbers))
    console().print(grid)
    useful, where = useful_rate(rate, machine)
    stages, grpo, measuring, rivals = todo.hours(useful)
    calls = sum(cell.judge_calls for cell in todo.cells)
    say(
        f"about {stages:.3g} hours of stages, {grpo:.3g} of reinforcement and {measuring:.3g} of measuring, "
        f"{rivals:.3g} of rivals {where}, and {calls} calls of the judge; "
        "previews' scores and the judge's own time are not in the hours"
    )
    for line in todo.left_out:
        say(f"left out: {line}")
    for line in todo.missing:
        say(f"to fetch first: {line}")
