"""`pyunictokens evaluate table` and `evaluate compare`: the paper's tables for any models, and two tables side by side.

What is asked, scored and kept is the business of `evaluate`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..utils.errors import UserError
from .generate import ConceptOption
from .groups import MACHINE, SCORING, Machine, Scoring, spread
from .shell import (
    Bars,
    ConfigOption,
    OverridesArgument,
    TokenizerOption,
    VisionOption,
    VqOption,
    console,
    plain_table,
    say,
)
from .table_options import MODELS_HELP

if TYPE_CHECKING:
    from ..evaluate.result import Metric
    from ..evaluate.table_files import Table


@spread
def table(
    suite: Annotated[
        str,
        typer.Argument(
            metavar="SUITE",
            help="A run of `train` (its concept), a data folder, or LAYOUT:FOLDER with the layout unify, yollava, "
            "mcllava or dreambench.",
        ),
    ],
    overrides: OverridesArgument = None,
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help=MODELS_HELP)] = None,
    name: Annotated[
        list[str] | None, typer.Option("--name", help="A concept of SUITE; give it once a concept. Default: all.")
    ] = None,
    scoring: Scoring = SCORING,
    concept: ConceptOption = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the table; what is there already is not done again.")
    ] = Path("table"),
    showo: Annotated[
        str | None, typer.Option("--showo", help="Show-o folder or hub id. Default: the embedded toy, or the run's.")
    ] = None,
    vq: VqOption = None,
    tokenizer: TokenizerOption = None,
    vision: VisionOption = None,
    pages: Annotated[
        bool, typer.Option("--pages/--no-pages", help="Write a page a prompt, models side by side.")
    ] = True,
    config: ConfigOption = None,
    machine: Machine = MACHINE,
) -> None:
    """Fill the paper's table: every column, any models, with intervals, as JSON, CSV, Markdown, LaTeX and pages.

    Settings: protocol, samples, seeds, tasks, limit, timesteps, guidance_scale, max_new_tokens, question_form,
    judged_as (what the judge reads for the concept's token: class or info; by default as in the run).

    Examples:

        pyunictokens evaluate table runs/bo --model ours --model showo-tp --model real --out tables/bo

        pyunictokens evaluate table toydata --name bo -m ours:runs/{name} --judge-model gpt-4o "seeds=[0, 1]"

        pyunictokens evaluate table dreambench:dreambooth -m diffusers:sd,lora=bo_lora --clip local_clip samples=4

        pyunictokens evaluate table unictokens_data --name bo -m ours:published/bo --protocol sync-r1 --showo show-o-512
    """
    from dataclasses import replace

    from ..config.settings import from_mapping, load_yaml, to_mapping, with_overrides
    from ..evaluate.protocol import protocol_named
    from ..evaluate.report.gallery import write_gallery
    from ..evaluate.runner import fill
    from ..evaluate.suites import open_suite
    from ..evaluate.table_files import RESULTS, Table, told
    from ..models.bundle import Sources
    from ..runs.baselines import Place, TableConfig
    from ..runs.run_dir import CONFIG, Run
    from ..utils.files import refuse_unwritable

    run = Run.find(suite) if (Path(suite) / CONFIG).is_file() else Run(None)
    names = list(name or [])
    if run.path is not None:
        root, of_run = run.concept_folder(concept)
        suite, names = str(root), names or [of_run]
    elif concept is not None:
        raise UserError(f"--concept says where the concept of a run is, and {suite} is no run: leave one of the two")
    sources = run.sources(Sources(showo, vq, tokenizer, vision))
    settings = TableConfig.of(run, sources.is_toy)
    if config is not None:
        settings = from_mapping(TableConfig, load_yaml(config), base=settings, origin=str(config))
    if scoring.protocol is not None:
        settings = replace(settings, protocol=scoring.protocol, samples=0, seeds=())
    settings = with_overrides(settings, overrides or [])
    reading = protocol_named(settings.protocol)
    opened = open_suite(suite, names, reading)
    models = list(model or []) or (["ours", "real"] if run.path is not None else [])
    if not models:
        raise UserError("which models? Give --model, once for each row of the table")
    refuse_unwritable(out / RESULTS)
    place = Place(run, sources, settings, machine.device, machine.dtype)
    clip = scoring.clip_for(sources)
    scorer = scoring.scorer(clip, out / "judge", machine, settings.judged_as, reading)
    subjects = [opened.subject(one) for one in opened.names]
    with Bars() as bars:
        filled = fill(place.baselines(models), subjects, scorer, out, settings, bars)
    words = {**to_mapping(settings), "suite": suite, "models": models, "clip": clip, "judge": scoring.judge_model}
    made = Table(opened.layout, filled.records, filled.failures, filled.notes, words)
    if not made.records:
        reasons = "; ".join(told(filled.failures, 3)) or "nothing was asked"
        raise UserError(f"the table is empty: {reasons}")
    made.save(out)
    index = write_gallery(made, out / "pages", {subject.name: subject for subject in subjects}) if pages else None
    show(made)
    say(f"protocol {reading.name}: {reading.about}")
    for line in told(made.failures):
        say(f"not judged: {line}")
    for note in dict.fromkeys(made.notes):
        say(f"note: {note}")
    where = f"{out / 'table.md'}" + (f", {index}" if index else "")
    say(f"{filled.made} of {len(made.records)} records were new; {where}")


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A run, a JSON of evaluate, or a table's folder.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another; of a table also the same with other models.")],
    model_a: Annotated[str | None, typer.Option("--model-a", help="Which row of A. Default: its first.")] = None,
    model_b: Annotated[
        str | None, typer.Option("--model-b", help="Which row of B. Default: the row of A's name.")
    ] = None,
) -> None:
    """Compare two runs, two results or two tables: differences on the items both have, with 95 % intervals.

    Of a run its last evaluation is taken (after.json). Of a table two rows may be compared as well.

    Examples:

        pyunictokens compare runs/bo/base.json runs/bo/after.json

        pyunictokens compare runs/bo runs/again

        pyunictokens compare tables/before tables/after

        pyunictokens compare tables/bo tables/bo --model-a "Show-o + TP" --model-b ours
    """
    from ..evaluate import tables
    from ..evaluate.result import EvalResult
    from ..evaluate.table_files import Table
    from ..utils.files import read_json

    first, second = _measured(first), _measured(second)
    content = read_json(first) if first.is_file() else None
    if isinstance(content, dict) and "records" in content:
        before, after = EvalResult.load(first), EvalResult.load(second)
        changes = before.compare(after)
        if not changes:
            raise UserError(f"{first} and {second} share no measured item")
        _differences(
            changes, {k: m.mean for k, m in before.metrics.items()}, {k: m.mean for k, m in after.metrics.items()}
        )
        return
    a, b = Table.load(first), Table.load(second)
    one = model_a or a.models[0]
    other = model_b or (one if one in b.models else b.models[0])
    records_a, records_b = a.of(one), b.of(other)
    changes = tables.compare(records_a, records_b)
    say(f"{one} → {other}, on the items both have")
    means = [
        {key: metric.mean for key in changes if (metric := tables.metric_of(records, key)) is not None}
        for records in (records_a, records_b)
    ]
    _differences(changes, *means)


def _measured(place: Path) -> Path:
    """The last evaluation of a run's folder; anything else as it is. Raises UserError for a run without one."""
    from ..runs.run_dir import CONFIG

    if not place.exists():
        raise UserError(f"{place}: no such file or folder")
    last = place / "after.json"
    if (place / CONFIG).is_file() and not last.is_file():
        raise UserError(f"{place}: holds no after.json: measure it (pyunictokens evaluate {place}) and name the JSON")
    return last if last.is_file() else place


def show(table: Table) -> None:
    """The paper's columns as rows, one column a model: a terminal is higher than wide."""
    from rich.markup import escape

    from ..evaluate.tables import metric_of

    models = [escape(model) for model in table.models]
    grid = plain_table("", *models, right=models)
    for column in table.columns:
        metrics = [metric_of(table.of(model), column.key) for model in table.models]
        shown = ["–" if metric is None else f"{metric.mean:.3f}" for metric in metrics]
        grid.add_row(f"{column.heading} {column.label}", *shown)
    console().print(grid)


def _differences(changes: dict[str, Metric], first: dict[str, float], second: dict[str, float]) -> None:
    titles = ("A", "B", "B − A [95 %]", "items")
    grid = plain_table("", *titles, right=titles)
    for key, change in changes.items():
        span = f"{change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
        grid.add_row(key, f"{first[key]:.3f}", f"{second[key]:.3f}", span, str(change.n))
    console().print(grid)
