"""Definitions in plain float64 torch that hold every [..., K] tensor: what the tests compare the operations with."""

from __future__ import annotations

import torch
from torch import Tensor


def logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, uncond: Tensor | None, scale: float, temperature: float
) -> Tensor:
    """(W·h + b)/τ with guidance on the logits themselves, not on the hidden states."""
    both = torch.nn.functional.linear(hidden, weight, bias)
    if uncond is not None and scale:
        both = (1 + scale) * both - scale * torch.nn.functional.linear(uncond, weight, bias)
    return both / temperature


def logprob(target: Tensor, scores: Tensor) -> Tensor:
    """log_softmax at the target."""
    return torch.log_softmax(scores, -1).gather(-1, target[..., None])[..., 0]


def loss(
    logp: Tensor,
    old: Tensor,
    ref: Tensor | None,
    advantages: Tensor,
    alpha: Tensor | float,
    clip_low: float,
    clip_high: float,
    beta: float,
    mask: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective token by token, in the order of the equation; and the statistics."""
    a = advantages.reshape(-1, *[1] * (logp.dim() - 1))
    ratio = (logp - old).exp()
    surrogate = torch.min(ratio * a, ratio.clamp(1 - clip_low, 1 + clip_high) * a)
    k3 = torch.zeros_like(logp) if ref is None else (ref - logp).exp() - (ref - logp) - 1
    keep = torch.ones_like(logp) if mask is None else mask.expand(logp.shape).to(logp.dtype)
    total = -(keep * alpha * (surrogate - beta * k3)).sum() / logp.shape[0]
    cut = ((a > 0) & (ratio > 1 + clip_high)) | ((a < 0) & (ratio < 1 - clip_low))
    count = keep.sum().clamp_min(1)
    statistics = {
        "clip_fraction": (keep * cut).sum() / count,
        "kl": (keep * k3).sum() / count,
        "ratio_max": (keep * ratio).max(),
        "ratio_mean": (keep * ratio).sum() / count,
    }
    return total, {key: value.detach() for key, value in statistics.items()}


def relative(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖ in float64.

    Where `wanted` lies below the smallest normal number of `found`'s dtype (6e-5 in float16), the error is relative to
    that number: what is stored there has a fixed spacing, not a relative one."""
    smallest = max(torch.finfo(found.dtype).tiny * found.numel() ** 0.5, 1e-30)
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(smallest)).item()
