"""The public `grpo_loss` and `maskgit_grpo_loss`: validate, choose a backend, register with torch.library.

Equation (UniCTokens-R1's clipped objective, normalised as in Dr. GRPO: no division by length or by the group's std):

    loss = −1/R Σ_i Σ_j mask·alpha·( min(D·A, clip(D, 1−clip_low, 1+clip_high)·A) − beta·k3 )
    D = exp(logp − old_logp),   k3 = exp(ref_logp − logp) − (ref_logp − logp) − 1

Both operations form their gradients in the forward pass, where they are wanted; backward multiplies them by the
gradient of the loss.
Gradients go to the policy only: old_logp, ref_logp, advantages and alpha are constants.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..utils.errors import UserError
from . import validate as check
from .logprob import NEEDS_ALL, checked_head, fake_gradients, head_arguments, needed, placed
from .reference import working_dtype
from .registry import choose, entry
from .transforms import autocast_inputs, no_autocast, refuse_transforms
from .types import Argument, Context, GrpoStats


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    advantages: Tensor,
    *,
    alpha: Tensor | float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.01,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, GrpoStats]:
    """The clipped-ratio GRPO loss with k3 penalty over per-token log-probabilities (equation at the top of this file).

    Args:
        logp: [R, ...] of the policy, any float dtype; computed in float32 (float64 if it is). The only differentiable
            input.
        old_logp, ref_logp: shaped like logp; ref_logp may be None where beta is 0.
        advantages: [R], one per rollout.
        alpha: number, or tensor that broadcasts to logp: weight of each token.
        clip_low, clip_high: ≥ 0; clip_low ≤ 1.
        beta: ≥ 0, weight of the KL penalty.
        mask: bool or integer tensor that broadcasts to logp; tokens where it is 0 have no effect, even if they are NaN.
        backend: None (the best that can run), "reference", "cpu" or "triton".

    Returns:
        (loss 0-d, GrpoStats over the tokens that count; its entropy is None). Nothing waits for the device.

    Raises:
        UserError: a wrong shape, dtype, device or value.
    """
    refuse_transforms("grpo_loss")
    check.tensor("logp", logp, check.FLOATS)
    alpha, mask = _loss_arguments(
        logp.shape, "the shape of logp", logp, old_logp, ref_logp, advantages, alpha, clip_low, clip_high, beta, mask
    )
    backend = choose("grpo_loss", backend, logp.device, logp.dtype)
    loss, statistics, _ = _grpo_loss(
        logp,
        old_logp.detach(),
        None if ref_logp is None else ref_logp.detach(),
        advantages.detach(),
        alpha.detach(),
        mask,
        float(clip_low),
        float(clip_high),
        float(beta),
        torch.is_grad_enabled() and logp.requires_grad,
        backend,
    )
    return loss, _stats(statistics)


def maskgit_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    advantages: Tensor,
    bias: Tensor | None = None,
    *,
    hidden_uncond: Tensor | None = None,
    guidance_scale: float = 0.0,
    temperature: float = 1.0,
    alpha: Tensor | float = 0.6,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.01,
    mask: Tensor | None = None,
    with_entropy: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, GrpoStats]:
    """`selected_logprob` and `grpo_loss` in one operation over all timesteps of MaskGIT rollouts.

    Gradients are formed while the logits of a chunk of tokens are at hand, so the head is applied once and nothing of
    size [R·T·N, K] exists, forward or backward. Tokens where the mask is 0 cost no matrix work. Besides the inputs it
    holds the gradients of hidden and hidden_uncond (their size) and of the weight in float32. Under torch.autocast
    hidden, hidden_uncond and weight are cast as `nn.Linear` casts them; the loss stays float32.

    Args:
        hidden: [R, T, N, D] (any [R, ..., D]); weight [K, D]; target [R, T, N] of any integer type; bias [K] or None.
        old_logp, ref_logp: [R, T, N]; ref_logp may be None where beta is 0.
        advantages: [R].
        hidden_uncond, guidance_scale, temperature: as in `selected_logprob`.
        alpha, clip_low, clip_high, beta, mask: as in `grpo_loss`, against [R, T, N].
        with_entropy: whether the statistics hold the mean entropy, which costs one more pass over each chunk of logits.
        backend: None (the best that can run), "reference", "cpu" or "triton".

    Returns:
        (loss 0-d, differentiable in hidden, hidden_uncond, weight and bias; logp [R, T, N] detached, 0 where the mask
        is 0; GrpoStats, its entropy None without `with_entropy`).

    Raises:
        UserError: a wrong shape, dtype, device or value.
    """
    refuse_transforms("maskgit_grpo_loss")
    target, hidden_uncond, guidance_scale, temperature = head_arguments(
        hidden, weight, target, bias, hidden_uncond, guidance_scale, temperature
    )
    if target.dim() < 1:
        raise UserError("target: a 0-d tensor, must be [R, T, N] (or any [R, ...])")
    alpha, mask = _loss_arguments(
        target.shape,
        "the shape of target",
        hidden,
        old_logp,
        ref_logp,
        advantages,
        alpha,
        clip_low,
        clip_high,
        beta,
        mask,
    )
    hidden, hidden_uncond, weight = autocast_inputs(hidden, hidden_uncond, weight)
    backend = choose("maskgit_grpo_loss", backend, hidden.device, hidden.dtype)
    loss, logp, statistics, *_ = _maskgit_grpo_loss(
        hidden,
        weight,
        target,
        old_logp.detach(),
        None if ref_logp is None else ref_logp.detach(),
        advantages.detach(),
        alpha.detach(),
        bias,
        hidden_uncond,
        mask,
        guidance_scale,
        temperature,
        float(clip_low),
        float(clip_high),
        float(beta),
        needed(hidden, hidden_uncond, weight, bias),
        bool(with_entropy),
        backend,
    )
    return loss, logp.detach(), _stats(statistics, with_entropy)


def _stats(statistics: Tensor, with_entropy: bool = False) -> GrpoStats:
    """The vector of four or five numbers that the operations return, as the public record."""
    clip_fraction, kl, ratio_max, ratio_mean, *entropy = statistics.detach().unbind()
    return GrpoStats(clip_fraction, kl, ratio_max, ratio_mean, entropy[0] if with_entropy else None)


def _loss_arguments(
    shape: torch.Size,
    shape_name: str,
    like: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    advantages: Tensor,
    alpha: Tensor | float,
    clip_low: float,
    clip_high: float,
    beta: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Check what both losses take. Returns alpha as a tensor and the mask as bool."""
    if len(shape) < 1 or shape[0] < 1:
        raise UserError(f"{shape_name} is {tuple(shape)}: needs a leading dimension R ≥ 1, the rollouts")
    check.tensor("old_logp", old_logp, check.FLOATS, like)
    check.shape("old_logp", old_logp, shape, shape_name)
    check.tensor("advantages", advantages, check.FLOATS, like)
    check.shape("advantages", advantages, shape[:1], "[R], one per rollout")
    check.number("clip_low", clip_low, 0.0)
    check.number("clip_high", clip_high, 0.0)
    if clip_low > 1.0:
        raise UserError(f"clip_low={clip_low}: must be ≤ 1 (a ratio is never below 0)")
    check.number("beta", beta, 0.0, hint="0 turns the KL penalty off")
    if ref_logp is not None:
        check.tensor("ref_logp", ref_logp, check.FLOATS, like)
        check.shape("ref_logp", ref_logp, shape, shape_name)
    elif beta != 0.0:
        raise UserError(f"beta={beta}: needs ref_logp (or beta=0)")
    if isinstance(alpha, Tensor):
        check.tensor("alpha", alpha, check.FLOATS, like)
        check.broadcastable("alpha", alpha, shape, shape_name)
    else:
        alpha = torch.full((), check.number("alpha", alpha, 0.0), dtype=working_dtype(like), device=like.device)
    if mask is not None:
        if isinstance(mask, Tensor) and mask.dtype in check.FLOATS:
            raise UserError(f"mask: dtype {mask.dtype}: must be bool or integer; use alpha for weights")
        check.tensor("mask", mask, (torch.bool, *check.INTEGERS), like)
        check.broadcastable("mask", mask, shape, shape_name)
        mask = mask if mask.dtype == torch.bool else mask != 0
    return alpha, mask


