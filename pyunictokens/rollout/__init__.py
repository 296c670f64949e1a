"""Rollouts: images and answers drawn from a model, with what the update needs to score them again.

`RolloutEngine` is the door. Nothing here knows rewards (beyond a scorer callback) or training.
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
