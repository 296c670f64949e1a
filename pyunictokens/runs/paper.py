"""The paper's Tables 1, 2, 3 and 5 as one piece of work: which runs they need, what is asked of each, what is there.

    OUT/runs/VARIANT/NAME/     a run a concept for each variant below, as `train` leaves it
    OUT/rivals/KEY/NAME/       a baseline a concept for each rival of rivals.py, as `baseline train` leaves it
    OUT/TABLE/                 a table, as `evaluate table` leaves it: table1, table2, table3, yollava, mcllava, …;
                               paper.html, paper.md, paper.json: the same beside the paper's numbers
    OUT/LAYOUT/{data,runs,rivals}/   of a data set of Table 5: its concepts as concept folders, what is trained on them

Reinforcement begins with the tokens of the variant it continues, so the stages are learned once. Nothing that is done
is done again. How runs are trained is sweep.py's business, how tables are filled that of `evaluate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..config.settings import with_overrides
from ..config.stages import StageConfig
from ..config.training import GrpoConfig
from ..data.concept import Concept
from ..evaluate.core import Baseline
from ..evaluate.protocol import protocol_named
from ..evaluate.report.beside import Beside, beside
from ..evaluate.runner import TableSettings, first_of_each_group
from ..evaluate.sample_cache import SampleCache
from ..evaluate.scoring import judge_calls
from ..evaluate.table_files import Table
from ..evaluate.tasks import TASKS, Subject
from ..models.showo.costs import ShowoCosts
from ..train.costs import PROMPT, stages_flops, training_flops
from ..utils.errors import UserError
from .paper_numbers import NUMBERS, number
from .rivals import Entry, folder_of
from .run_dir import CONCEPT, FINAL
from .sweep import Job, plan


@dataclass(frozen=True)
class Variant:
    """One way to train, a row of a table."""

    title: str
    """What its row is called in the paper."""
    words: tuple[str, ...] = ()
    """Settings that make it what it is."""
    flags: tuple[str, ...] = ()
    begins: str = ""
    """The variant whose tokens it begins with; it has no stages of its own then."""
    grpo: bool = True


VARIANTS = {
    "unictokens": Variant("UniCTokens", flags=("--no-grpo",), grpo=False),
    "unictokens-r1": Variant("UniCTokens-R1", begins="unictokens"),
    "unictokens-r1-images": Variant("UniCTokens-R1", ("grpo.visual_ratio=1",), begins="unictokens"),
    "no-reasoning": Variant("w/o Und. Rea.", ("grpo.reasoning=false",), begins="unictokens"),
    "no-visual": Variant("w/o VIA", ("grpo.visual_ratio=0",), begins="unictokens"),
    "no-text-only": Variant("w/o TIA", ("grpo.visual_ratio=1",), begins="unictokens"),
    "no-dsog": Variant("w/o DSOG", ("grpo.dsog.enabled=false",), begins="unictokens"),
    "joint": Variant("joint", flags=("--stages", "joint", "--no-grpo"), grpo=False),
    "joint-grpo": Variant("joint + UniCTask-GRPO", begins="joint"),
}
"""Every run that the tables need. A variant stands behind the one it begins with."""


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper."""

    title: str
    variants: tuple[str, ...]
    models: tuple[str, ...] = ()
    """Rows beside ours, as `evaluate table` names them."""
    layout: str = "unify"


_WITHOUT_FACTS = ("unictokens", "unictokens-r1-images")
TABLES = {
    "table1": PaperTable("Table 1", ("unictokens", "unictokens-r1"), ("showo-tp", "showo-ip", "real")),
    "table2": PaperTable("Table 2", ("no-reasoning", "no-visual", "no-text-only", "no-dsog", "unictokens-r1")),
    "table3": PaperTable("Table 3", ("joint", "joint-grpo", "unictokens", "unictokens-r1")),
    "yollava": PaperTable("Table 5, Yo'LLaVA", _WITHOUT_FACTS, ("showo-tp", "real"), "yollava"),
    "mcllava": PaperTable("Table 5, MC-LLaVA", _WITHOUT_FACTS, ("showo-tp",), "mcllava"),
    "dreambench": PaperTable("Table 5, DreamBench", _WITHOUT_FACTS, ("showo-tp", "real"), "dreambench"),
}
"""Tables by the name of their folder; those of Table 5 by their layout."""


