"""The toy world: scenes, drawings, sentences, facts, a concept on disk, its small networks and the shipped model.

Names are looked up when they are first asked for, so importing this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import lazy

if TYPE_CHECKING:
    from .concept import write_toy_concept
    from .model import load_toy, toy_folder
    from .rewards import ToyRewards, load_toy_rewards

__all__ = ["ToyRewards", "load_toy", "load_toy_rewards", "toy_folder", "write_toy_concept"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "rewards": ("ToyRewards", "load_toy_rewards"),
        "model": ("load_toy", "toy_folder"),
        "concept": ("write_toy_concept",),
    },
)
