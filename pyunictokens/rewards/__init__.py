"""Rewards: four experts, their weighted sum, and the batch they score. docs/rewards.md says how to add one.

`load_toy_experts` is looked up when asked for: the toy's networks are needed by the toy alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import Expert, RewardBatch, plain_text
from .ber import Ber
from .der import Der
from .ensemble import PAPER_WEIGHTS, Ensemble, EnsembleScore
from .fer import Fer
from .judge import Judge, JudgeConfig, JudgeExpert, JudgeItem, JudgeScore
from .load import RewardConfig, load_rewards
from .remote import RemoteExperts
from .tier import Tier

if TYPE_CHECKING:
    from .toy import ToyRewards, load_toy_experts

__all__ = [
    "PAPER_WEIGHTS",
    "Ber",
    "Der",
    "Ensemble",
    "EnsembleScore",
    "Expert",
    "Fer",
    "Judge",
    "JudgeConfig",
    "JudgeExpert",
    "JudgeItem",
    "JudgeScore",
    "RemoteExperts",
    "RewardBatch",
    "RewardConfig",
    "Tier",
    "ToyRewards",
    "load_rewards",
    "load_toy_experts",
    "plain_text",
]


def __getattr__(name: str) -> Any:
    if name in {"ToyRewards", "load_toy_experts"}:
        from . import toy

        return getattr(toy, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
