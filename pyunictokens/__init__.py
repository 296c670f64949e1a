"""pyunictokens: reinforcement-learning post-training of unified masked-generative models.

This module lists the public names and imports each part when it is first asked for, so that ``import pyunictokens``
needs torch and NumPy alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .utils.lazy import lazy

__version__ = "0.1.0"

MASK = -1
"""The value of an image code that is not known yet, in every tensor of codes of this library."""


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

__getattr__, __dir__ = lazy(
    __name__,
    {
        "models.concept_tokens": ("ConceptTokens",),
        "rollout.dsog": ("DsogThreshold",),
        "models.magvit": ("MagvitV2",),
        "rollout.engine": ("RolloutEngine",),
        "models.showo.model": ("Showo",),
        "models.tokenizer": ("TextTokenizer",),
        "runs.pipe": ("pipeline",),
        "models": ("prompting",),
    },
    modules=("data", "evaluate", "models", "ops", "rewards", "rollout", "train"),
)
