"""The two records that operations return, and the types of what stands between an operation and its implementations.

Records hold tensors on the device of the inputs and never force a transfer.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeAlias

from torch import Tensor

Argument: TypeAlias = Any
"""One argument of a registered operation: a tensor, a number or a name, as its schema says."""


class Context(Protocol):
    """What torch.autograd keeps between an operation and its gradient."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    settings: tuple[float, float]
    """Guidance scale and temperature."""
    backend: str
    eps: float
    gradient: bool
    """Whether the forward pass formed one."""

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


class Implementation(Protocol):
    """A backend's function for an operation: the arguments of its schema, without the backend's name."""

    def __call__(self, *arguments: Argument) -> tuple[Tensor, ...]: ...


class MaskgitStep(NamedTuple):
    """What one MaskGIT step decided; every field is [B, N]."""

    codes: Tensor
    """int64: `chosen`, with the least confident positions put back to MASK."""
    chosen: Tensor
    """int64: the sampled code where it was unknown, else the code that was given."""
    logp: Tensor
    """float32 (float64 for float64 logits): log p(chosen) under softmax(logits), for known positions too."""
    masked: Tensor
    """bool: the positions put back to MASK."""


class GrpoStats(NamedTuple):
    """What an update looked like, over the tokens that count: 0-d tensors on the inputs' device, 0 if none counts."""

    clip_fraction: Tensor
    """Share of tokens without gradient by clipping: D > 1 + clip_high and A > 0, or D < 1 − clip_low and A < 0."""
    kl: Tensor
    """Mean of the k3 estimate of KL(policy ‖ reference); 0 without a reference."""
    ratio_max: Tensor
    """Largest D = exp(logp − old_logp)."""
    ratio_mean: Tensor
    """Mean of D."""
    entropy: Tensor | None
    """Mean entropy in nats where the operation sees the distributions (`maskgit_grpo_loss`), else None."""
