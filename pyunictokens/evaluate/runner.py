"""Fills a table: asks each model every item of each concept, keeps the cells, and has them scored.

Whatever is there already is not done again: a cell with its output is not asked for, a cell with its scores is not
scored, and a model none of whose cells is missing is not even loaded. What cannot be done (a damaged picture, a prompt
the model refuses, a judge out of reach) is listed, and everything else goes on.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.images import fit_within, read_picture
from ..models.showo.prompting import compound_prompt, first_sentence, text_only_question
from ..utils.errors import UserError
from .metrics import clean
from .model import Candidate, Model, Unsupported
from .result import to_bytes
from .sample_cache import Cell, Cells
from .scoring import Failure, Scorer
from .subject import DRAWING, TASKS, Item, Subject

_SIDE = 2048  # longest side of a picture that models are shown
_SAMPLES = 1000
_AT_ONCE = 32  # cells whose questions a judge is given together

Progress = Callable[[str, int, int], None]
"""Called with (what, items done, items wanted)."""


@dataclass(frozen=True)
class TableSettings:
    """How much is asked."""

    samples: int = 4
    """Drawings of each prompt under each seed."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the drawings; answers are greedy and asked once."""
    tasks: tuple[str, ...] = ()
    """Which tasks are measured; none named means all."""
    limit: int = 0
    """At most so many items of each task (of each half, in rec), the first ones; 0 means all."""

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= _SAMPLES:
            raise UserError(f"samples={self.samples}: must be from 1 to {_SAMPLES}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"seeds={list(self.seeds)}: must be one or more different numbers ≥ 0")
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown:
            raise UserError(f"tasks={list(self.tasks)}: must be some of {', '.join(TASKS)}")
        if self.limit < 0:
            raise UserError(f"limit={self.limit}: must be ≥ 0 (0 means all)")


@dataclass
class Filled:
    """What a run of the table left: the cells of every model, and what could not be done."""

    cells: list[Cell] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    unsupported: list[tuple[str, str]] = field(default_factory=list)
    """(model, task) where the model does not do such a thing."""
    notes: list[str] = field(default_factory=list)
    made: int = 0
    """Cells that were asked for in this run; the others were there."""


def fill(
    candidates: Sequence[Candidate],
    subjects: Iterable[Subject],
    scorer: Scorer,
    folder: str | os.PathLike[str],
    settings: TableSettings | None = None,
    progress: Progress | None = None,
) -> Filled:
    """Every candidate on every subject. Raises UserError for two candidates of one name, or none."""
    settings = settings or TableSettings()
    names = [candidate.name for candidate in candidates]
    if not names or len(set(names)) != len(names):
        raise UserError(f"models {', '.join(names) or 'none'}: must be one or more, each with a name of its own")
    folder, filled = Path(folder), Filled(notes=list(scorer.notes))
    ready = [_usable(subject) for subject in subjects]
    filled.notes += [f"{subject.name}: {note}" for subject in ready for note in subject.notes]
    for candidate in candidates:
        for subject in ready:
            _Row(candidate, subject, scorer, Cells(folder / "cells"), settings, filled, progress).run()
        candidate.release()
    return filled


def noise_seed(seed: int, subject: Subject, item: Item) -> int:
    """The seed a prompt is drawn under: another one for each concept, task and prompt, the same for every model."""
    text = "\0".join((str(seed), subject.name, item.task, item.text))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


class _Row:
    """One model on one concept."""

    def __init__(
        self,
        candidate: Candidate,
        subject: Subject,
        scorer: Scorer,
        cells: Cells,
        settings: TableSettings,
        filled: Filled,
        progress: Progress | None,
    ):
        self.candidate, self.subject, self.scorer, self.cells = candidate, subject, scorer, cells
        self.settings, self.filled, self.progress = settings, filled, progress
        self._model: Model | None = None
        self._broken = False
        self._chosen: dict[str, str] = {}

    def run(self) -> None:
        """All tasks. A model that cannot be made ready is one failure and ends the row."""
        for task in self.settings.tasks or TASKS:
            items = _first(self.subject.of(task), self.settings.limit)
            pairs = []
            for number, (item, seed) in enumerate(self._asked(task, items)):
                try:
                    cell = self._cell(item, seed)
                except Unsupported:
                    if (self.candidate.name, task) not in self.filled.unsupported:
                        self.filled.unsupported.append((self.candidate.name, task))
                    break
                except UserError as error:
                    if self._broken:
                        return self._fail(task, "the model", str(error), "")
                    self._fail(task, "a drawing" if task in DRAWING else "an answer", str(error), item.text)
                    continue
                pairs.append((cell, item))
                self._tell(task, number + 1, len(items) * (len(self.settings.seeds) if task in DRAWING else 1))
            lacking = [(cell, item) for cell, item in pairs if self.scorer.lacking(cell)]
            for start in range(0, len(lacking), _AT_ONCE):
                part = lacking[start : start + _AT_ONCE]
                self.filled.failures += self.scorer.score(part, self.subject)
                for cell, _ in part:
                    Cells.write(cell)
            self.filled.cells += [cell for cell, _ in pairs]
        return None

    def _asked(self, task: str, items: list[Item]) -> list[tuple[Item, int]]:
        seeds = self.settings.seeds if task in DRAWING else (0,)
        return [(item, seed) for seed in seeds for item in items]

    def _cell(self, item: Item, seed: int) -> Cell:
        """The cell of one item: as it is on disk, else asked for and kept."""
        samples = self.settings.samples if item.task in DRAWING else 0
        path = self.cells.place(self.candidate.name, self.candidate.identity, self.subject, item, seed, samples)
        kept = Cells.read(path)
        if kept is not None:
            kept.model = self.candidate.name
            return kept
        begin = time.perf_counter()
        cell = Cell(
            self.candidate.name,
            self.subject.name,
            self.subject.kind,
            item.task,
            item.digest,
            item.text,
            item.meant,
            item.group,
            item.image.name if item.image else "",
            seed,
            path=path,
        )
        drawings = None
        if item.task in DRAWING:
            drawings = self._draw(cell, item, seed, samples)
        else:
            images = [] if item.image is None else [fit_within(read_picture(item.image), _SIDE)]
            cell.answer = clean(self._ready().answer(images, item.text))
        cell.seconds = time.perf_counter() - begin
        Cells.write(cell, drawings)
        self.filled.made += 1
        return cell

    def _draw(self, cell: Cell, item: Item, seed: int, samples: int) -> Tensor:
        model = self._ready()
        cell.drawn = item.text
        if self.candidate.reasons and item.facts:
            question = text_only_question(item.facts, item.text)
            if question not in self._chosen:
                self._chosen[question] = clean(model.answer([], question))
            cell.answer = self._chosen[question]
            if cell.answer:
                cell.drawn = compound_prompt(item.text, first_sentence(cell.answer))
        pixels: Any = model.generate(cell.drawn, samples, noise_seed(seed, self.subject, item))
        if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[:2] != (samples, 3) or not pixels.numel():
            found = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
            raise UserError(f"{cell.model} drew {found}: must be [{samples}, 3, H, W]")
        if not bool(torch.isfinite(pixels).all()):
            raise UserError(f"{cell.model} drew pixels that are not finite")
        cell.count = samples
        return to_bytes(pixels)

    def _ready(self) -> Model:
        if self._model is None:
            self._broken = True
            self._model = self.candidate.load(self.subject)
            self._broken = False
        return self._model

    def _fail(self, task: str, what: str, why: str, text: str) -> None:
        self.filled.failures.append(Failure(self.candidate.name, self.subject.name, task, what, why, text))

    def _tell(self, task: str, done: int, wanted: int) -> None:
        if self.progress is not None:
            self.progress(f"{self.candidate.name}, {self.subject.name}: {task}", done, wanted)


def _first(items: list[Item], limit: int) -> list[Item]:
    """The first `limit` items of each group; all when limit is 0."""
    if not limit:
        return items
    counts: dict[str, int] = {}
    kept = []
    for item in items:
        counts[item.group] = counts.get(item.group, 0) + 1
        if counts[item.group] <= limit:
            kept.append(item)
    return kept


def _usable(subject: Subject) -> Subject:
    """The subject without reference photos that cannot be read; each is noted."""
    good = []
    for path in subject.photos:
        try:
            read_picture(path, at_least=32)
        except UserError as error:
            subject.notes.append(f"a reference photo is left out: {error}")
        else:
            good.append(path)
    subject.photos = good
    return subject
