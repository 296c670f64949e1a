"""Cells of a table on disk: what one model answered or drew for one item under one seed, and its scores so far.

    OUT/cells/MODEL/CONCEPT/TASK/DIGEST.json      and, for drawings, DIGEST.png beside it

A cell is written whole or not at all (the picture first, then the JSON that names it), and its name is a digest of all
that decides what the model says: so a cell that is there is right, and is not done again. Scores carry the name of what
gave them; a score that could not be had is absent and tried again next time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..utils.errors import UserError
from ..utils.files import read_json, safe_name, write_json
from .result import read_strip, write_strip
from .subject import Item, Subject

FORMAT = 1
_WEIGHTS = frozenset({".safetensors", ".bin", ".pt"})
_UNSAFE = re.compile(r"[^A-Za-z0-9._+=-]+")


@dataclass
class Cell:
    """One item's output and scores."""

    model: str
    concept: str
    kind: str
    task: str
    item: str
    """The item's digest."""
    text: str
    meant: str
    group: str = ""
    image: str = ""
    seed: int = 0
    answer: str | None = None
    """What the model answered; for drawings that reason first, the answer they were drawn with."""
    drawn: str = ""
    """The prompt as it was drawn."""
    count: int = 0
    """Drawings beside the cell."""
    scores: dict[str, list[float]] = field(default_factory=dict)
    """Numbers by measure, one a drawing or one in all."""
    by: dict[str, str] = field(default_factory=dict)
    """What gave each score: an encoder's or a judge's name; "" for arithmetic."""
    details: dict[str, Any] = field(default_factory=dict)
    """What a score was made of, such as the judge's words by segment."""
    seconds: float = 0.0
    path: Path = field(default=Path(), compare=False)

    def drawings(self) -> Tensor:
        """uint8 [count, 3, H, W]. Raises UserError where the picture is gone or damaged."""
        return read_strip(self.path.with_suffix(".png"), self.count)


class Cells:
    """The folder of one evaluation's cells."""

    def __init__(self, folder: Path):
        self.folder = folder

    def place(self, model: str, identity: str, subject: Subject, item: Item, seed: int, samples: int) -> Path:
        """Where the cell of these is, or will be."""
        who = f"{_slug(model)}-{_digest(identity)[:6]}"
        decides = [FORMAT, identity, item.digest, seed if samples else 0, samples]
        name = _digest(json.dumps(decides))[:20]
        return self.folder / who / safe_name(subject.name, "concept name") / item.task / f"{name}.json"

    @staticmethod
    def read(path: Path) -> Cell | None:
        """The cell at `path`; None where there is none, or where what is there is no whole cell."""
        try:
            content = read_json(path)
            if content.pop("format") != FORMAT:
                return None
            cell = Cell(**content, path=path)
            if cell.count and not path.with_suffix(".png").is_file():
                return None
        except (UserError, KeyError, TypeError, AttributeError):
            return None
        return cell

    @staticmethod
    def write(cell: Cell, drawings: Tensor | None = None) -> None:
        """Keep `cell`, with its drawings uint8 [S, 3, H, W] when they are new."""
        if drawings is not None:
            write_strip(drawings, cell.path.with_suffix(".png"))
        content = asdict(cell)
        del content["path"]
        write_json(cell.path, {"format": FORMAT, **content})


def fingerprint(path: str | os.PathLike[str], pattern: str = "**/*") -> str:
    """A digest of the weights under a local folder (or of one file), by names, sizes and times; "" where none is local.

    Part of a candidate's identity: weights trained anew at the same place are another model.
    """
    place = Path(path).expanduser()
    if not str(path):
        return ""
    files = [place] if place.is_file() else sorted(place.glob(pattern)) if place.is_dir() else []
    found = [
        f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}"
        for file in files
        if file.suffix in _WEIGHTS and file.is_file()
    ]
    return _digest("\n".join(found))[:16] if found else ""


def _slug(name: str) -> str:
    return _UNSAFE.sub("-", name).strip("-.")[:48] or "model"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
