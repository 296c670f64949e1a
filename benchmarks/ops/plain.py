"""The operations in plain PyTorch, as one writes them first: the eager peer, in float64 the truth of every check.

Every function takes tensors in any float dtype. A head is applied in the dtype of its inputs, softmax and loss are
float32 (float64 for float64), as in the operations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import pyunictokens as uct

from .cases import ALPHA, BETA, CLIP

STEP_TEMPERATURE = 1.0
QK_EPS = 1e-5


def wide(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def guided(hidden: Tensor, uncond: Tensor | None, scale: float) -> Tensor:
    """(1+s)·hidden − s·uncond, summed in float32, in the dtype of the head."""
    if uncond is None or not scale:
        return hidden
    kind = wide(hidden.dtype)
    return ((1.0 + scale) * hidden.to(kind) - scale * uncond.to(kind)).to(hidden.dtype)


def selected_logprob(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    """log_softmax(W·h + b)[target]."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return torch.log_softmax(logits.to(wide(logits.dtype)), -1).gather(-1, target[..., None])[..., 0]


def grpo_loss(logp: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor | None = None) -> Tensor:
    """The clipped-ratio loss with k3 penalty; the constants are those of the cases."""
    advantage = advantages.reshape(-1, *[1] * (logp.dim() - 1))
    ratio = (logp - old).exp()
    surrogate = torch.min(ratio * advantage, ratio.clamp(1.0 - CLIP, 1.0 + CLIP) * advantage)
    gap = ref - logp
    tokens = ALPHA * (surrogate - BETA * (gap.exp() - gap - 1.0))
    if mask is not None:
        tokens = tokens * mask
    return -tokens.sum() / logp.shape[0]


def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Layer norm over each head of q and k, then its first entries turned by position."""

    def turned(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, QK_EPS)
        moved, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        first, second = moved.chunk(2, dim=-1)
        return torch.cat([moved * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)

    return turned(q, q_weight, q_bias), turned(k, k_weight, k_bias)


def maskgit_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old: Tensor,
    ref: Tensor,
    advantages: Tensor,
    uncond: Tensor | None = None,
    scale: float = 0.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The two above; tokens outside the mask are computed and multiplied by 0."""
    return grpo_loss(selected_logprob(guided(hidden, uncond, scale), weight, target, bias), old, ref, advantages, mask)


def gumbel(like: Tensor) -> Tensor:
    """Standard Gumbel noise shaped like `like`."""
    tiny = torch.finfo(torch.float32).tiny
    return -torch.log((-torch.log(torch.rand_like(like).clamp_min_(tiny))).clamp_min_(tiny))


def maskgit_step(
    logits: Tensor,
    codes: Tensor,
    mask_len: Tensor,
    noise: Callable[[Tensor], Tensor] = gumbel,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, chosen, logp, masked): log-softmax, Gumbel noise, argmax, gather, sort. Draws its noise from torch."""
    logp = torch.log_softmax(logits.to(wide(logits.dtype)), -1)
    chosen = torch.where(codes < 0, (logp + noise(logp)).argmax(-1), codes)
    selected = logp.gather(-1, chosen[..., None])[..., 0]
    confidence = torch.where(codes < 0, selected + STEP_TEMPERATURE * noise(selected), torch.inf)
    cut = confidence.sort(-1).values.gather(-1, mask_len[:, None])
    masked = confidence < cut
    return torch.where(masked, uct.MASK, chosen), chosen, selected, masked
