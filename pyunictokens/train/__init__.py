"""Training: concept stages, UniCTask-GRPO, and the parts they are made of. docs/training.md tells how to use them.

Names are looked up when they are first asked for, so importing this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import lazy

if TYPE_CHECKING:
    from ..config.stages import StageConfig
    from ..config.training import DsogConfig, GrpoConfig, LoraConfig, TrainConfig
    from .concept_tokens.stages import train_concept_tokens
    from .grpo import RunResult
    from .metrics import read_metrics
    from .policy import Policy, load_policy
    from .prompts import as_prompt, as_question
    from .reinforcement import GrpoResult, reinforce, train_grpo

__all__ = [
    "DsogConfig",
    "GrpoConfig",
    "GrpoResult",
    "LoraConfig",
    "Policy",
    "RunResult",
    "StageConfig",
    "TrainConfig",
    "as_prompt",
    "as_question",
    "load_policy",
    "read_metrics",
    "reinforce",
    "train_concept_tokens",
    "train_grpo",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        ".config.stages": ("StageConfig",),
        ".config.training": ("DsogConfig", "GrpoConfig", "LoraConfig", "TrainConfig"),
        "reinforcement": ("GrpoResult", "reinforce", "train_grpo"),
        "policy": ("Policy", "load_policy"),
        "prompts": ("as_prompt", "as_question"),
        "grpo": ("RunResult",),
        "metrics": ("read_metrics",),
        "concept_tokens.stages": ("train_concept_tokens",),
    },
)