_LOSS = "Tensor old_logp, Tensor? ref_logp, Tensor advantages, Tensor alpha"
_CLIP = "float clip_low, float clip_high, float beta"
_SMALL = f"Tensor logp, {_LOSS}, Tensor? mask, {_CLIP}, bool gradient, str backend"
_FUSED = (
    f"Tensor hidden, Tensor weight, Tensor target, {_LOSS}, Tensor? bias, Tensor? hidden_uncond, Tensor? mask, "
    f"float guidance_scale, float temperature, {_CLIP}, int needs, bool entropy, str backend"
)
_BIAS, _UNCOND = 7, 8
"""Places of two inputs in _FUSED."""


@torch.library.custom_op("pyunictokens::grpo_loss", mutates_args=(), schema=f"({_SMALL}) -> (Tensor, Tensor, Tensor)")
def _grpo_loss(*arguments: Argument) -> tuple[Tensor, ...]:
    logp, old_logp, ref_logp, advantages, alpha, mask, clip_low, clip_high, beta, gradient, backend = arguments
    check.tensor("logp", logp, check.FLOATS)
    alpha, mask = _loss_arguments(
        logp.shape, "the shape of logp", logp, old_logp, ref_logp, advantages, alpha, clip_low, clip_high, beta, mask
    )
    backend = choose("grpo_loss", backend, logp.device, logp.dtype)
    with no_autocast(logp):
        return entry("grpo_loss", backend).forward(
            logp, old_logp, ref_logp, advantages, alpha, mask, clip_low, clip_high, beta, gradient
        )


