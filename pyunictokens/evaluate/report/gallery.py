"""Side by side: one page for each prompt with the drawings of every model, and an index of all prompts.

Each page is one HTML file that needs no other file and no network: pictures are inside it. Models stand below each
other in the order of the table, drawings of one model beside each other, each with its scores. Draws nothing itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...data.images import load_pixels
from ...utils.errors import UserError
from ...utils.files import write_text_atomic
from ..result import to_bytes
from ..sample_cache import Cell
from ..subject import DRAWING, Subject
from ..table_files import Table
from . import embedded_images as pictures

TASK_NAMES = {
    "pure": "Short prompt",
    "dense": "Long prompt",
    "rea_gen": "Prompt that hints at a fact",
    "dense_rea_gen": "Long prompt that hints at a fact",
}
_SCORES = {"judge": "judge", "clip_t": "CLIP-T", "clip_i": "CLIP-I"}
_PHOTOS, _PHOTO_SIDE = 6, 256
_DRAWINGS = 8  # of one model and seed, on a page


def write_gallery(
    table: Table, folder: str | os.PathLike[str], subjects: Mapping[str, Subject] | None = None
) -> Path | None:
    """Write `folder`/index.html and a page a prompt; returns the index, or None where nothing was drawn.

    subjects: concepts by name, whose photos are then shown on the pages.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(folder)
    prompts: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in table.cells:
        if cell.task in DRAWING and cell.count:
            prompts.setdefault((cell.concept, cell.task, cell.item), []).append(cell)
    if not prompts:
        return None
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("gallery.html")
    photos = {name: _photos(subject) for name, subject in (subjects or {}).items()}
    listed: list[dict[str, Any]] = []
    files = [f"{number:03d}.html" for number in range(len(prompts))]
    for number, ((concept, task, _), cells) in enumerate(prompts.items()):
        lines = [_line(model, cells) for model in table.models]
        lines = [line for line in lines if line["sheets"]]
        about = {"concept": concept, "task": TASK_NAMES[task], "prompt": cells[0].text, "meant": cells[0].meant}
        context = {
            **about,
            "photos": photos.get(concept, []),
            "lines": lines,
            "most": max(len(sheet["images"]) for line in lines for sheet in line["sheets"]),
            "number": number + 1,
            "total": len(files),
            "before": files[number - 1] if number else "",
            "after": files[number + 1] if number + 1 < len(files) else "",
        }
        write_text_atomic(folder / files[number], page.render(**context))
        shown = [{"model": line["model"], "image": line["sheets"][0]["images"][0]["uri"]} for line in lines]
        listed.append({**about, "file": files[number], "shown": shown})
    index = folder / "index.html"
    write_text_atomic(index, environment.get_template("gallery_index.html").render(prompts=listed, models=table.models))
    return index


def _line(model: str, cells: Sequence[Cell]) -> dict[str, Any]:
    """One model's drawings of one prompt, seed by seed."""
    sheets = []
    answer = ""
    for cell in sorted((cell for cell in cells if cell.model == model), key=lambda cell: cell.seed):
        uris = pictures.each(cell.drawings()[:_DRAWINGS])
        images = [
            {"uri": uri, "scores": [(_SCORES[n], f"{cell.scores[n][i]:.2f}") for n in _SCORES if n in cell.scores]}
            for i, uri in enumerate(uris)
        ]
        sheets.append({"seed": cell.seed, "images": images})
        answer = cell.answer or ""
    return {"model": model, "sheets": sheets, "answer": answer}


def _photos(subject: Subject) -> list[str]:
    found = []
    for path in subject.photos[:_PHOTOS]:
        try:
            found += pictures.each(to_bytes(load_pixels(path, _PHOTO_SIDE))[None])
        except UserError:
            continue  # the runner has noted it
    return found
