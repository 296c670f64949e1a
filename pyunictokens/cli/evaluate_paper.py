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
    console,
)
from .table_options import (
    JUDGE_KEY,
    MODELS_HELP,
    JudgeKeyOption,
    JudgeModelOption,
    JudgeUrlOption,
    ProtocolOption,
    TableClipOption,
    key_variable,
)
from .train import Preset

if TYPE_CHECKING:
    from ..models.bundle import Sources
    from ..runs.paper import Plan

RATE = 300.0


def paper(
    root: Annotated[Path, typer.Argument(help="The data folder, in the layout of UnifyBench++.")],
    overrides: OverridesArgument = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of all runs and tables.")] = Path("paper"),
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done and how long it takes; do nothing.")] = (
        False
    ),
    tables: Annotated[
        str, typer.Option("--tables", metavar="table1,…", help="Some of table1, table2, table3. Default: all.")
    ] = "table1,table2,table3",
    name: Annotated[list[str] | None, typer.Option("--name", help="A concept; once for each. Default: all.")] = None,
    model_row: Annotated[list[str] | None, typer.Option("--row", "-m", help=f"One more row. {MODELS_HELP}")] = None,
    yollava: Annotated[Path | None, typer.Option("--yollava", help="Folder of Yo'LLaVA, for Table 5.")] = None,
    mcllava: Annotated[Path | None, typer.Option("--mcllava", help="Folder of MC-LLaVA, for Table 5.")] = None,
    dreambench: Annotated[Path | None, typer.Option("--dreambench", help="Folder of DreamBench, for Table 5.")] = None,
    rewards: Annotated[
        str | None, typer.Option("--rewards", metavar="FILE.yaml", help="Reward models of the runs, as for train.")
    ] = None,
    clip: TableClipOption = None,
    protocol: ProtocolOption = None,
    judge_url: JudgeUrlOption = None,
    judge_model: JudgeModelOption = None,
    judge_key: JudgeKeyOption = JUDGE_KEY,
    preset: Annotated[
        Preset | None, typer.Option("--preset", help="Settings of the runs. Default: toy or paper.")
    ] = None,
    model: ModelOption = None,
    vq: VqOption = None,
    tokenizer: TokenizerOption = None,
    vision: VisionOption = None,
    config: ConfigOption = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Runs trained at a time.")] = 1,
    rate: Annotated[
        float, typer.Option("--rate", min=0.001, help="Useful TFLOP/s of one device, for the plan's hours.")
    ] = RATE,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Train what the paper's tables need, and fill them. Stop it and start it again: what is done is not done again.

    Settings of `train` (grpo.steps=20) go to the runs, those of `evaluate table` with `table.` before them
    (table.samples=2) to the tables.

    Examples:

        pyunictokens evaluate paper mydata --plan --model show-o-512

        pyunictokens evaluate paper mydata --out paper --model show-o-512 --workers 8

        pyunictokens evaluate paper toydata --tables table1 --name bo grpo.steps=5 table.limit=2
    """
    from dataclasses import replace

    from ..config.settings import load_yaml, to_mapping, with_overrides
    from ..data.folder import load_concept
    from ..evaluate.protocol import DEFAULT_SAMPLES, OURS, protocol_named
    from ..evaluate.runner import fill
    from ..evaluate.suites import open_suite
    from ..evaluate.table_files import Table, told
    from ..models.bundle import Sources
    from ..runs import paper as work
    from ..runs.baselines import TOY_CLIP, Place, TableConfig, make_scorer
    from ..runs.bundle import PAPER_REWARDS
    from ..runs.run_dir import Run, RunConfig
    from ..runs.sweep import run_local
    from ..train.costs import sizes_of
    from ..utils.signals import stop_on_signals
    from .sweep import _gpus

    wanted = [table.strip() for table in tables.split(",") if table.strip()]
    variants = work.wanted_variants(wanted)
    sources = Sources.choose(Sources(model, vq, tokenizer, vision))
    words = [word for word in overrides or [] if not word.startswith("table.")]
    values = load_yaml(config) if config is not None else {}
    base = preset.value if preset else "toy" if sources.is_toy else "paper"
    settings = RunConfig.make(base, values, str(config), words)
    asked = TableConfig.of(Run(None), sources.is_toy)
    asked = replace(asked, protocol=protocol, samples=0, seeds=()) if protocol is not None else asked
    asked = with_overrides(asked, [w.removeprefix("table.") for w in overrides or [] if w.startswith("table.")])
    reading = protocol_named(asked.protocol)
    folders = {"yollava": yollava, "mcllava": mcllava, "dreambench": dreambench}
    given = {table: (f"{root}", list(name or []), reading) for table in wanted}
    given |= {table: (f"{table}:{folder}", [], OURS) for table, folder in folders.items() if folder is not None}
    suites = {table: open_suite(*three) for table, three in given.items()}

    def ours(table: str) -> TableConfig:
        """The settings of a table; those of Table 5 have no other protocol."""
        own = suites[table].protocol
        return asked if own is reading else replace(asked, protocol=own.name, samples=asked.samples or DEFAULT_SAMPLES)

    names = list(suites[wanted[0]].names) if wanted else []
    place = Place(Run(None), sources, asked, device, dtype)
    rows = {table: work.titled(table, place.baselines(work.models_of(out, table, model_row or ()))) for table in suites}
    subjects = {table: [suite.subject(one) for one in suite.names] for table, suite in suites.items()}
    trains = any(work.VARIANTS[variant].grpo for variant in variants)
    rewards = PAPER_REWARDS if rewards is None and trains and not sources.is_toy else rewards
    todo = work.Plan(missing=_missing(sources, clip, rewards))
    todo.runs = {variant: (sum(work.is_done(out, variant, one) for one in names), len(names)) for variant in variants}
    for table in suites:
        todo.cells += work.cells_of(
            table, rows[table], subjects[table], out / table, ours(table), judged=judge_model is not None
        )
    costs = sizes_of(sources.model)
    for variant in variants:
        open_names = [one for one in names if not work.is_done(out, variant, one)]
        todo.add_runs(variant, costs, settings.stages, settings.grpo, [load_concept(root, one) for one in open_names])
    guided = asked.guidance_scale > 0
    todo.measure_flops = work.measuring_flops(costs, todo.cells, asked.timesteps, guided, asked.max_new_tokens)
    _show_plan(todo, rate)
    if plan:
        return
    options = {"--model": model, "--vq": vq, "--tokenizer": tokenizer, "--vision": vision}
    options |= {"--rewards": rewards, "--preset": base, "--config": str(config.absolute()) if config else None}
    options |= {"--device": device, "--dtype": dtype}
    arguments = [text for key, value in options.items() if value is not None for text in (key, str(value))]
    failed: list[str] = []
    with Bars() as bars, stop_on_signals(bars.say) as stop:
        for variant in variants:
            open_jobs = [
                job
                for job in work.jobs(out, root, names, variant, arguments, words)
                if not work.is_done(out, variant, job.name)
            ]
            for number, status in enumerate(run_local(open_jobs, workers, gpus=_gpus(device), stop=stop), start=1):
                bars(f"runs: {variant}", number, len(open_jobs), {"note": f"{status.name} {status.state}"})
                if status.state != "done":
                    failed.append(f"{variant}/{status.name}")
                    bars.say(f"{variant}/{status.name}: {status.state}: {status.message}")
            if stop():
                raise UserError("stopped; the same command goes on")
        if clip is None and sources.is_toy:
            clip = TOY_CLIP
        for table in suites:
            scorer = make_scorer(
                clip,
                judge_url,
                judge_model,
                key_variable(judge_key),
                out / "judge",
                device,
                judged_as=asked.judged_as,
                protocol=suites[table].protocol,
            )
            mine = ours(table)
            ready = work.titled(table, place.baselines(work.models_of(out, table, model_row or ())))
            filled = fill(ready, subjects[table], scorer, out / table, mine, bars)
            said = {**to_mapping(mine), "suite": str(root), "clip": clip, "judge": judge_model}
            made = Table(suites[table].layout, filled.records, filled.failures, filled.notes, said)
            if made.records:
                made.save(out / table)
                console().print(f"{work.TABLES[table].title}: {out / table / 'table.md'}", markup=False)
                show(made)
            for line in told(filled.failures, 5):
                console().print(f"not judged: {line}", markup=False)
    if failed:
        raise UserError(
            f"{len(failed)} runs are not done ({', '.join(failed[:5])}): see {out}/runs/VARIANT/.jobs/NAME.log; the "
            "same command takes them up again"
        )


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


def _show_plan(todo: Plan, rate: float) -> None:
    from rich.table import Table as Grid

    grid = Grid(box=None, padding=(0, 2, 0, 0))
    for title in ("", "", "done", "wanted", "answers to ask", "images to draw", "calls of the judge"):
        grid.add_column(title, justify="left" if not title else "right")
    for variant, (done, wanted) in todo.runs.items():
        grid.add_row("runs", variant, str(done), str(wanted), "", "", "")
    for cell in todo.cells:
        numbers = (cell.there, cell.records, cell.open_answers, cell.open_images, cell.judge_calls)
        grid.add_row(cell.table, cell.model, *map(str, numbers))
    console().print(grid)
    stages, grpo, measuring = todo.hours(rate * 1e12)
    calls = sum(cell.judge_calls for cell in todo.cells)
    console().print(
        f"about {stages:.3g} hours of stages, {grpo:.3g} of reinforcement and {measuring:.3g} of measuring on one "
        f"device at {rate:g} TFLOP/s, and {calls} calls of the judge; previews' scores and the judge's own time are "
        "not in the hours",
        markup=False,
    )
    for line in todo.missing:
        console().print(f"to fetch first: {line}", markup=False)
