"""The public `selected_logprob`: validate, choose a backend, register with torch.library (fake and autograd included).

Equation: log_softmax((W·h + b)/τ)[target] with classifier-free guidance before the head, h = (1+s)·hidden − s·uncond
(the head is linear, so this is guidance of the logits).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..utils.errors import UserError
from . import validate as check
from .reference import NEEDS_BIAS, NEEDS_HIDDEN, NEEDS_UNCOND, NEEDS_WEIGHT, working_dtype
from .registry import choose, entry
from .transforms import autocast_inputs, no_autocast, refuse_transforms
from .types import Argument, Context


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
    bias. Under torch.autocast hidden, hidden_uncond and weight are cast as `nn.Linear` casts them.

    Args:
        hidden: [..., D] float32, bfloat16, float16 or float64.
        weight: [K, D], any of these dtypes; float64 only with float64 `hidden` (bias likewise).
        target: [...], any integer type, values 0 … K−1.
        bias: [K] or None.
        hidden_uncond: [..., D], dtype of `hidden`; needed where guidance_scale > 0, without effect where it is 0.
        guidance_scale: ≥ 0.
        temperature: above 0.
        backend: None (the best that can run), "reference", "cpu" or "triton".

    Returns:
        [...] float32 (float64 for float64 `hidden`).

    Raises:
        UserError: a wrong shape, dtype, device or value (target values are looked at on the CPU only).
    """
    refuse_transforms("selected_logprob")
    target, hidden_uncond, guidance_scale, temperature = head_arguments(
        hidden, weight, target, bias, hidden_uncond, guidance_scale, temperature
    )
    hidden, hidden_uncond, weight = autocast_inputs(hidden, hidden_uncond, weight)
    backend = choose("selected_logprob", backend, hidden.device, hidden.dtype)
    logp: Tensor
    logp, _ = _selected_logprob(hidden, weight, target, bias, hidden_uncond, guidance_scale, temperature, backend)
    return logp


def head_arguments(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    hidden_uncond: Tensor | None,
    guidance_scale: float,
    temperature: float,
) -> tuple[Tensor, Tensor | None, float, float]:
    """Check what every operation with a head takes. Returns target as int64, hidden_uncond (None if without effect)
    and the floats."""
    check.tensor("hidden", hidden, check.FLOATS)
    check.tensor("weight", weight, check.FLOATS, hidden)
    check.precision("weight", weight, hidden)
    target = check.codes("target", target, hidden)
    if hidden.dim() < 1:
        raise UserError("hidden: a 0-d tensor, must be [..., D]")
    if hidden.shape[-1] < 1:
        raise UserError(f"hidden: shape {tuple(hidden.shape)}, must be [..., D] with D ≥ 1")
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != hidden.shape[-1]:
        raise UserError(
            f"weight: shape {tuple(weight.shape)}, must be [K, D] with K ≥ 1 and D = {hidden.shape[-1]} as in hidden"
        )
    check.shape("target", target, hidden.shape[:-1], "the leading shape of hidden")
    if bias is not None:
        check.tensor("bias", bias, check.FLOATS, hidden)
        check.precision("bias", bias, hidden)
        check.shape("bias", bias, weight.shape[:1], "[K]")
    guidance_scale = check.number("guidance_scale", guidance_scale, 0.0, hint="0 turns guidance off")
    temperature = check.number("temperature", temperature, 0.0, strict=True)
    if hidden_uncond is not None:
        check.tensor("hidden_uncond", hidden_uncond, (hidden.dtype,), hidden)
        check.shape("hidden_uncond", hidden_uncond, hidden.shape, "the shape of hidden")
    elif guidance_scale > 0.0:
        raise UserError(f"guidance_scale={guidance_scale}: needs hidden_uncond (or guidance_scale=0)")
    return target, (hidden_uncond if guidance_scale > 0.0 else None), guidance_scale, temperature


