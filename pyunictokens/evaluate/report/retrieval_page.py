"""The page about a ranking: photos of the concept, then the retrieved pictures in order, band by band.

One HTML file that needs no other file and no network. A band shows its most alike pictures up to a number; how many
more there are is said.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from ...utils.errors import UserError
from ...utils.files import write_text_atomic
from ...utils.progress import Progress, silent
from ..retrieval import Picture, Ranking
from . import environment
from .embedded_images import file_uri

_SIDE = 160
SHOWN = 12
"""Pictures of a band on the page."""


def write_page(ranking: Ranking, file: str | os.PathLike[str], shown: int = SHOWN, progress: Progress = silent) -> None:
    """Write the page of `ranking`, with at most `shown` pictures of each band and of the easy negatives."""
    groups = [("Doubtful: nearly a photo of the concept", ranking.doubtful, 0)]
    groups += [("Hard negatives", ranking.negatives("hard"), 0)]
    groups += [
        (f"Soft positives, band {number}", ranking.band(number), number) for number in range(ranking.bands, 0, -1)
    ]
    groups += [("Easy negatives", ranking.negatives("easy"), 0)]
    uris: dict[str, str] = {}
    sections = []
    for place, (title, pictures, tokens) in enumerate(groups):
        if pictures or tokens:
            tiles = [_tile(picture, uris) for picture in pictures[: shown if tokens or "Easy" in title else 2 * shown]]
            sections.append({"title": title, "tokens": tokens, "range": _range(pictures), "tiles": tiles})
            sections[-1]["count"] = len(pictures)
        progress("page", place + 1, len(groups))
    page = environment().get_template("retrieval.html")
    text = page.render(
        concept=ranking.concept,
        clip=ranking.clip,
        count=len(ranking.pictures),
        soft=sum(1 for picture in ranking.pictures if picture.band),
        bands=ranking.bands,
        alike=ranking.alike,
        references=[_uri(str(path), uris) for path in ranking.references[:SHOWN]],
        sections=sections,
        left_out=ranking.left_out,
    )
    write_text_atomic(file, text)


def _tile(picture: Picture, uris: dict[str, str]) -> dict[str, str]:
    return {
        "uri": _uri(str(picture.path), uris),
        "name": picture.path.name,
        "similarity": f"{picture.similarity:.3f}",
        "nearest": f"{picture.nearest:.3f}",
    }


def _uri(path: str, uris: dict[str, str]) -> str:
    """The picture inside the page; empty where it can no longer be read."""
    if path not in uris:
        try:
            uris[path] = file_uri(path, _SIDE)
        except UserError:
            uris[path] = ""
    return uris[path]


def _range(pictures: Sequence[Picture]) -> str:
    if not pictures:
        return ""
    return f"likeness {pictures[0].similarity:.3f} to {pictures[-1].similarity:.3f}"
