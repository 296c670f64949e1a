"""The toy world: scenes, drawings, sentences, facts, a concept on disk, its small networks and the shipped model.

Names are looked up when they are first asked for, so importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_NAMES = {
    "ToyRewards": "rewards",
    "load_toy": "model",
    "load_toy_rewards": "rewards",
    "toy_folder": "model",
    "write_toy_concept": "concept",
}

if TYPE_CHECKING:
    from .concept import write_toy_concept
    from .model import load_toy, toy_folder
    from .rewards import ToyRewards, load_toy_rewards

__all__ = ["ToyRewards", "load_toy", "load_toy_rewards", "toy_folder", "write_toy_concept"]


def __getattr__(name: str) -> object:
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
