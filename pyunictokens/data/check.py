"""Everything that is wrong with a data folder, found in one go: the files (`reader.py`) and the images, all decoded.

Changes nothing and raises only for a folder or a concept that is not there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from ..utils.errors import UserError
from ..utils.spelling import loose, spelled
from .concept import Concept, concept_name
from .folder import data_root, read_concept
from .image_files import folders_in, is_file, list_images
from .images import read_image
from .parse import ERROR, WARNING, ImageFinder, Ledger, Problem, kind_of

SMALLEST_SIDE = 16
"""Images with a shorter side below this are an error."""
SMALL_SIDE = 64
"""Images with a shorter side below this are a warning."""


def check_folder(
    root: str | os.PathLike[str], name: str | None = None, progress: Callable[[str], None] | None = None
) -> list[Problem]:
    """All problems of the data folder `root`, of one concept or (`name=None`) of all; errors before warnings.

    Every image is decoded in full; `progress`, when given, is called with each concept's name before its turn. Raises
    UserError only where the data folder or the named concept does not exist.
    """
    path = data_root(root)
    names = [concept_name(name)] if name is not None else folders_in(path / "concept" / "train")[0]
    ledger = Ledger(path)
    _shared(ledger, None if name is None else name)
    if not names:
        ledger.add(path / "concept" / "train", "", "holds no concept: make one with `data new`")
    for each in names:
        if progress is not None:
            progress(each)
        try:
            concept, problems = read_concept(path, each)
        except UserError as error:
            if name is not None:
                raise
            ledger.add(path / "concept" / "train" / each, "", str(error))
            continue
        for problem in problems:
            ledger.add(path / problem.file, problem.field, problem.message, problem.severity)
        _images(ledger, concept)
    return sorted(ledger.problems, key=lambda problem: problem.severity != ERROR)


def check_photo(path: Path) -> list[Problem]:
    """What :func:`check_folder` would say of one image file, by its name; nothing where it is fine."""
    ledger = Ledger(path.parent)
    _image(ledger, path)
    return ledger.problems


def render_problems(problems: Iterable[Problem], root: str | os.PathLike[str] = "") -> str:
    """Problems as plain text, one a line with its severity, and a line that counts them."""
    problems = list(problems)
    if not problems:
        return f"{root or 'the folder'}: no problems found"
    errors = sum(problem.severity == ERROR for problem in problems)
    lines = [f"{problem.severity:<7}  {problem}" for problem in problems]
    return "\n".join([*lines, f"{errors} error(s), {len(problems) - errors} warning(s)"])


def _shared(ledger: Ledger, only: str | None) -> None:
    """The files that belong to no single concept."""
    root, train = ledger.root, ledger.root / "concept" / "train"
    foreign = folders_in(train)[1]
    if foreign and only is None:
        ledger.warn(train, "", f"{', '.join(foreign)}: made by a system or a tool, no concepts: left out")
    listing = root / "concepts_list.json"
    value = ledger.read(listing, "tools that list concepts by it will not see any", WARNING)
    if isinstance(value, dict):  # some folders keep {name: …}
        value = list(value)
    if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        ledger.add(listing, "", f"must be a list of concept names, is {kind_of(value)}")
    elif value is not None:
        _absent(ledger, listing, value if only is None else [])
        for each in folders_in(train)[0] if only is None else [only]:
            if not any(loose(each) == loose(name) for name in value):
                ledger.warn(listing, "", f"does not list {each}, which is there")
    listing = train / "train_images.json"
    lost = "all images in a concept's folder are taken for training"
    value = ledger.read(listing, lost, WARNING)
    if isinstance(value, dict) and only is None:
        _absent(ledger, listing, list(value))
    black = root / "black_512x512.png"
    if not is_file(black):
        ledger.warn(black, "", "no such file: published tools ask questions without an image on this black one")
    elif ImageFinder(ledger, root).inside(black, "", black):
        _image(ledger, black)
    strange = ImageFinder(ledger, root)
    for path in list_images(root / "random_images"):
        if strange.inside(path, "", path):
            _image(ledger, path)


def _absent(ledger: Ledger, listing: Path, names: list[str]) -> None:
    for each in names:
        try:
            there = (ledger.root / "concept" / "train" / concept_name(each)).is_dir()
        except (UserError, OSError) as error:
            ledger.add(listing, "", str(error))
            continue
        same = spelled(ledger.root / "concept" / "train" / each)
        if not there and same.is_dir():
            ledger.warn(listing, each, f"is spelled {same.name} as a folder: write it so")
        elif not there:
            ledger.warn(listing, "", f"lists {each}, which has no folder in concept/train/")


def _images(ledger: Ledger, concept: Concept) -> None:
    """Decode every image of the concept once, and find the same file in both halves."""
    recognition = [item.image for item in concept.recognitions]
    questions = [qa.image for qa in (*concept.conversations, *concept.vqa) if qa.image is not None]
    shared = concept.root / "random_images"
    every = dict.fromkeys((*concept.train_images, *concept.test_images, *concept.negatives, *recognition, *questions))
    for path in every:
        if path.parent != shared:
            _image(ledger, path)
    trained = {_digest(path): path for path in concept.train_images}
    for path in concept.test_images:
        same = trained.get(_digest(path))
        if same is not None:
            ledger.warn(path, "", f"is the same file as the training image {same.name}: the test would be no test")


def _image(ledger: Ledger, path: Path) -> None:
    try:
        width, height = read_image(path).size
    except UserError as error:
        ledger.add(path, "", str(error).removeprefix(f"{path}: "))
        return
    if min(width, height) < SMALLEST_SIDE:
        ledger.add(path, "", f"is {width}×{height} pixels: the shorter side must have {SMALLEST_SIDE} or more")
    elif min(width, height) < SMALL_SIDE:
        ledger.warn(path, "", f"is {width}×{height} pixels: small images teach little, {SMALL_SIDE} or more is better")


def _digest(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return str(path).encode("utf-8", "surrogateescape")
