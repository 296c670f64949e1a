"""The fused operations: log-probs of chosen codes, the GRPO loss over them, one MaskGIT step and its schedules.

Every operation validates, chooses a backend (`backend=None`: the best that can run) and is registered with
torch.library, so it works under torch.compile. `reference.py` is the definition; the other backends are held against
it. This package needs torch and NumPy alone. API page: docs/ops.md.
"""

from __future__ import annotations

from . import philox, reference
from .backends import cpu
from .backends.triton import capture_warmup, set_deterministic
from .grpo import grpo_loss, maskgit_grpo_loss
from .logprob import selected_logprob
from .objectives import lowest_kept, remasked_logprob, sequence_logprob, token_mask, transition_logprob
from .registry import capabilities
from .schedule import mask_len, mask_rate, mask_schedule
from .step import maskgit_step, sample_categorical
from .types import GrpoStats, MaskgitStep

build_info = cpu.build_info

__all__ = [
    "GrpoStats",
    "MaskgitStep",
    "build_info",
    "capabilities",
    "capture_warmup",
    "grpo_loss",
    "lowest_kept",
    "mask_len",
    "mask_rate",
    "mask_schedule",
    "maskgit_grpo_loss",
    "maskgit_step",
    "philox",
    "reference",
    "remasked_logprob",
    "sample_categorical",
    "selected_logprob",
    "sequence_logprob",
    "set_deterministic",
    "token_mask",
    "transition_logprob",
]