def wanted_variants(tables: Iterable[str]) -> list[str]:
    """The variants of these tables with those they begin with, in an order in which they can be trained."""
    needed: set[str] = set()
    for table in tables:
        if table not in TABLES:
            raise UserError(f"table {table!r}: must be one of {', '.join(TABLES)}")
        needed |= set(TABLES[table].variants)
    needed |= {VARIANTS[name].begins for name in needed if VARIANTS[name].begins}
    return [name for name in VARIANTS if name in needed]


def run_of(out: Path, variant: str, name: str = "{name}") -> Path:
    """The folder of a variant's run on a concept."""
    return out / "runs" / variant / name


def is_done(out: Path, variant: str, name: str) -> bool:
    """Whether that run holds what it ends with."""
    end = f"{FINAL}/policy.json" if VARIANTS[variant].grpo else f"{CONCEPT}/concept.json"
    return (run_of(out, variant, name) / end).is_file()


def jobs(
    out: Path, root: Path, names: Sequence[str], variant: str, arguments: Sequence[str], words: Sequence[str]
) -> list[Job]:
    """A job a concept for one variant; `arguments` are options of `train`, `words` settings."""
    about = VARIANTS[variant]
    flags = list(about.flags)
    if about.begins:
        flags += ["--stages", "none", "--start-from", str(run_of(out, about.begins))]
    told = [str(root.absolute()), "{name}", *words, *about.words, *arguments, "--no-evaluate", *flags]
    return plan(out / "runs" / variant, names, told, grpo=about.grpo, evaluate=False, retries=1)


PRINTED = {"showo-tp": "Show-o+TP", "real": "Real Images"}
"""The paper's rows of models that tables name by a word."""


@dataclass(frozen=True)
class TableRow:
    """A row of a table of the paper."""

    words: str
    """The model as `evaluate table` names it."""
    title: str = ""
    """What the row is called; "" leaves it to the model."""
    printed: str = ""
    """The paper's row that it stands beside."""
    trained: bool = False


def rows_of(out: Path, table: str, entries: Sequence[Entry] = (), more: Sequence[str] = ()) -> list[TableRow]:
    """The rows of a table: rivals, models that are told, ours, and `more` models of the user."""
    about, found = TABLES[table], []
    for entry in entries:
        where = f"{entry.rival.method}:{folder_of(out, entry.rival)}"
        found.append(TableRow(where, entry.title, entry.rival.paper, trained=entry.method.trains))
    found += [TableRow(words, printed=PRINTED.get(words, "")) for words in about.models]
    for name in about.variants:
        title = VARIANTS[name].title
        found.append(TableRow(f"ours:{run_of(out, name)}", title, title, trained=True))
    return [*found, *(TableRow(words) for words in more)]


def titled(rows: Sequence[TableRow], baselines: Sequence[Baseline]) -> list[Baseline]:
    """The models of `rows`, called as the rows are."""
    return [replace(each, name=row.title or each.name) for row, each in zip(rows, baselines, strict=True)]


def beside_paper(
    name: str, table: Table, rows: Sequence[TableRow], baselines: Sequence[Baseline], left_out: list[str], toy: bool
) -> Beside:
    """A table that was filled, beside the paper's."""
    layout = table.layout if table.layout != "unify" else name
    printed = {each.name: row.printed for row, each in zip(rows, baselines, strict=True)}
    trained = {each.name: row.trained for row, each in zip(rows, baselines, strict=True)}
    notes = ([TOY_NOTE] if toy else []) + ([] if table.layout == "unify" else [FACTS_NOTE])
    return beside(
        table,
        TABLES[name].title,
        printed,
        trained,
        NUMBERS[layout],
        lambda row, key: number(layout, row, key),
        left_out,
        notes,
    )


TOY_NOTE = (
    "The toy is another world: drawn subjects, a model of a few million weights, encoders of its own. "
    "Its values cannot be compared with the paper's one by one; the order of the rows can."
)


FACTS_NOTE = (
    "The data set has no facts and no questions to learn from: rows that are trained here learned from its photos and "
    "the plain questions of `data new`, and UniCTokens-R1 was reinforced with questions about images alone "
    "(grpo.visual_ratio=1)."
)


# --- the plan ------------------------------------------------------------------------------------------------------


