"""Layer norm and partial rotary of queries and keys.

On a GPU one kernel forward and one a tensor backward, registered with torch.library (fake and autograd included). On a
CPU, in float32, one loop of the compiled core each way. Elsewhere, and inside torch.compile or torch.func on a CPU, the
plain lines of reference.py run as they stand, under autograd's own rules. Models call it; it is no part of
`pyunictokens.ops`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..utils.errors import UserError
from . import reference
from . import validate as check
from .registry import choose, entry
from .transforms import refuse_transforms, transformed
from .types import Argument, Context, Implementation

NAME = "qk_norm_rotary"


def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    eps: float,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """q and k after a layer norm over the head and a turn of its first R entries by position.

    y = layer_norm(x)·weight + bias; the first R entries of y become y·cos + (−y[R/2:R], y[:R/2])·sin, the rest stays.
    `triton` and `cpu` compute in float32 and round once; `reference` rounds after each operation, as torch does.

    Args:
        q, k: [B, H, L, E] of any strides; float32, bfloat16 and float16 (not `cpu`), or float64 (`reference` alone).
        cos, sin: [L, R] or [B or 1, 1, L, R], R even and at most E; they get no gradient.
        q_weight, q_bias, k_weight, k_bias: [E], the layer norms' parameters.
        eps: added to the variance, ≥ 0.
        backend: None (the best that can run), "reference", "cpu" or "triton".

    Returns:
        q and k, [B, H, L, E] in their dtype.

    Raises:
        UserError: `triton` or `cpu` was given a wrong shape, dtype, device or value, or cannot run here.
    """
    chosen = choose(NAME, backend, q.device, q.dtype)
    if chosen == "reference" or (chosen == "cpu" and backend is None and transformed()):
        return reference.qk_norm_rotary(q, k, cos, sin, q_weight, q_bias, k_weight, k_bias, eps)
    refuse_transforms(NAME)
    inputs = (q, k, cos, sin, q_weight, q_bias, k_weight, k_bias, eps)
    if chosen != "cpu":
        q_out, k_out = _qk_norm_rotary(*inputs)
        return q_out, k_out
    _checked(*inputs)
    call = _OnCpu.apply if torch.is_grad_enabled() else entry(NAME, "cpu").forward
    q_out, k_out = call(*inputs)
    return q_out, k_out


def _checked(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Argument) -> None:
    """rest: the four parameters and eps. Addresses cross into compiled code behind this."""
    check.tensor("q", q, check.FLOATS)
    if q.dim() != 4:
        raise UserError(f"q: shape {tuple(q.shape)}, must be [B, H, L, E]")
    check.tensor("k", k, (q.dtype,), q)
    check.shape("k", k, q.shape, "the shape of q")
    rows, _, length, width = q.shape
    for name, value in (("cos", cos), ("sin", sin)):
        check.tensor(name, value, check.FLOATS, q)
        leading = tuple(value.shape[:-1])
        if leading not in ((length,), (1, 1, length), (rows, 1, length)):
            raise UserError(
                f"{name}: shape {tuple(value.shape)}, must be [L, R] or [B or 1, 1, L, R] with B = {rows}, L = {length}"
            )
    rotary = cos.shape[-1]
    if not 0 < rotary <= width or rotary % 2:
        raise UserError(f"cos: {rotary} entries of a head turn, must be an even number from 2 to E = {width}")
    check.shape("sin", sin, cos.shape, "the shape of cos")
    *parameters, eps = rest
    for name, value in zip(("q_weight", "q_bias", "k_weight", "k_bias"), parameters, strict=True):
        check.tensor(name, value, check.FLOATS, q)
        check.shape(name, value, (width,), "[E]")
    check.number("eps", eps, 0.0)


_PARAMETERS = "Tensor q_weight, Tensor q_bias, Tensor k_weight, Tensor k_bias"
_FORWARD = f"Tensor q, Tensor k, Tensor cos, Tensor sin, {_PARAMETERS}, float eps"


@torch.library.custom_op(f"pyunictokens::{NAME}", mutates_args=(), schema=f"({_FORWARD}) -> (Tensor, Tensor)")
def _qk_norm_rotary(*arguments: Argument) -> tuple[Tensor, ...]:
    _checked(*arguments)
    q = arguments[0]
    return entry(NAME, choose(NAME, "triton", q.device, q.dtype)).forward(*arguments)


@_qk_norm_rotary.register_fake
def _(q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op(
    f"pyunictokens::{NAME}_backward",
    mutates_args=(),
    schema=f"(Tensor grad_q, Tensor grad_k, {_FORWARD}, bool parameters) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _qk_norm_rotary_backward(*arguments: Argument) -> tuple[Tensor, ...]:
    grad_q, grad_k, *inputs, _ = arguments
    _checked(*inputs)
    q = inputs[0]
    for name, value in (("grad_q", grad_q), ("grad_k", grad_k)):
        check.tensor(name, value, check.FLOATS, q)
        check.shape(name, value, q.shape, "the shape of q")
    backward = entry(NAME, choose(NAME, "triton", q.device, q.dtype)).backward
    assert backward is not None
    return backward(*arguments)


@_qk_norm_rotary_backward.register_fake
def _(grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, *rest: Argument) -> tuple[Tensor, ...]:
    _, _, *parameters, _, wanted = rest
    return torch.empty_like(q), torch.empty_like(k), *(p.new_empty(p.shape if wanted else 0) for p in parameters)


def _setup(ctx: Context, inputs: tuple[Argument, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Context, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, _qk_norm_rotary_backward, grad_q, grad_k)


def _gradients(ctx: Context, backward: Implementation, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    if wanted[2] or wanted[3]:
        raise UserError("cos, sin: get no gradient; pass .detach() of them, or backend='reference'")
    gradients = backward(grad_q, grad_k, *ctx.saved_tensors, ctx.eps, any(wanted[4:8]))
    placed = (*gradients[:2], None, None, *gradients[2:], None)
    return tuple(gradient if want else None for gradient, want in zip(placed, wanted, strict=True))


_qk_norm_rotary.register_autograd(_backward, setup_context=_setup)


class _OnCpu(torch.autograd.Function):
    """The core's loops under autograd, at a tenth of what a registered operation costs a call."""

    @staticmethod
    def forward(ctx: FunctionCtx, *inputs: Argument) -> tuple[Tensor, ...]:
        made = entry(NAME, "cpu").forward(*inputs)
        _setup(cast(Context, ctx), inputs, (made[0], made[1]))
        return made

    @staticmethod
    def backward(ctx: FunctionCtx, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        kept = cast(Context, ctx)
        if torch.is_grad_enabled():  # a gradient of these gradients will be asked for
            q, k, cos, sin, *parameters = kept.saved_tensors
            q_weight, q_bias, k_weight, k_bias = parameters
            made = reference.qk_norm_rotary(q, k, cos, sin, q_weight, q_bias, k_weight, k_bias, kept.eps)
            wanted = [each for each, want in zip(kept.saved_tensors, kept.needs_input_grad, strict=False) if want]
            found = iter(torch.autograd.grad(made, wanted, (grad_q, grad_k), create_graph=True))
            return tuple(next(found) if want else None for want in kept.needs_input_grad)
        backward = entry(NAME, "cpu").backward
        assert backward is not None
        return _gradients(kept, backward, grad_q, grad_k)
