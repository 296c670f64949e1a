"""Rewards: reward models, their weighted sum, and the batch they score. docs/rewards.md says how to add one."""

from __future__ import annotations

import warnings

from .base import EnsembleScore, InvalidScore, PreviewJudge, RewardBatch, RewardModel, Rewards, plain_text
from .ensemble import PAPER_WEIGHTS, Ensemble, as_rewards
from .experts.ber import Ber
from .experts.der import Der
from .experts.fer import Fer
from .experts.tier import Tier
from .functions import RewardFunction
from .judge import Judge, JudgeConfig, JudgeItem, JudgeReward, JudgeScore
from .load import RewardConfig, load_rewards
from .registry import register
from .served.client import RemoteRewards

_FORMER = {"Expert": RewardModel, "JudgeExpert": JudgeReward, "RemoteExperts": RemoteRewards}

__all__ = [
    "PAPER_WEIGHTS",
    "Ber",
    "Der",
    "Ensemble",
    "EnsembleScore",
    "Fer",
    "InvalidScore",
    "Judge",
    "JudgeConfig",
    "JudgeItem",
    "JudgeReward",
    "JudgeScore",
    "PreviewJudge",
    "RemoteRewards",
    "RewardBatch",
    "RewardConfig",
    "RewardFunction",
    "RewardModel",
    "Rewards",
    "Tier",
    "as_rewards",
    "load_rewards",
    "plain_text",
    "register",
]


def __getattr__(name: str) -> type:
    """Names of the release before, until the next one."""
    if name not in _FORMER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"rewards.{name} is now rewards.{_FORMER[name].__name__}", DeprecationWarning, stacklevel=2)
    return _FORMER[name]