@dataclass
class Cell:
    """What one model is asked in one table."""

    table: str
    model: str
    answers: int = 0
    images: int = 0
    there: int = 0
    """Records of these that are there already."""
    records: int = 0
    open_images: int = 0
    """Images of records that are not there."""
    open_answers: int = 0
    judge_calls: int = 0
    """Questions to the judge for records that have no score of one; 0 where there is no judge."""


@dataclass
class Plan:
    """All that is to be done, and about how long it takes."""

    runs: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(done, wanted) by variant."""
    cells: list[Cell] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Files that have to be fetched first, each with what it is for."""
    left_out: list[str] = field(default_factory=list)
    """Rivals that cannot be trained here, each with the reason."""
    rival_flops: float = 0.0
    stage_flops: float = 0.0
    grpo_flops: float = 0.0
    measure_flops: float = 0.0
    """Operations of what is not done yet."""

    def hours(self, rate: float) -> tuple[float, float, float, float]:
        """(stages, reinforcement, measuring, rivals) in hours on one device that does `rate` operations a second of
        useful work."""
        all_of_it = (self.stage_flops, self.grpo_flops, self.measure_flops, self.rival_flops)
        stages, grpo, measuring, rivals = (each / rate / 3600 for each in all_of_it)
        return stages, grpo, measuring, rivals

    def add_rivals(self, entries: Iterable[Entry], part: str = "") -> None:
        """What the rivals still cost, and which of them cannot be trained here; `part` stands before their names."""
        for entry in entries:
            self.runs[f"{part}rival {entry.rival.key}"] = (len(entry.done), len(entry.jobs))
            self.rival_flops += 0.0 if entry.refused else entry.flops
            if entry.refused:
                self.left_out.append(f"{part}{entry.title} ({entry.rival.method}): {entry.refused}")

    def add_runs(
        self, variant: str, costs: ShowoCosts, stages: StageConfig, grpo: GrpoConfig, concepts: Iterable[Concept]
    ) -> None:
        """What a variant's runs on `concepts`, which are not done, still cost."""
        about = VARIANTS[variant]
        told = with_overrides(grpo, [word.removeprefix("grpo.") for word in about.words])
        stages = replace(stages, stages=("joint",)) if "joint" in about.flags else stages
        for concept in concepts:
            self.stage_flops += 0.0 if about.begins else stages_flops(costs, stages, concept)
            self.grpo_flops += training_flops(costs, told) if about.grpo else 0.0


def cells_of(
    table: str,
    baselines: Sequence[Baseline],
    subjects: Sequence[Subject],
    folder: Path,
    settings: TableSettings,
    judged: bool = False,
) -> list[Cell]:
    """What a table asks of each model and, where it is `judged`, of the judge; and what of it is in `folder`."""
    cache, found, protocol = SampleCache(folder), [], protocol_named(settings.protocol)
    for model in baselines:
        cell = Cell(table, model.name)
        for subject in subjects:
            for task in settings.tasks or TASKS:
                samples = settings.images(task)
                if not (model.generates if samples else model.answers):
                    continue
                items = list({item.digest: item for item in subject.of(task)}.values())
                for seed in settings.seeds if samples else (0,):
                    for item in first_of_each_group(items, settings.limit):
                        place = cache.place(model.name, model.identity, subject, item, seed, samples)
                        there = place.is_file()
                        cell.records, cell.there = cell.records + 1, cell.there + there
                        cell.images += samples
                        cell.answers += not samples
                        cell.open_images += 0 if there else samples
                        cell.open_answers += 0 if there or samples else 1
                        calls = judge_calls(item, protocol, samples) if judged else 0
                        if calls and there:
                            record = SampleCache.read(place)
                            calls = 0 if record is not None and "judge" in record.scores else calls
                        cell.judge_calls += calls
        found.append(cell)
    return found


def measuring_flops(costs: ShowoCosts, cells: Iterable[Cell], timesteps: int, guided: bool, tokens: int) -> float:
    """Operations of the records that are not there; models of others are counted as ours."""
    count, prompt = costs.count, PROMPT
    image = costs.image_step(1, prompt, count, guided).flops * timesteps
    answer = costs.answers(count + 40, [tokens]).flops
    return sum(cell.open_images * image + cell.open_answers * answer for cell in cells)
