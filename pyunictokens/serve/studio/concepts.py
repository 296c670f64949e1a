"""Concepts from photos and a form: what the page *Concept* asks for. It is independent of the page.

Everything is done by the functions of `pyunictokens data new` and `data check`: a form is tried in a folder of its own,
which is thrown away, and written into the data folder by the same call.
"""

from __future__ import annotations

import secrets
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ...data.check import check_folder, check_photo
from ...data.concept import Concept, concept_name
from ...data.folder import concept_folders
from ...data.images import read_image, save_image
from ...data.install import refuse_present
from ...data.new import new_concept
from ...data.parse import Problem
from ...utils.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


@dataclass(frozen=True)
class ConceptForm:
    """What somebody filled in."""

    name: str
    kind: str
    class_word: str
    photos: tuple[Path, ...]
    info: str = ""
    facts: tuple[dict[str, str], ...] = ()
    """Entries of the sheet of facts: fact, prompt, and where there is one question and answer."""
    others: tuple[Path, ...] = ()
    """Images of other things; none: as `data new` does without."""
    replace: bool = False
    """Whether a concept of this name makes room."""


@dataclass(frozen=True)
class Made:
    """A concept that was made, or tried."""

    concept: Concept
    negatives: str
    """Where the images of other things come from."""
    findings: list[str] = field(default_factory=list)
    """What making it noted, and what `data check` finds in it."""


class Concepts:
    """The concepts of one data folder. Photos are files that the page has received; their names are never paths."""

    def __init__(self, root: Path):
        self.root = root
        self._aside = tempfile.TemporaryDirectory(prefix="pyunictokens-studio-")

    def close(self) -> None:
        """Remove what was cut."""
        self._aside.cleanup()

    def names(self) -> list[str]:
        """Concepts that are there."""
        parent = self.root / "concept" / "train"
        return concept_folders(parent) if parent.is_dir() else []

    def findings(self, photo: Path) -> list[Problem]:
        """What `data check` would say of a photo."""
        return check_photo(photo)

    def cropped(self, photo: Path, left: float, right: float, top: float, bottom: float) -> Picture:
        """The photo without the given percents of its width and height."""
        if min(left, right, top, bottom) < 0 or left + right >= 100 or top + bottom >= 100:
            raise UserError(f"left {left}, right {right}, top {top}, bottom {bottom} percent: nothing would be left")
        image = read_image(photo)
        width, height = image.size
        box = (left * width / 100, top * height / 100, width - right * width / 100, height - bottom * height / 100)
        x0, y0, x1, y1 = (round(each) for each in box)
        if x1 <= x0 or y1 <= y0:
            raise UserError(f"{photo.name}: {width}×{height} pixels: nothing would be left")
        return image.crop((x0, y0, x1, y1))

    def cut(self, photo: Path, *edges: float) -> Path:
        """The same as a new file; `edges` as of :meth:`cropped`."""
        file = Path(self._aside.name) / secrets.token_hex(8) / f"{photo.stem}.png"
        file.parent.mkdir()
        save_image(self.cropped(photo, *edges), file)
        return file

    def check(self, form: ConceptForm) -> Made:
        """Make the concept in a folder that is thrown away. Raises UserError with all that keeps it from being made."""
        refuse_present(self.root, concept_name(form.name), form.replace)
        with tempfile.TemporaryDirectory(dir=self._aside.name) as folder:
            return self._make(form, Path(folder))

    def write(self, form: ConceptForm) -> Made:
        """Make the concept in the data folder, all or nothing."""
        return self._make(form, self.root)

    def _make(self, form: ConceptForm, root: Path) -> Made:
        try:
            made = new_concept(
                root,
                form.name,
                form.photos,
                kind=form.kind,
                class_word=form.class_word,
                info=form.info,
                spec_yaml={"facts": list(form.facts)} if form.facts else None,
                negatives=form.others or None,
                force=form.replace,
            )
            found = [str(problem) for problem in check_folder(root, form.name)]
        except UserError as error:
            raise UserError(_short(str(error), form)) from None
        return Made(made.concept, made.negatives, [_short(text, form) for text in [*made.notes, *found]])


def _short(text: str, form: ConceptForm) -> str:
    """`text` with the photos by their names: where the page keeps them tells nobody anything."""
    for file in (*form.photos, *form.others):
        text = text.replace(str(file), file.name)
    return text
