"""Other objectives over the same operations: which tokens count, and what a ratio is a ratio of.

`grpo_loss` takes log-probabilities of any shape [R, ...] and forms one ratio per element. So an objective is a
differentiable reduction of per-token log-probabilities, applied to the policy, the old policy and the reference alike:

    tokens       logp as they are                   [R, T, N]    one ratio per token (GRPO)
    sequences    sequence_logprob(logp, mask)       [R]          one per rollout (GSPO, arXiv 2507.18071)
    transitions  transition_logprob(logp, inputs)   [R, T]       one per timestep (Mask-GRPO, arXiv 2510.13418)

`token_mask` says which tokens count in the first two. `remasked_logprob` needs whole distributions and takes the head.

Shape suffixes: R rollouts, T timesteps, N codes of an image, M tokens (all leading dimensions as one), m tokens of a
chunk, D width, K codebook.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..utils.errors import UserError
from . import validate as check
from .logprob import head_arguments
from .reference import CHUNK_ELEMENTS, working_dtype
from .transforms import autocast_inputs, no_autocast

SCOPES = ("all", "masked", "newly_unmasked")
_MASK = -1


def token_mask(inputs: Tensor, scope: str) -> Tensor | None:
    """Which image tokens count: "all" (None), "masked" before a step, or "newly_unmasked" by it.

    Args:
        inputs: integer [R, T, N]: the codes before each step, −1 where unknown. After the last step all are known.

    Returns:
        bool [R, T, N] for the `mask` of the losses, or None for "all".

    Raises:
        UserError: an unknown scope, or `inputs` is no integer tensor [R, T, N].
    """
    if scope not in SCOPES:
        raise UserError(f"scope={scope!r}: must be one of {', '.join(SCOPES)}")
    if scope == "all":
        return None
    masked, still = _masked_and_still(inputs)
    return masked if scope == "masked" else masked & ~still


def sequence_logprob(logp: Tensor, mask: Tensor | None = None) -> Tensor:
    """Length-normalised log-probability of each rollout: the mean over its tokens that count (GSPO).

    exp(sequence_logprob(new) − sequence_logprob(old)) is GSPO's ratio s = (π(y)/π_old(y))^(1/|y|). Hand the reductions
    of the policy and the old policy (and the reference) to `grpo_loss`, with advantages [R] and alpha = 1. GSPO's
    ratios lie far closer to 1 than those of tokens: the paper clips at 3e-4 and 4e-4.

    Args:
        logp: [R, ...]; mask: bool or integer that broadcasts to it. Masked tokens have no effect, even if they are NaN.

    Returns:
        [R] float32 (float64 for float64 logp); 0 for a rollout without a token that counts.

    Raises:
        UserError: a wrong shape, dtype or device.
    """
    check.tensor("logp", logp, check.FLOATS)
    if logp.dim() < 1:
        raise UserError("logp: a 0-d tensor, must be [R, ...]")
    flat = logp.reshape(len(logp), -1).to(working_dtype(logp))
    if mask is None:
        return flat.sum(-1) / max(flat.shape[-1], 1)
    keep = _bool_mask("mask", mask, logp).reshape(flat.shape)
    return torch.where(keep, flat, 0.0).sum(-1) / keep.sum(-1).clamp_min(1)


def transition_logprob(logp: Tensor, inputs: Tensor, remasked_logp: Tensor | None = None) -> Tensor:
    """Log-probability of each MaskGIT step as one action: the sum over the codes that the step made known (Mask-GRPO).

    Mask-GRPO gives two probabilities of a transition. The smaller one, used here without `remasked_logp`, is
    Π p(code) over the newly known positions. The full one also asks that the others stayed masked: it multiplies, over
    the positions that are masked before and after, the probability of having drawn a code that is less probable than
    the least probable one that was kept (`remasked_logprob`). Codes known before the step have no part in either.

    Hand the reductions of the policy and the old policy to `grpo_loss`; alpha = 1/T is the published normalisation.

    Args:
        logp: [R, T, N] of the code chosen at each position.
        inputs: integer [R, T, N], the codes before each step, −1 where unknown.
        remasked_logp: [R, T, N], used where a position is masked before and after the step.

    Returns:
        [R, T] float32 (float64 for float64 logp).

    Raises:
        UserError: a wrong shape, dtype or device.
    """
    check.tensor("logp", logp, check.FLOATS)
    masked, still = _masked_and_still(inputs)
    check.shape("logp", logp, inputs.shape, "the shape of inputs")
    dtype = working_dtype(logp)
    result = torch.where(masked & ~still, logp.to(dtype), 0.0).sum(-1)
    if remasked_logp is not None:
        check.tensor("remasked_logp", remasked_logp, check.FLOATS, logp)
        check.shape("remasked_logp", remasked_logp, inputs.shape, "the shape of inputs")
        result = result + torch.where(masked & still, remasked_logp.to(dtype), 0.0).sum(-1)
    return result


def lowest_kept(old_logp: Tensor, inputs: Tensor) -> Tensor:
    """The least log-probability among the codes that each step made known, under the old policy.

    The threshold of `remasked_logprob`. A constant of the objective: no gradient.

    Args:
        old_logp: [R, T, N] of the code chosen at each position.
        inputs: integer [R, T, N], the codes before each step, −1 where unknown.

    Returns:
        [R, T] float32 (float64 for float64 old_logp); 0 where a step made nothing known, so that every code lies below.

    Raises:
        UserError: a wrong shape, dtype or device.
    """
    check.tensor("old_logp", old_logp, check.FLOATS)
    masked, still = _masked_and_still(inputs)
    check.shape("old_logp", old_logp, inputs.shape, "the shape of inputs")
    return torch.where(masked & ~still, old_logp.detach().to(working_dtype(old_logp)), 0.0).amin(-1)


def remasked_logprob(
    hidden: Tensor,
    weight: Tensor,
    threshold: Tensor,
    inputs: Tensor,
    bias: Tensor | None = None,
    *,
    hidden_uncond: Tensor | None = None,
    guidance_scale: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """log Σ p_k over the codes k with log p_k < threshold, at the positions masked before and after a step; else 0.

    The second factor of Mask-GRPO's full transition probability. Plain torch in chunks whose logits are formed anew in
    the backward pass: memory as `selected_logprob` of the reference backend. Where no code is below, the logarithm is
    that of the smallest positive number and has no gradient.

    Args:
        hidden: [R, T, N, D]; weight [K, D]; bias [K] or None; guidance and temperature as in `selected_logprob`.
        threshold: [R, T], of `lowest_kept`.
        inputs: integer [R, T, N], the codes before each step, −1 where unknown.

    Returns:
        [R, T, N] float32 (float64 for float64 hidden), differentiable in hidden, hidden_uncond, weight and bias.

    Raises:
        UserError: a wrong shape, dtype, device or value.
    """
    masked, still = _masked_and_still(inputs)
    _, hidden_uncond, guidance_scale, temperature = head_arguments(
        hidden, weight, inputs.long(), bias, hidden_uncond, guidance_scale, temperature
    )
    check.tensor("threshold", threshold, check.FLOATS, hidden)
    check.shape("threshold", threshold, inputs.shape[:2], "[R, T]")
    hidden, hidden_uncond, weight = autocast_inputs(hidden, hidden_uncond, weight)
    dtype = working_dtype(hidden)
    place = (masked & still).flatten().nonzero()[:, 0]
    hidden_MD = hidden.flatten(0, 2)
    uncond_MD = None if hidden_uncond is None else hidden_uncond.flatten(0, 2)
    limit_M = threshold.detach().to(dtype)[..., None].expand(inputs.shape).flatten()
    tiny = torch.finfo(dtype).tiny

    def piece(rows: Tensor) -> Tensor:
        guided_mD = hidden_MD[rows].to(dtype)
        if uncond_MD is not None:
            guided_mD = (1.0 + guidance_scale) * guided_mD - guidance_scale * uncond_MD[rows].to(dtype)
        bias_K = None if bias is None else bias.to(dtype)
        logp_mK = torch.log_softmax(torch.nn.functional.linear(guided_mD, weight.to(dtype), bias_K) / temperature, -1)
        below = logp_mK < limit_M[rows, None]
        return torch.where(below, logp_mK.exp(), 0.0).sum(-1).clamp_min(tiny).log()

    with no_autocast(hidden):
        chunks = place.split(max(1, CHUNK_ELEMENTS // len(weight)))
        found = torch.cat([checkpoint(piece, rows, use_reentrant=False, preserve_rng_state=False) for rows in chunks])
    return hidden.new_zeros(inputs.numel(), dtype=dtype).index_put((place,), found).view(inputs.shape)


def _masked_and_still(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Which positions are masked before each step, and which still are after it; after the last one none is."""
    check.tensor("inputs", inputs, check.INTEGERS)
    if inputs.dim() != 3:
        raise UserError(f"inputs: shape {tuple(inputs.shape)}, must be [R, T, N], the codes before each step")
    masked = inputs == _MASK
    return masked, torch.cat([masked[:, 1:], torch.zeros_like(masked[:, :1])], 1)


def _bool_mask(name: str, mask: Tensor, like: Tensor) -> Tensor:
    """`mask` as bool in the shape of `like`, checked as the losses check it."""
    check.tensor(name, mask, (torch.bool, *check.INTEGERS), like)
    check.broadcastable(name, mask, like.shape, "the shape of logp")
    return (mask if mask.dtype == torch.bool else mask != 0).expand(like.shape)
