"""Folders of benchmarks as subjects: UnifyBench and UnifyBench++, Yo'LLaVA, MC-LLaVA, DreamBench. One file a layout.

`open_suite` takes ``LAYOUT:FOLDER`` (or a folder alone, which is UnifyBench++) and gives the subjects
with the tables they belong to.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...utils.errors import UserError
from ..protocol import OURS, SYNC_R1, BenchProtocol
from ..tasks import Subject

LAYOUTS = {"unify": "unify", "yollava": "yollava", "mcllava": "mcllava", "dreambench": "dreambench"}
"""Layouts by name, and the module that reads each: ``names(root)`` and ``read(root, name)``."""


@dataclass(frozen=True)
class Suite:
    """Concepts of one folder, and the layout they come in (which decides the table's columns)."""

    layout: str
    root: Path
    names: tuple[str, ...]
    protocol: BenchProtocol = OURS

    def subject(self, name: str) -> Subject:
        """What is asked about concept `name`. Raises UserError where its folder cannot be used."""
        module = "sync_r1" if self.protocol is SYNC_R1 else LAYOUTS[self.layout]
        return importlib.import_module(f".{module}", __name__).read(self.root, name)


def open_suite(given: str, names: Sequence[str] = (), protocol: BenchProtocol = OURS) -> Suite:
    """The suite ``LAYOUT:FOLDER`` with the concepts `names` (all when none are named), as `protocol` asks it.

    Raises UserError for an unknown layout, a folder of another shape, a concept that is not there, or a protocol that
    does not know the layout.
    """
    layout, colon, folder = given.partition(":")
    if not colon or layout not in LAYOUTS:
        if colon and not Path(given).exists() and layout.isalpha() and len(layout) > 1:
            raise UserError(f"{given!r}: unknown layout {layout!r}: must be one of {', '.join(LAYOUTS)}")
        layout, folder = "unify", given
    if protocol is not OURS and layout != "unify":
        raise UserError(f"protocol={protocol.name}: is of UnifyBench++ folders, {given} has the layout {layout}")
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    there = importlib.import_module(f".{LAYOUTS[layout]}", __name__).names(root)
    missing = [name for name in names if name not in there]
    if missing:
        raise UserError(f"{root}: no concept {missing[0]!r}; there are {', '.join(there[:10])}")
    return Suite(layout, root, tuple(names) or tuple(there), protocol)