def checked_head(hidden: Tensor, weight: Tensor, target: Tensor, *rest: Argument) -> list[Argument]:
    """What a registered operation with a head was called with, checked once more: torch.ops is a door of its own, and
    behind it addresses cross into compiled code. rest: bias, hidden_uncond, guidance_scale, temperature."""
    bias, hidden_uncond, guidance_scale, temperature = rest
    numbers = head_arguments(hidden, weight, target, bias, hidden_uncond, guidance_scale, temperature)
    check.value_range("target", numbers[0], 0, weight.shape[0] - 1)
    return [hidden, weight, numbers[0], bias, *numbers[1:]]


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


def placed(
    gradients: tuple[Tensor | None, ...], wanted: tuple[bool, ...], *, bias: int, hidden_uncond: int
) -> tuple[Tensor | None, ...]:
    """The four gradients at the places of their inputs (hidden and weight come first), None at all others."""
    row: list[Tensor | None] = [None] * len(wanted)
    for place, gradient in zip((0, hidden_uncond, 1, bias), gradients, strict=True):
        row[place] = gradient if wanted[place] else None
    return tuple(row)


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


NEEDS_ALL = NEEDS_HIDDEN | NEEDS_UNCOND | NEEDS_WEIGHT | NEEDS_BIAS
HEAD = "Tensor? bias, Tensor? hidden_uncond, float guidance_scale, float temperature"
_FORWARD = f"Tensor hidden, Tensor weight, Tensor target, {HEAD}"
_BACKWARD = f"Tensor grad, Tensor lse, {_FORWARD}, int needs, str backend"


@torch.library.custom_op(
    "pyunictokens::selected_logprob", mutates_args=(), schema=f"({_FORWARD}, str backend) -> (Tensor, Tensor)"
)
def _selected_logprob(*arguments: Argument) -> tuple[Tensor, ...]:
    *inputs, backend = arguments
    inputs = checked_head(*inputs)
    hidden = inputs[0]
    backend = choose("selected_logprob", backend, hidden.device, hidden.dtype)
    with no_autocast(hidden):
        return entry("selected_logprob", backend).forward(*inputs)


@_selected_logprob.register_fake
def _(hidden: Tensor, weight: Tensor, target: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    logp = hidden.new_empty(target.shape, dtype=working_dtype(hidden))
    return logp, torch.empty_like(logp)


@torch.library.custom_op(
    "pyunictokens::selected_logprob_backward",
    mutates_args=(),
    schema=f"({_BACKWARD}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _selected_logprob_backward(*arguments: Argument) -> tuple[Tensor, ...]:
    grad, lse, *inputs, needs, backend = arguments
    inputs = checked_head(*inputs)
    hidden, _, target, *_ = inputs
    for name, value in (("grad", grad), ("lse", lse)):
        check.tensor(name, value, check.FLOATS, hidden)
        check.shape(name, value, target.shape, "the shape of target")
    check.integer("needs", needs, 0, NEEDS_ALL)
    backward = entry("selected_logprob", choose("selected_logprob", backend, hidden.device, hidden.dtype)).backward
    if backward is None:
        raise UserError(f"backend {backend!r} has no backward of selected_logprob; use backend='reference'")
    with no_autocast(hidden):
        return backward(grad, lse, *inputs, needs)


@_selected_logprob_backward.register_fake
def _(
    grad: Tensor, lse: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *rest: Argument
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = rest[-2]
    return fake_gradients(hidden, weight, bias, needs)


def _setup(ctx: Context, inputs: tuple[Argument, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, guidance_scale, temperature, backend = inputs
    ctx.set_materialize_grads(False)  # the log-sum-exp has no gradient; zeros would be made for it
    ctx.save_for_backward(*tensors, output[1])
    ctx.settings = guidance_scale, temperature
    ctx.backend = backend


def _backward(ctx: Context, grad: Tensor | None, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, lse = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    if grad is None:
        return (None,) * len(wanted)
    needs = NEEDS_HIDDEN * wanted[0] + NEEDS_WEIGHT * wanted[1] + NEEDS_BIAS * wanted[3] + NEEDS_UNCOND * wanted[4]
    gradients = _selected_logprob_backward(grad, lse, *tensors, *ctx.settings, needs, ctx.backend)
    return placed(gradients, wanted, bias=3, hidden_uncond=4)


_selected_logprob.register_autograd(_backward, setup_context=_setup)
