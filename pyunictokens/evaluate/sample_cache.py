"""What one model answered or generated for one item under one seed, with its scores; and a folder that keeps it.

    OUT/samples/MODEL/CONCEPT/TASK/DIGEST.json      and, for images, DIGEST.png beside it

A record is written whole or not at all (the image first, then the JSON that names it). Its name is a digest of model,
item and seed, and inside it stands one of the concept's files: so a record that is there and of them is right, and is
not made again. Scores carry the name of
what gave them; a score that could not be had is absent and tried again next time. Folders of earlier versions
(OUT/cells/) are read, and go on, as they are.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from ..utils.files import read_json, safe_name, sealed, unsealed, write_json
from ..utils.fingerprint import digest
from ..utils.json import Json
from .result import read_strip, write_strip
from .tasks import TASKS, Item, Subject, task_named

log = logging.getLogger(__name__)

FORMAT = 1
_UNSAFE = re.compile(r"[^A-Za-z0-9._+=-]+")


@dataclass
class Record:
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
    """What the model answered; for images of a prompt that needs a fact, the answer they were generated with."""
    drawn: str = ""
    """The prompt as the images were generated from it."""
    count: int = 0
    """Images beside the record."""
    scores: dict[str, list[float]] = field(default_factory=dict)
    """Numbers by measure, one an image or one in all."""
    by: dict[str, str] = field(default_factory=dict)
    """What gave each score: an encoder's or a judge's name; "" for arithmetic."""
    details: dict[str, Json] = field(default_factory=dict)
    """What a score was made of, such as the judge's words by segment."""
    seen: list[dict[str, str]] = field(default_factory=list)
    """What an attribute reader saw in each image, as words by slot."""
    seconds: float = 0.0
    contents: str = ""
    """A digest of what else decides it: the concept's files. "" in records of earlier versions."""
    path: Path = field(default=Path(), compare=False)
    pixels: Tensor | None = field(default=None, compare=False, repr=False)
    """The images as they were generated, [S, 3, H, W] in [-1, 1], while they are at hand; not kept."""

    def __post_init__(self) -> None:
        self.task = task_named(self.task)

    @classmethod
    def of(cls, model: str, subject: Subject, item: Item, seed: int = 0, path: Path | None = None) -> Record:
        """An empty record of one item."""
        image = item.image.name if item.image else ""
        about = (item.task, item.digest, item.text, item.meant, item.group, image)
        return cls(model, subject.name, subject.kind, *about, seed, path=path or Path())

    def images(self) -> Tensor:
        """The kept images, uint8 [count, 3, H, W]. Raises UserError where the file is gone or damaged."""
        return read_strip(self.path.with_suffix(".png"), self.count)

    def looks(self) -> Tensor:
        """The images [S, 3, H, W] in [-1, 1]: those at hand, else the kept ones."""
        return self.pixels if self.pixels is not None else self.images().float() / 127.5 - 1.0


class SampleCache:
    """The folder of one evaluation's records."""

    def __init__(self, folder: Path):
        self.folder = folder

    def place(self, model: str, identity: str, subject: Subject, item: Item, seed: int, samples: int) -> Path:
        """Where the record of these is, or will be."""
        slug = _UNSAFE.sub("-", model).strip("-.")[:48] or "model"
        inside = Path(f"{slug}-{digest(identity)[:6]}", safe_name(subject.name, "concept name"))
        decides = [FORMAT, identity, item.digest, seed if samples else 0, samples]
        name = f"{digest(json.dumps(decides))[:20]}.json"
        earlier = self.folder / "cells" / inside / TASKS[item.task].key / name
        return earlier if earlier.is_file() else self.folder / "samples" / inside / item.task / name

    @staticmethod
    def read(path: Path) -> Record | None:
        """The record at `path`; None where there is none, or where what is there is no whole record."""
        try:
            content = unsealed(read_json(path), path)
            if content.pop("format") != FORMAT:
                return None
            record = Record(**content, path=path)
            if record.count and not path.with_suffix(".png").is_file():
                return None
        except Exception as error:  # damaged, in whatever way: it is made again
            if path.is_file():
                log.warning("%s: is made again: %s", path, error)
            return None
        return record

    @staticmethod
    def write(record: Record, images: Tensor | None = None) -> None:
        """Keep `record`, with its images uint8 [S, 3, H, W] when they are new."""
        if images is not None:
            write_strip(images, record.path.with_suffix(".png"))
        content = asdict(record)
        del content["path"], content["pixels"]
        write_json(record.path, sealed({"format": FORMAT, **content}))
