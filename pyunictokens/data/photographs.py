"""Photographs and the embedded toy: the toy knows drawings alone, and every place that could be misread says so."""

from __future__ import annotations

import shlex
from pathlib import Path

from .concept import Concept

TRUTH = "truth.json"
"""In a concept's test folder where the concept is drawn: what each image shows."""


def of_photographs(concept: Concept) -> bool:
    """Whether a concept's images are anything but the toy world's drawings."""
    return not (concept.test_folder / TRUTH).is_file()


def toy_on_photographs(root: str | Path, name: str) -> str:
    """What is said where the embedded toy meets photographs, with the command that does it on real weights."""
    real = shlex.join(["pyunictokens", "train", str(root), name, "--model", "show-o-512", "--plan"])
    return (
        "this is the embedded toy model on photographs: it knows drawings of 64×64 pixels alone, so what it draws and "
        "answers here shows that the commands work and nothing else. On the real Show-o, with what it needs said "
        f"first: {real} (docs/real-weights.md)"
    )
