"""Rollouts: images and answers drawn from a model, with what the update needs to score them again.

Start with `RolloutEngine`. Nothing here imports rewards or training: previews are scored by a callback.
"""

from .dsog import Dsog, DsogThreshold
from .engine import RolloutEngine
from .types import DsogReport, ImageRollout, RolloutInterrupted, TextRollout

__all__ = [
    "Dsog",
    "DsogReport",
    "DsogThreshold",
    "ImageRollout",
    "RolloutEngine",
    "RolloutInterrupted",
    "TextRollout",
]