@_grpo_loss.register_fake
def _(logp: Tensor, *rest: Argument) -> tuple[Tensor, Tensor, Tensor]:
    dtype, wanted = working_dtype(logp), rest[-2]
    slopes = torch.empty_like(logp) if wanted else logp.new_empty(0)
    return logp.new_empty((), dtype=dtype), logp.new_empty(4, dtype=dtype), slopes


def _grpo_setup(ctx: Context, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # of the outputs only the loss has a gradient; for the others zeros would be made
    ctx.gradient = bool(inputs[-2])
    ctx.save_for_backward(output[2])


@once_differentiable
def _grpo_backward(ctx: Context, grad_loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    (d_logp,) = ctx.saved_tensors
    rest = [None] * (len(ctx.needs_input_grad) - 1)
    if not ctx.gradient:
        raise UserError("grpo_loss: was called with gradient=False, so there is none; pass True")
    return None if grad_loss is None else grad_loss.to(d_logp.dtype) * d_logp, *rest


_grpo_loss.register_autograd(_grpo_backward, setup_context=_grpo_setup)


@torch.library.custom_op(
    "pyunictokens::maskgit_grpo_loss",
    mutates_args=(),
    schema=f"({_FUSED}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _maskgit_grpo_loss(*arguments: Argument) -> tuple[Tensor, ...]:
    hidden, weight, target, *loss, bias, uncond, mask, scale, temperature, low, high, beta, needs, more, backend = (
        arguments
    )
    hidden, weight, target, bias, uncond, scale, temperature = checked_head(
        hidden, weight, target, bias, uncond, scale, temperature
    )
    old_logp, ref_logp, advantages, alpha = loss
    alpha, mask = _loss_arguments(
        target.shape, "the shape of target", hidden, old_logp, ref_logp, advantages, alpha, low, high, beta, mask
    )
    check.integer("needs", needs, 0, NEEDS_ALL)
    inputs = hidden, weight, target, old_logp, ref_logp, advantages, alpha, bias, uncond, mask
    backend = choose("maskgit_grpo_loss", backend, hidden.device, hidden.dtype)
    with no_autocast(hidden):
        return entry("maskgit_grpo_loss", backend).forward(*inputs, scale, temperature, low, high, beta, needs, more)


@_maskgit_grpo_loss.register_fake
def _(hidden: Tensor, weight: Tensor, target: Tensor, *rest: Argument) -> tuple[Tensor, ...]:
    bias, needs = rest[_BIAS - 3], rest[-3]
    dtype = working_dtype(hidden)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(target.shape, dtype=dtype),
        hidden.new_empty(5, dtype=dtype),
        *fake_gradients(hidden, weight, bias, needs),
    )


def _fused_setup(ctx: Context, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # zeros the size of every gradient would be made for outputs that have none
    ctx.save_for_backward(*output[3:])


@once_differentiable
def _fused_backward(ctx: Context, grad_loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    if grad_loss is None:
        return (None,) * len(wanted)
    here = wanted[0], wanted[_UNCOND], wanted[1], wanted[_BIAS]
    scaled = [
        grad_loss.to(gradient.dtype) * gradient if wants else None
        for gradient, wants in zip(ctx.saved_tensors, here, strict=True)
    ]
    return placed(tuple(scaled), wanted, bias=_BIAS, hidden_uncond=_UNCOND)


_maskgit_grpo_loss.register_autograd(_fused_backward, setup_context=_fused_setup)
