"""The public `selected_logprob`: validate, choose a backend, register with torch.library (fake and autograd included).

Equation: log_softmax((W·h + b)/τ)[target] with classifier-free guidance before the head, h = (1+s)·hidden − s·uncond
(the head is linear, so this is guidance of the logits). Knows one head and one target per token; not what they are
for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from . import _validate as check
from ._dispatch import choose, entry
from .reference import NEEDS_BIAS, NEEDS_HIDDEN, NEEDS_UNCOND, NEEDS_WEIGHT, working_dtype


def selected_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    hidden_uncond: Tensor | None = None,
    guidance_scale: float = 0.0,
    temperature: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Log-probability of one chosen entry per token, without ever holding a [..., K] tensor, forward or backward.

    logp = log_softmax((W·h + b)/temperature)[target], h = (1+s)·hidden − s·hidden_uncond, s = guidance_scale. Guidance,
    softmax and the result are float32 (float64 if `hidden` is). Differentiable in hidden, hidden_uncond, weight and
    bias.

    Args:
        hidden: [..., D] float32, bfloat16, float16 or float64.
        weight: [K, D], any of these dtypes.
        target: int64 [...], values 0 … K−1.
        bias: [K] or None.
        hidden_uncond: [..., D]; needed where guidance_scale > 0, without effect where it is 0.
        guidance_scale: ≥ 0.
        temperature: > 0.
        backend: None (the best that can run) or "reference".

    Returns:
        [...] float32 (float64 for float64 `hidden`).

    Raises:
        UserError: a wrong shape, dtype, device or value (target values are looked at on the CPU only).
    """
    hidden_uncond, guidance_scale, temperature = head_arguments(
        hidden, weight, target, bias, hidden_uncond, guidance_scale, temperature
    )
    backend = choose("selected_logprob", backend, hidden.device, hidden.dtype)
    return _selected_logprob(hidden, weight, target, bias, hidden_uncond, guidance_scale, temperature, backend)[0]


def head_arguments(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    hidden_uncond: Tensor | None,
    guidance_scale: float,
    temperature: float,
) -> tuple[Tensor | None, float, float]:
    """Check what every operation with a head takes. Returns hidden_uncond (None if without effect) and the floats."""
    check.tensor("hidden", hidden, check.FLOATS)
    check.tensor("weight", weight, check.FLOATS, hidden)
    check.tensor("target", target, (torch.int64,), hidden)
    if hidden.dim() < 1:
        raise UserError("hidden: a 0-d tensor, must be [..., D]")
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != hidden.shape[-1]:
        raise UserError(
            f"weight: shape {tuple(weight.shape)}, must be [K, D] with K ≥ 1 and D = {hidden.shape[-1]} as in hidden"
        )
    check.shape("target", target, hidden.shape[:-1], "the leading shape of hidden")
    if bias is not None:
        check.tensor("bias", bias, check.FLOATS, hidden)
        check.shape("bias", bias, weight.shape[:1], "[K]")
    guidance_scale = check.number("guidance_scale", guidance_scale, 0.0, hint="0 turns guidance off")
    temperature = check.number("temperature", temperature, 0.0, strict=True)
    if hidden_uncond is not None:
        check.tensor("hidden_uncond", hidden_uncond, check.FLOATS, hidden)
        check.shape("hidden_uncond", hidden_uncond, hidden.shape, "the shape of hidden")
    elif guidance_scale > 0.0:
        raise UserError(f"guidance_scale={guidance_scale}: needs hidden_uncond (or guidance_scale=0)")
    return (hidden_uncond if guidance_scale > 0.0 else None), guidance_scale, temperature


def needed(hidden: Tensor, hidden_uncond: Tensor | None, weight: Tensor, bias: Tensor | None) -> int:
    """The `needs` bits of the inputs that want a gradient here."""
    if not torch.is_grad_enabled():
        return 0
    return (
        NEEDS_HIDDEN * hidden.requires_grad
        + NEEDS_UNCOND * (hidden_uncond is not None and hidden_uncond.requires_grad)
        + NEEDS_WEIGHT * weight.requires_grad
        + NEEDS_BIAS * (bias is not None and bias.requires_grad)
    )


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the shapes of the four gradients will be: empty where not needed."""
    bias_dtype = weight.dtype if bias is None else bias.dtype
    return (
        hidden.new_empty(hidden.shape) if needs & NEEDS_HIDDEN else hidden.new_empty(0),
        hidden.new_empty(hidden.shape) if needs & NEEDS_UNCOND else hidden.new_empty(0),
        weight.new_empty(weight.shape if needs & NEEDS_WEIGHT else 0),
        weight.new_empty(weight.shape[:1] if needs & NEEDS_BIAS else 0, dtype=bias_dtype),
    )


@torch.library.custom_op("pyunictokens::selected_logprob", mutates_args=())
def _selected_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    hidden_uncond: Tensor | None,
    guidance_scale: float,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check.value_range("target", target, 0, weight.shape[0] - 1)
    return entry("selected_logprob", backend).forward(
        hidden, weight, target, bias, hidden_uncond, guidance_scale, temperature
    )


@_selected_logprob.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    hidden_uncond: Tensor | None,
    guidance_scale: float,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    logp = hidden.new_empty(target.shape, dtype=working_dtype(hidden))
    return logp, torch.empty_like(logp)


@torch.library.custom_op("pyunictokens::selected_logprob_backward", mutates_args=())
def _selected_logprob_backward(
    grad: Tensor,
    lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    hidden_uncond: Tensor | None,
    guidance_scale: float,
    temperature: float,
    needs: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backward = entry("selected_logprob", backend).backward
    assert backward is not None
    return backward(grad, lse, hidden, weight, target, bias, hidden_uncond, guidance_scale, temperature, needs)


@_selected_logprob_backward.register_fake
def _(
    grad: Tensor,
    lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    hidden_uncond: Tensor | None,
    guidance_scale: float,
    temperature: float,
    needs: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_gradients(hidden, weight, bias, needs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, target, bias, hidden_uncond, guidance_scale, temperature, backend = inputs
    ctx.save_for_backward(hidden, weight, target, bias, hidden_uncond, output[1])
    ctx.settings = guidance_scale, temperature, backend


def _backward(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, target, bias, hidden_uncond, lse = ctx.saved_tensors
    guidance_scale, temperature, backend = ctx.settings
    wanted = ctx.needs_input_grad
    needs = NEEDS_HIDDEN * wanted[0] + NEEDS_WEIGHT * wanted[1] + NEEDS_BIAS * wanted[3] + NEEDS_UNCOND * wanted[4]
    d_hidden, d_uncond, d_weight, d_bias = _selected_logprob_backward(
        grad, lse, hidden, weight, target, bias, hidden_uncond, guidance_scale, temperature, needs, backend
    )
    return (
        d_hidden if wanted[0] else None,
        d_weight if wanted[1] else None,
        None,
        d_bias if wanted[3] else None,
        d_uncond if wanted[4] else None,
        None,
        None,
        None,
    )


_selected_logprob.register_autograd(_backward, setup_context=_setup)
