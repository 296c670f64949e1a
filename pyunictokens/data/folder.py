"""The door to concept folders in the published UniCTokens / UnifyBench++ layout: list them, load one.

The layout is described in docs/data-format.md. Reading is tolerant, reports every problem of a concept at once, and
changes nothing on disk. It only finds folders: `reader.py` reads their files, `check.py` also decodes pictures.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..utils.errors import UserError
from .concept import FACT_PROMPTS, KINDS, QA, Concept, Recognition, concept_name
from .parse import ERROR, Problem, natural_key
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
    path = Path(root)
    if (path / "concept" / "train").is_dir():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such folder: give the data folder, the one that holds concept/train/")
    for parent in path.absolute().parents:
        if (parent / "concept" / "train").is_dir():
            raise UserError(f"{path}: is inside a data folder: give {parent} instead")
    raise UserError(f"{path}: holds no concept/train/ folder: see docs/data-format.md, or make one with `data new`")


def list_concepts(root: str | os.PathLike[str]) -> list[str]:
    """Names of the concepts under `root`/concept/train, in natural order. Raises UserError where there is none."""
    folders = [path.name for path in (data_root(root) / "concept" / "train").iterdir() if path.is_dir()]
    return sorted((name for name in folders if not name.startswith(".")), key=lambda name: (natural_key(name), name))


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
    if not (path / "concept" / "train" / name).is_dir():
        there = ", ".join(list_concepts(path)[:10]) or "none"
        raise UserError(f"concept {name!r}: no folder {path / 'concept' / 'train' / name}; concepts there: {there}")
    reader = ConceptReader(Concept(name=name, root=path))
    reader.read()
    return reader.concept, reader.ledger.problems
