"""Training: concept stages, UniCTask-GRPO, and the parts they are made of. docs/training.md tells how to use them.

Names are looked up when they are first asked for, so importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_NAMES = {
    "DsogConfig": "..config.training",
    "GrpoConfig": "..config.training",
    "GrpoResult": ".reinforcement",
    "LoraConfig": "..config.training",
    "Policy": ".policy",
    "StageConfig": "..config.training",
    "TrainConfig": "..config.training",
    "as_prompt": ".prompts",
    "as_question": ".prompts",
    "RunResult": ".grpo",
    "load_policy": ".policy",
    "read_metrics": ".metrics",
    "reinforce": ".reinforcement",
    "train_concept_tokens": ".concept_tokens.stages",
    "train_grpo": ".reinforcement",
}

if TYPE_CHECKING:
    from ..config.training import DsogConfig, GrpoConfig, LoraConfig, StageConfig, TrainConfig
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


def __getattr__(name: str) -> object:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
