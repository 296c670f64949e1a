"""Side by side: one page for each prompt with the images of every model, and an index of all prompts.

Each page is one HTML file that needs no other file and no network: images are inside it. Models stand below each other
in the order of the table, images of one model beside each other, each with its scores.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from ...data.images import load_pixels
from ...utils.errors import UserError
from ...utils.files import write_text_atomic
from ..result import to_bytes
from ..sample_cache import Record
from ..table_files import Table
from ..tasks import TASKS, Subject
from . import environment
from .embedded_images import each

_SCORES = {"judge": "judge", "clip_t": "CLIP-T", "clip_i": "CLIP-I"}
_REFERENCES, _REFERENCE_SIDE = 6, 256
_IMAGES = 8  # of one model and seed, on a page


class _Image(TypedDict):
    uri: str
    scores: list[tuple[str, str]]


class _Sheet(TypedDict):
    seed: int
    images: list[_Image]


class _Line(TypedDict):
    model: str
    sheets: list[_Sheet]
    answer: str


def write_gallery(
    table: Table, folder: str | os.PathLike[str], subjects: Mapping[str, Subject] | None = None
) -> Path | None:
    """Write `folder`/index.html and a page a prompt; returns the index, or None where there are no images.

    subjects: concepts by name, whose references are then shown on the pages.
    """
    folder = Path(folder)
    prompts: dict[tuple[str, str, str], list[Record]] = {}
    for record in table.records:
        if TASKS[record.task].images and record.count:
            prompts.setdefault((record.concept, record.task, record.item), []).append(record)
    if not prompts:
        return None
    page, listed = environment().get_template("gallery.html"), []
    references = {name: _references(subject) for name, subject in (subjects or {}).items()}
    files = [f"{number:03d}.html" for number in range(len(prompts))]
    for number, ((concept, task, _), records) in enumerate(prompts.items()):
        lines = [line for model in table.models if (line := _line(model, records))["sheets"]]
        first = records[0]
        about = {"concept": concept, "task": TASKS[task].title, "prompt": first.text, "meant": first.meant}
        text = page.render(
            **about,
            references=references.get(concept, []),
            lines=lines,
            most=max(len(sheet["images"]) for line in lines for sheet in line["sheets"]),
            number=number + 1,
            total=len(files),
            before=files[number - 1] if number else "",
            after=files[number + 1] if number + 1 < len(files) else "",
        )
        write_text_atomic(folder / files[number], text)
        shown = [{"model": line["model"], "image": line["sheets"][0]["images"][0]["uri"]} for line in lines]
        listed.append({**about, "file": files[number], "shown": shown})
    index = folder / "index.html"
    listing = environment().get_template("gallery_index.html")
    write_text_atomic(index, listing.render(prompts=listed, models=table.models))
    return index


def _line(model: str, records: Sequence[Record]) -> _Line:
    """One model's images of one prompt, seed by seed."""
    line = _Line(model=model, sheets=[], answer="")
    for record in sorted((record for record in records if record.model == model), key=lambda record: record.seed):
        names = [name for name in _SCORES if name in record.scores]
        images = [
            _Image(uri=uri, scores=[(_SCORES[name], f"{record.scores[name][place]:.2f}") for name in names])
            for place, uri in enumerate(each(record.images()[:_IMAGES]))
        ]
        line["sheets"].append(_Sheet(seed=record.seed, images=images))
        line["answer"] = record.answer or ""
    return line


def _references(subject: Subject) -> list[str]:
    found = []
    for path in subject.references[:_REFERENCES]:
        try:
            found += each(to_bytes(load_pixels(path, _REFERENCE_SIDE))[None])
        except UserError:
            continue  # the runner has noted it
    return found
