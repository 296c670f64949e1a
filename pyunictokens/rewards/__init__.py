"""Rewards: four experts, their weighted sum, and the batch they score. docs/rewards.md says how to add one."""

from __future__ import annotations

from .base import Expert, RewardBatch, plain_text
from .ensemble import PAPER_WEIGHTS, Ensemble, EnsembleScore
from .experts.ber import Ber
from .experts.der import Der
from .experts.fer import Fer
from .experts.tier import Tier
from .judge import Judge, JudgeConfig, JudgeExpert, JudgeItem, JudgeScore
from .registry import RewardConfig, load_rewards
from .served.client import RemoteExperts

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
    "load_rewards",
    "plain_text",
]
