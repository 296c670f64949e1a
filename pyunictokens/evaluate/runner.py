"""Fills a table: asks each model every item of each concept, keeps the records, and has them scored.

Whatever is there already is not done again: a record with its output is not asked for, one with its scores is not
scored, and a model none of whose records is missing is not even loaded. What cannot be done (a damaged image, a prompt
the model refuses, a judge out of reach) is listed, and everything else goes on.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.images import fit_within, read_image
from ..utils.errors import UserError
from ..utils.fingerprint import digest, of_file
from .core import Asker, Baseline, Model, Unsupported, checked
from .protocol import DEFAULT_SAMPLES, protocol_named
from .result import to_bytes
from .sample_cache import Record, SampleCache
from .scoring import Failure, Scorer
from .tasks import TASKS, Item, Subject, wanted_tasks

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 2048  # longest side of an image that models are shown
_SAMPLES = 1000
_AT_ONCE = 32  # records whose questions a judge is given together

Progress = Callable[[str, int, int], None]
"""Called with (what, items done, items wanted)."""


@dataclass(frozen=True)
class TableSettings:
    """How much is asked."""

    samples: int = 4
    """Images of each prompt under each seed; 0 takes the numbers of a protocol that has its own."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the images; answers are greedy and asked once. None named means that of a protocol that has its own."""
    tasks: tuple[str, ...] = ()
    """Which tasks are measured; none named means all."""
    protocol: str = "ours"
    """How is asked and scored: ours, or sync-r1, the authors' later public code (docs/evaluation.md)."""
    limit: int = 0
    """At most so many items of each task (of each half, in recognition), the first ones; 0 means all."""

    def __post_init__(self) -> None:
        protocol = protocol_named(self.protocol)
        if not self.seeds and protocol.seed is not None:
            object.__setattr__(self, "seeds", (protocol.seed,))
        if not (0 if protocol.samples else 1) <= self.samples <= _SAMPLES:
            raise UserError(f"samples={self.samples}: must be from 1 to {_SAMPLES}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"seeds={list(self.seeds)}: must be one or more different numbers ≥ 0")
        if self.limit < 0:
            raise UserError(f"limit={self.limit}: must be ≥ 0 (0 means all)")
        object.__setattr__(self, "tasks", wanted_tasks(self.tasks, "tasks"))

    def images(self, task: str) -> int:
        """Images of each prompt of a task; 0 where questions are answered."""
        if not TASKS[task].images:
            return 0
        return self.samples or protocol_named(self.protocol).samples.get(task, DEFAULT_SAMPLES)


@dataclass
class Filled:
    """What a run of the table left: the records of every model, and what could not be done."""

    records: list[Record] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    unsupported: list[tuple[str, str]] = field(default_factory=list)
    """(model, task) where the model does not do such a thing."""
    notes: list[str] = field(default_factory=list)
    made: int = 0
    """Records that were asked for in this run; the others were there."""


def fill(
    baselines: Sequence[Baseline],
    subjects: Iterable[Subject],
    scorer: Scorer,
    folder: str | os.PathLike[str],
    settings: TableSettings | None = None,
    progress: Progress | None = None,
) -> Filled:
    """Every model on every subject. Raises UserError for two models of one name, or none."""
    settings = settings or TableSettings()
    names = [baseline.name for baseline in baselines]
    if not names or len(set(names)) != len(names):
        raise UserError(f"models {', '.join(names) or 'none'}: must be one or more, each with a name of its own")
    cache, filled = SampleCache(Path(folder)), Filled(notes=list(scorer.notes))
    ready = [_usable(subject) for subject in subjects]
    filled.notes += [f"{subject.name}: {note}" for subject in ready for note in subject.notes]
    for baseline in baselines:
        for subject in ready:
            _Row(baseline, subject, scorer, cache, settings, filled, progress or (lambda *_: None)).run()
        baseline.release()
    return filled


def noise_seed(seed: int, subject: Subject, item: Item) -> int:
    """The seed of a prompt's images: another one for each concept, task and prompt, the same for every model."""
    text = "\0".join((str(seed), subject.name, TASKS[item.task].key, item.text))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


class _Broken(UserError):
    """A model that cannot be made ready."""


@dataclass
class _Row:
    """One model on one concept."""

    baseline: Baseline
    subject: Subject
    scorer: Scorer
    cache: SampleCache
    settings: TableSettings
    filled: Filled
    progress: Progress

    @cached_property
    def asker(self) -> Asker:
        return Asker(lambda: self.model, lru_cache(maxsize=4)(_shown), self.baseline.reasons)

    @cached_property
    def model(self) -> Model:
        try:
            return self.baseline.load(self.subject)
        except UserError as error:
            raise _Broken(str(error)) from error

    def run(self) -> None:
        """All tasks. A model that cannot be made ready is one failure and ends the row."""
        name = self.baseline.name
        for task in self.settings.tasks or TASKS:
            images = TASKS[task].images
            distinct = {item.digest: item for item in self.subject.of(task)}
            items = first_of_each_group(distinct.values(), self.settings.limit)
            asked = [(item, seed) for seed in (self.settings.seeds if images else (0,)) for item in items]
            pairs = []
            for number, (item, seed) in enumerate(asked):
                try:
                    pairs.append((self._record(item, seed), item))
                except Unsupported:
                    if (name, task) not in self.filled.unsupported:
                        self.filled.unsupported.append((name, task))
                    break
                except _Broken as error:
                    return self._fail(task, "the model", error, "")
                except UserError as error:
                    self._fail(task, "an image" if images else "an answer", error, item.text)
                    continue
                self.progress(f"{name}, {self.subject.name}: {task}", number + 1, len(asked))
            lacking = [(record, item) for record, item in pairs if self.scorer.lacking(record)]
            for start in range(0, len(lacking), _AT_ONCE):
                part = lacking[start : start + _AT_ONCE]
                self.filled.failures += self.scorer.score(part, self.subject)
                for record, _ in part:
                    SampleCache.write(record)
            self.filled.records += [record for record, _ in pairs]
        return None

    def _record(self, item: Item, seed: int) -> Record:
        """The record of one item: as it is on disk, else asked for and kept."""
        samples = self.settings.images(item.task)
        name, identity = self.baseline.name, self.baseline.identity
        path = self.cache.place(name, identity, self.subject, item, seed, samples)
        kept, contents = SampleCache.read(path), self._contents_of(item)
        if kept is not None and kept.contents in ("", contents):
            kept.model = name
            return kept
        begin = time.perf_counter()
        record, images = Record.of(name, self.subject, item, seed, path), None
        record.contents = contents
        if samples:
            record.drawn, answer = self.asker.prompt(item)
            record.answer = answer if self.baseline.reasons and item.facts else None
            made = self.model.generate(record.drawn, samples, noise_seed(seed, self.subject, item))
            images, record.count = to_bytes(checked(made, samples, name)), samples
        else:
            (record.answer,) = self.asker.answers([item])
        record.seconds = time.perf_counter() - begin
        SampleCache.write(record, images)
        self.filled.made += 1
        return record

    def _contents_of(self, item: Item) -> str:
        """A digest of the files an item's output and scores depend on, and of the concept in words."""
        subject, known = self.subject, self._digest
        files = [*subject.references, *subject.test_images, *([item.image] if item.image else [])]
        words = [subject.class_word, subject.kind, subject.info, *subject.facts, "|"]
        return digest("\0".join([*words, *(known(path) for path in files)]))

    @cached_property
    def _digest(self) -> Callable[[Path], str]:
        return lru_cache(maxsize=None)(lambda path: of_file(path) if path.is_file() else "")

    def _fail(self, task: str, what: str, why: UserError, text: str) -> None:
        self.filled.failures.append(Failure(self.baseline.name, self.subject.name, task, what, str(why), text))


def _shown(path: Path) -> Image:
    return fit_within(read_image(path), _SIDE)


def first_of_each_group(items: Iterable[Item], limit: int) -> list[Item]:
    """The first `limit` items of each group; all when limit is 0."""
    kept: dict[str, list[Item]] = {}
    for item in items:
        kept.setdefault(item.group, []).append(item)
    return [item for group in kept.values() for item in (group[:limit] if limit else group)]


def _usable(subject: Subject) -> Subject:
    """The subject without references that cannot be read; each is noted."""
    good = []
    for path in subject.references:
        try:
            read_image(path, at_least=32)
        except UserError as error:
            subject.notes.append(f"a reference image is left out: {error}")
        else:
            good.append(path)
    subject.references = good
    return subject
