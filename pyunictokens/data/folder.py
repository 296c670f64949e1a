"""Concept folders in the published UniCTokens / UnifyBench++ layout: list them, load one.

The layout is described in docs/data-format.md. Reading is tolerant, reports every problem of a concept at once, and
changes nothing on disk. It only finds folders: `reader.py` reads their files, `check.py` also decodes images.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from ..utils.errors import UserError
from ..utils.spelling import loose, spelled
from .concept import FACT_PROMPTS, KINDS, QA, Concept, Recognition, concept_name
from .image_files import folders_in
from .install import interrupted
from .parse import ERROR, Problem
from .reader import ConceptReader

__all__ = [
    "FACT_PROMPTS",
    "KINDS",
    "QA",
    "Concept",
    "Problem",
    "Recognition",
    "concept_name",
    "data_root",
    "list_concepts",
    "load_concept",
    "read_concept",
]


def data_root(root: str | os.PathLike[str]) -> Path:
    """`root` as the path of a data folder, or UserError saying what was expected and what is there."""
    path = Path(root).expanduser()
    if (path / "concept" / "train").is_dir():
        return path
    other = spelled(path / "concept" / "train")
    if other.is_dir():
        raise UserError(f"{other}: must be spelled concept/train: rename it, not every system takes the two for one")
    if not path.is_dir():
        raise UserError(f"{path}: no such folder: give the data folder, the one that holds concept/train/")
    for parent in path.absolute().parents:
        if (parent / "concept" / "train").is_dir():
            raise UserError(f"{path}: is inside a data folder: give {parent} instead")
    raise UserError(f"{path}: holds no concept/train/ folder: see docs/data-format.md, or make one with `data new`")


def list_concepts(root: str | os.PathLike[str]) -> list[str]:
    """Names of the concepts under `root`/concept/train, in natural order, without what systems and tools leave there.

    Raises UserError where there is no such folder.
    """
    return concept_folders(data_root(root) / "concept" / "train")


def concept_folders(parent: Path) -> list[str]:
    """Names of the sub-folders of `parent` that can name a concept, in natural order; others get a warning."""
    found = []
    for name in folders_in(parent)[0]:
        try:
            found.append(concept_name(name))
        except UserError as error:
            warnings.warn(f"{parent}: {error}: left out", stacklevel=3)
    return found


def load_concept(root: str | os.PathLike[str], name: str) -> Concept:
    """Read concept `name` of the data folder `root`. Raises one UserError that lists every error; warnings pass."""
    concept, problems = read_concept(root, name)
    errors = [problem for problem in problems if problem.severity == ERROR]
    if errors:
        lines = "\n".join(f"  {problem}" for problem in errors)
        plural = "" if len(errors) == 1 else "s"
        raise UserError(f"concept {name!r} in {concept.root} has {len(errors)} problem{plural}:\n{lines}")
    return concept


def read_concept(root: str | os.PathLike[str], name: str) -> tuple[Concept, list[Problem]]:
    """What can be understood of a concept, and all its problems. Raises UserError for a bad name or no such folder."""
    name = concept_name(name)
    path = data_root(root)
    if any(loose(each) == loose(name) for each in interrupted(path)):
        raise UserError(
            f"concept {name!r} in {path}: `data new` is putting it there, or was killed while it did, and its halves "
            "may be of two ages: wait for it, or run `data new … --force` again"
        )
    present = folders_in(path / "concept" / "train")[0]
    fits = [name] if name in present else [each for each in present if loose(each) == loose(name)]
    if len(fits) != 1:
        there = ", ".join(present[:10]) or "none"
        raise UserError(f"concept {name!r}: no folder {path / 'concept' / 'train' / name}; concepts there: {there}")
    reader = ConceptReader(Concept(name=concept_name(fits[0]), root=path))
    reader.read()
    return reader.concept, reader.ledger.problems
