"""One call of `evaluate paper`: what it was asked for, its plan, the training, and the tables beside the paper's.

The command line makes a :class:`PaperRun` from its options; which runs, rivals and rows a table has stands in paper.py
and rivals.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from ..config.settings import to_mapping, with_overrides
from ..data.concept import Concept
from ..data.folder import load_concept
from ..evaluate.core import Baseline
from ..evaluate.protocol import DEFAULT_SAMPLES, OURS, BenchProtocol, protocol_named
from ..evaluate.report import beside
from ..evaluate.runner import fill
from ..evaluate.scoring import Scorer
from ..evaluate.suites import Suite, open_suite
from ..evaluate.suites.importing import import_suite
from ..evaluate.table_files import Table
from ..evaluate.tables import TABLES
from ..evaluate.tasks import TASKS
from ..models.bundle import Sources
from ..toy.concept import write_toy_concept
from ..toy.model import toy_folder
from ..train.costs import sizes_of
from ..utils.errors import UserError
from ..utils.progress import Progress
from ..utils.signals import Stop, Stopped
from . import paper, sweep
from .baselines import Place, TableConfig
from .paper import Plan, TableRow
from .rivals import Entry, enter, rivals_of, train_all
from .run_dir import Run, RunConfig

TOY_CONCEPTS = {"bo": ("animal", 1), "cup": ("object", 2)}
"""What `--toy` draws: (kind, seed) by name."""

QUICK = (
    *("stages.max_steps=2", "grpo.steps=1", "grpo.groups=1", "grpo.group_size=2", "grpo.timesteps=2"),
    *("grpo.max_new_tokens=4", "table.samples=1", "table.limit=1", "table.timesteps=2", "table.max_new_tokens=4"),
)
"""Settings of a trial that shows that everything works, and nothing else."""


def draw_concepts(out: Path) -> Path:
    """The data folder of `--toy`, drawn once."""
    root = out / "data"
    for name, (kind, seed) in TOY_CONCEPTS.items():
        if not (root / "concept" / "test" / name / "truth.json").is_file():
            write_toy_concept(root, seed=seed, kind=kind, name=name, force=True)
    return root


@dataclass(frozen=True)
class Told:
    """KEY=VALUE words, by whom they are for."""

    runs: tuple[str, ...] = ()
    """Settings of `train`."""
    tables: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()
    """KEY.SETTING=VALUE of a rival."""

    @classmethod
    def of(cls, words: Sequence[str], keys: set[str], quick: bool = False) -> Told:
        """`words` dealt out; those of rivals begin with one of `keys`."""
        all_of_it = [*(QUICK if quick else ()), *words]
        tables = tuple(word.removeprefix("table.") for word in all_of_it if word.startswith("table."))
        rivals = tuple(word for word in all_of_it if word.partition(".")[0] in keys and "." in word.partition("=")[0])
        runs = tuple(word for word in all_of_it if not word.startswith("table.") and word not in rivals)
        return cls(runs, tables, rivals)


@dataclass
class Part:
    """The tables over one folder of concepts, and what is trained for them."""

    home: Path
    """Holds its runs and rivals."""
    root: Path
    """The concept folders."""
    concepts: list[Concept]
    variants: list[str]
    entries: dict[str, list[Entry]]
    """Rivals by table."""
    label: str = ""
    """Stands before its lines of a plan."""

    def open(self, variant: str) -> list[str]:
        """Concepts that a variant has not learned yet."""
        return [each.name for each in self.concepts if not paper.is_done(self.home, variant, each.name)]


@dataclass
class PaperRun:
    """Everything that one call works with."""

    root: Path
    out: Path
    tables: Sequence[str]
    """Tables over `root`."""
    others: dict[str, Path]
    """Folders of Table 5 by table."""
    names: Sequence[str]
    """Concepts; none named means all."""
    named: Sources
    """The models as they were given."""
    settings: RunConfig
    asked: TableConfig
    told: Told
    scorer_of: Callable[[BenchProtocol], Scorer]
    clip: str | None = None
    judge: str | None = None
    """The judge's name, where there is one."""
    more: Sequence[str] = ()
    """Further rows, as `evaluate table` names them."""
    device: str = "auto"
    dtype: str = "auto"
    with_rivals: bool = True
    quick: bool = False
    planning: bool = False
    """Only a plan is wanted: nothing is written into `out`."""
    suites: dict[str, Suite] = field(init=False)
    parts: dict[str, Part] = field(init=False)
    """By table; those over `root` share one."""

    def __post_init__(self) -> None:
        paper.wanted_variants(self.tables)  # that there are such tables
        self.sources = Sources.choose(self.named)
        reading = protocol_named(self.asked.protocol)
        self.suites = {table: open_suite(f"{self.root}", list(self.names), reading) for table in self.tables}
        self.suites |= {table: open_suite(f"{table}:{folder}", [], OURS) for table, folder in self.others.items()}
        self.parts = {}
        if self.tables:
            concepts = [load_concept(self.root, name) for name in self.suites[self.tables[0]].names]
            part = self._part(self.out, self.root, concepts, self.tables)
            self.parts = dict.fromkeys(self.tables, part)
        for table in self.others:
            home = self.out / table
            with TemporaryDirectory() as aside:
                concepts = self._imported(table, home / "data", Path(aside))
                self.parts[table] = self._part(home, home / "data", concepts, [table], f"{table} ")
        known = {entry.rival.key for part in self._parts() for entries in part.entries.values() for entry in entries}
        for word in self.told.rivals:
            if word.partition(".")[0] not in known:
                there = ", ".join(sorted(known)) or "there is none"
                raise UserError(f"{word!r}: names no rival of these tables: {there}")

    def _part(self, home: Path, root: Path, concepts: list[Concept], tables: Sequence[str], label: str = "") -> Part:
        entries = {}
        for table in tables:
            entries[table] = enter(
                rivals_of(table, self.sources.is_toy) if self.with_rivals else [],
                home,
                concepts,
                self.named,
                self.told.rivals,
                draws_only=all(TASKS[column.task].images for column in TABLES[self.suites[table].layout]),
                quick=self.quick,
                device=self.device,
                dtype=self.dtype,
                clip=self.clip,
            )
        return Part(home, root, concepts, paper.wanted_variants(tables), entries, label)

    def _imported(self, table: str, root: Path, aside: Path) -> list[Concept]:
        """The concepts of a data set of Table 5 as concept folders: in `root`, written where they are not there; of a
        mere plan in `aside`."""
        suite = self.suites[table]
        lacking = tuple(name for name in suite.names if not (root / "concept" / "train" / name).is_dir())
        if lacking and self.planning:
            return [made.concept for made in import_suite(suite, aside)]
        if lacking:
            import_suite(replace(suite, names=lacking), root)
        return [load_concept(root, name) for name in suite.names]

    def _parts(self) -> list[Part]:
        """Every part once."""
        return list({id(part): part for part in self.parts.values()}.values())

    @property
    def variants(self) -> list[str]:
        """All variants that are trained."""
        return list(dict.fromkeys(variant for part in self._parts() for variant in part.variants))

    def asked_of(self, table: str) -> TableConfig:
        """The settings of a table; those of Table 5 have no other protocol."""
        own = self.suites[table].protocol
        if own is protocol_named(self.asked.protocol):
            return self.asked
        return replace(self.asked, protocol=own.name, samples=self.asked.samples or DEFAULT_SAMPLES)

    def rows(self, table: str) -> tuple[list[TableRow], list[Baseline]]:
        """The rows of a table and the models that fill them. A rival that cannot be trained here has no row."""
        part = self.parts[table]
        ready = [entry for entry in part.entries[table] if not entry.refused]
        rows = paper.rows_of(part.home, table, ready, self.more)
        place = Place(Run(None), self.sources, self.asked, self.device, self.dtype)
        return rows, paper.titled(rows, place.baselines([row.words for row in rows]))

    def plan(self) -> Plan:
        """What is there, what is wanted, and what it takes."""
        todo = Plan()
        for part in self._parts():
            wanted = len(part.concepts)
            for variant in part.variants:
                todo.runs[f"{part.label}{variant}"] = (wanted - len(part.open(variant)), wanted)
            for entries in part.entries.values():
                todo.add_rivals(entries, part.label)
        for table, suite in self.suites.items():
            subjects, baselines = [suite.subject(name) for name in suite.names], self.rows(table)[1]
            folder, judged = self.out / table, self.judge is not None
            todo.cells += paper.cells_of(table, baselines, subjects, folder, self.asked_of(table), judged=judged)
        costs = sizes_of(str(toy_folder() / "showo") if self.sources.is_toy else self.sources.model)
        for part in self._parts():
            for variant in part.variants:
                left = [concept for concept in part.concepts if concept.name in part.open(variant)]
                todo.add_runs(variant, costs, self.settings.stages, self.settings.grpo, left)
        asked = self.asked
        guided = asked.guidance_scale > 0
        todo.measure_flops = paper.measuring_flops(costs, todo.cells, asked.timesteps, guided, asked.max_new_tokens)
        return todo

    def train(
        self,
        arguments: Sequence[str],
        workers: int,
        gpus: int,
        progress: Progress,
        stop: Stop,
        say: Callable[[str], None],
    ) -> list[str]:
        """Train rivals and runs that are not done; `arguments` are options of `train`. Returns what could not be, each
        with the reason. Raises Stopped where `stop` says so."""
        failed = []
        for part in self._parts():
            for entries in part.entries.values():
                failed += train_all(entries, progress, stop)
            names = [concept.name for concept in part.concepts]
            for variant in part.variants:
                all_jobs = paper.jobs(part.home, part.root, names, variant, arguments, self.told.runs)
                jobs = [job for job in all_jobs if job.name in part.open(variant)]
                for number, status in enumerate(sweep.run_local(jobs, workers, gpus=gpus, stop=stop), start=1):
                    note = f"{status.name} {status.state}"
                    progress(f"runs: {part.label}{variant}", number, len(jobs), {"note": note})
                    if status.state != "done":
                        failed.append(f"{part.label}{variant}/{status.name}: {status.state}: {status.message}")
                        say(failed[-1])
                if stop():
                    raise Stopped(f"stopped after the runs of {part.label}{variant}")
        return failed

    def fill(self, table: str, progress: Progress) -> tuple[Table, beside.Beside] | None:
        """Fill a table and leave it in its folder, also beside the paper's; None where nothing could be asked."""
        suite, asked = self.suites[table], self.asked_of(table)
        rows, baselines = self.rows(table)
        subjects = [suite.subject(name) for name in suite.names]
        filled = fill(baselines, subjects, self.scorer_of(suite.protocol), self.out / table, asked, progress)
        said = {**to_mapping(asked), "suite": str(suite.root), "clip": self.clip, "judge": self.judge}
        made = Table(suite.layout, filled.records, filled.failures, filled.notes, said)
        if not made.records:
            return None
        made.save(self.out / table)
        refused = [f"{entry.title}: {entry.refused}" for entry in self.parts[table].entries[table] if entry.refused]
        found = paper.beside_paper(table, made, rows, baselines, refused, self.sources.is_toy)
        beside.save(found, self.out / table)
        return made, found


def with_words(asked: TableConfig, protocol: str | None, words: Sequence[str]) -> TableConfig:
    """The settings of tables under a protocol, and words over them."""
    if protocol is not None:
        asked = replace(asked, protocol=protocol, samples=0, seeds=())
    return with_overrides(asked, words)
