"""pyunictokens: reinforcement-learning post-training of unified masked-generative models.

This module is the one door of the library. It knows the public names and where they live, and imports each part when it
is first asked for, so that ``import pyunictokens`` needs torch alone. It does not know how any part works.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

MASK = -1
"""The value of an image code that is not known yet, in every tensor of codes of this library."""

_PARTS = ("data", "evaluate", "models", "ops", "rewards", "rollout", "train")
_NAMES = {
    "ConceptTokens": "models.concept_tokens",
    "DsogThreshold": "rollout.dsog",
    "MagvitV2": "models.magvit",
    "RolloutEngine": "rollout.engine",
    "Showo": "models.showo.model",
    "TextTokenizer": "models.tokenizer",
    "pipeline": "runs.pipe",
    "prompting": "models",
}

if TYPE_CHECKING:
    from . import data, evaluate, models, ops, rewards, rollout, train
    from .models.concept_tokens import ConceptTokens
    from .models.magvit import MagvitV2
    from .models.showo import prompting
    from .models.showo.model import Showo
    from .models.tokenizer import TextTokenizer
    from .rollout.dsog import DsogThreshold
    from .rollout.engine import RolloutEngine
    from .runs.pipe import pipeline

__all__ = [
    "MASK",
    "ConceptTokens",
    "DsogThreshold",
    "MagvitV2",
    "RolloutEngine",
    "Showo",
    "TextTokenizer",
    "__version__",
    "data",
    "evaluate",
    "models",
    "ops",
    "pipeline",
    "prompting",
    "rewards",
    "rollout",
    "train",
]


def __getattr__(name: str) -> object:
    if name in _PARTS:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "prompting":
        return importlib.import_module(f"{__name__}.models.showo.prompting")
    if name in _NAMES:
        found: object = getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
