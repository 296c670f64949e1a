"""One call of `evaluate paper`: what it was asked for, its plan, the training, and the tables beside the paper's.

The command line makes a :class:`PaperRun` from its options; which runs, rivals and rows a table has stands in paper.py
and rivals.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..config.settings import to_mapping, with_overrides
from ..data.concept import Concept
from ..data.folder import load_concept
from ..evaluate.core import Baseline
from ..evaluate.protocol import DEFAULT_SAMPLES, OURS, BenchProtocol, protocol_named
from ..evaluate.report import beside
from ..evaluate.runner import fill
from ..evaluate.scoring import Scorer
from ..evaluate.suites import Suite, open_suite
from ..evaluate.table_files import Table
from ..models.bundle import Sources
from ..toy.concept import write_toy_concept
from ..toy.model import toy_folder
from ..train.costs import sizes_of
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
    suites: dict[str, Suite] = field(init=False)
    concepts: list[Concept] = field(init=False)
    variants: list[str] = field(init=False)
    entries: dict[str, list[Entry]] = field(init=False)

    def __post_init__(self) -> None:
        self.variants = paper.wanted_variants(self.tables)
        reading = protocol_named(self.asked.protocol)
        self.suites = {table: open_suite(f"{self.root}", list(self.names), reading) for table in self.tables}
        self.suites |= {table: open_suite(f"{table}:{folder}", [], OURS) for table, folder in self.others.items()}
        self.names = list(self.suites[self.tables[0]].names) if self.tables else []
        self.concepts = [load_concept(self.root, name) for name in self.names]
        self.sources = Sources.choose(self.named)
        self.entries = {}
        for table in self.tables:
            self.entries[table] = enter(
                rivals_of(table, self.sources.is_toy) if self.with_rivals else [],
                self.out,
                self.concepts,
                self.named,
                self.told.rivals,
                quick=self.quick,
                device=self.device,
                dtype=self.dtype,
                clip=self.clip,
            )

    def asked_of(self, table: str) -> TableConfig:
        """The settings of a table; those of Table 5 have no other protocol."""
        own = self.suites[table].protocol
        if own is protocol_named(self.asked.protocol):
            return self.asked
        return replace(self.asked, protocol=own.name, samples=self.asked.samples or DEFAULT_SAMPLES)

    def rows(self, table: str) -> tuple[list[TableRow], list[Baseline]]:
        """The rows of a table and the models that fill them. A rival that cannot be trained here has no row."""
        ready = [entry for entry in self.entries.get(table, []) if not entry.refused]
        rows = paper.rows_of(self.out, table, ready, self.more)
        place = Place(Run(None), self.sources, self.asked, self.device, self.dtype)
        return rows, paper.titled(rows, place.baselines([row.words for row in rows]))

    def plan(self) -> Plan:
        """What is there, what is wanted, and what it takes."""
        todo = Plan()
        for variant in self.variants:
            todo.runs[variant] = (len(self.names) - len(self._open(variant)), len(self.names))
        for entries in self.entries.values():
            todo.add_rivals(entries)
        for table, suite in self.suites.items():
            subjects, baselines = [suite.subject(name) for name in suite.names], self.rows(table)[1]
            folder, judged = self.out / table, self.judge is not None
            todo.cells += paper.cells_of(table, baselines, subjects, folder, self.asked_of(table), judged=judged)
        costs = sizes_of(str(toy_folder() / "showo") if self.sources.is_toy else self.sources.model)
        for variant in self.variants:
            left = [concept for concept in self.concepts if concept.name in self._open(variant)]
            todo.add_runs(variant, costs, self.settings.stages, self.settings.grpo, left)
        asked = self.asked
        guided = asked.guidance_scale > 0
        todo.measure_flops = paper.measuring_flops(costs, todo.cells, asked.timesteps, guided, asked.max_new_tokens)
        return todo

    def _open(self, variant: str) -> list[str]:
        """Concepts that a variant has not learned yet."""
        return [name for name in self.names if not paper.is_done(self.out, variant, name)]

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
        for entries in self.entries.values():
            failed += train_all(entries, progress, stop)
        for variant in self.variants:
            all_jobs = paper.jobs(self.out, self.root, self.names, variant, arguments, self.told.runs)
            jobs = [job for job in all_jobs if job.name in self._open(variant)]
            for number, status in enumerate(sweep.run_local(jobs, workers, gpus=gpus, stop=stop), start=1):
                progress(f"runs: {variant}", number, len(jobs), {"note": f"{status.name} {status.state}"})
                if status.state != "done":
                    failed.append(f"{variant}/{status.name}: {status.state}: {status.message}")
                    say(failed[-1])
            if stop():
                raise Stopped(f"stopped after the runs of {variant}")
        return failed

    def fill(self, table: str, progress: Progress) -> tuple[Table, beside.Beside] | None:
        """Fill a table and leave it in its folder, also beside the paper's; None where nothing could be asked."""
        suite, asked = self.suites[table], self.asked_of(table)
        rows, baselines = self.rows(table)
        subjects = [suite.subject(name) for name in suite.names]
        filled = fill(baselines, subjects, self.scorer_of(suite.protocol), self.out / table, asked, progress)
        said = {**to_mapping(asked), "suite": str(self.root), "clip": self.clip, "judge": self.judge}
        made = Table(suite.layout, filled.records, filled.failures, filled.notes, said)
        if not made.records:
            return None
        made.save(self.out / table)
        refused = [f"{entry.title}: {entry.refused}" for entry in self.entries.get(table, []) if entry.refused]
        found = paper.beside_paper(table, made, rows, baselines, refused, self.sources.is_toy)
        beside.save(found, self.out / table)
        return made, found


def with_words(asked: TableConfig, protocol: str | None, words: Sequence[str]) -> TableConfig:
    """The settings of tables under a protocol, and words over them."""
    if protocol is not None:
        asked = replace(asked, protocol=protocol, samples=0, seeds=())
    return with_overrides(asked, words)
