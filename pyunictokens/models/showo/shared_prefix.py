"""Attention over a prompt that many rows share and over a row's own positions, taken apart and joined exactly.

    softmax over both = (e^{a}·own + e^{b}·shared) / (e^{a} + e^{b}),   a, b the log-sum-exp of the two parts' scores

So a prompt's keys and values are read where they lie, without a copy a row and without a mask, by any flash kernel that
gives its log-sum-exp. Backwards, a flash kernel forms P = exp(scores − lse) and D = Σ dO·O: given the joined output and
the joined log-sum-exp, each part's own backward pass yields its share of the whole gradient (as in ring attention, Liu
et al., 2023).

Shape suffixes: B rows, H heads, L new positions, P prompt positions, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...utils.errors import UserError
from ...utils.profiling import taken
from .kernels import Extra, Kernel, kernel_for
from .padding import reading_marks


def joined_attention(
    q: Tensor, k: Tensor, v: Tensor, runs: Sequence[tuple[int, Tensor, Tensor]], *, causal: bool = False
) -> Tensor:
    """Every row over the prompt of its run and over its own positions: [B, H, L, E].

    `runs` lists (number of rows, keys [H, P, E], values [H, P, E]) in the order of the rows; a prompt's tensors may be
    padded (padding.py), where no gradient is wanted. `causal` bounds the own part, position j seeing own positions ≤ j.
    Differentiable in q, k, v and all the prompts' tensors.
    """
    counts = [count for count, _, _ in runs]
    if sum(counts) != q.shape[0]:
        raise ValueError(f"runs of {counts} rows for {q.shape[0]} rows")
    kernel = kernel_for(q)
    if kernel is None:
        raise UserError(
            f"attention in {str(q.dtype).removeprefix('torch.')} with heads of width {q.shape[-1]} on {q.device.type}: "
            "no kernel here gives its log-sum-exp"
        )
    taken("shared-prefix attention", kernel.name)
    shared = [tensor for _, keys, values in runs for tensor in (keys, values)]
    if any(tensor.shape[-1] != q.shape[-1] for tensor in shared) and torch.is_grad_enabled():
        raise ValueError("padded prompts have no gradients: use them without")
    if not torch.is_grad_enabled():
        return _forward(kernel, q, k, v, causal, counts, shared)[0]
    return _Joined.apply(q, k, v, kernel, causal, counts, *shared)  # type: ignore[no-untyped-call]


def _forward(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, causal: bool, counts: list[int], shared: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Extra]]:
    own, own_lse, extra = kernel.forward(q, k, v, causal)
    outs, lses, extras = [], [], [extra]
    for rows, keys, values in _parts(counts, shared):
        if keys.shape[-1] == q.shape[-1]:
            out, lse, extra = kernel.forward(q[rows], keys, values, False)
        else:
            out, lse, extra = kernel.forward(reading_marks(q[rows]), keys, values, False, q.shape[-1] ** -0.5)
            out = out[..., : q.shape[-1]]
        first, second = own_lse[rows], lse
        share = torch.sigmoid(second - first)[..., None].to(_wide(out))  # e^b / (e^a + e^b)
        outs.append(torch.lerp(own[rows].to(share.dtype), out.to(share.dtype), share).to(q.dtype))
        lses.append(torch.logaddexp(first, second))
        extras.append(extra)
    return (outs[0], lses[0], extras) if len(outs) == 1 else (torch.cat(outs), torch.cat(lses), extras)


def _parts(counts: list[int], shared: Sequence[Tensor]) -> list[tuple[slice, Tensor, Tensor]]:
    """Rows of each run with its prompt's keys and values, seen once for each row."""
    parts, start = [], 0
    for place, count in enumerate(counts):
        keys, values = (tensor[None].expand(count, -1, -1, -1) for tensor in shared[2 * place : 2 * place + 2])
        parts.append((slice(start, start + count), keys, values))
        start += count
    return parts


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, causal: bool, counts: list[int], *shared: Tensor
    ) -> Tensor:
        with torch.enable_grad():  # as for the kernel's choice: gradients are wanted
            out, lse, extras = _forward(kernel, q.detach(), k.detach(), v.detach(), causal, counts, shared)
        ctx.save_for_backward(q, k, v, out, lse, *shared)
        ctx.kernel, ctx.causal, ctx.counts, ctx.extras = kernel, causal, counts, extras
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, out, lse, *shared = ctx.saved_tensors
        backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = ctx.kernel.backward
        grad = grads[0].contiguous()
        d_q, d_k, d_v = backward(grad, q, k, v, out, lse, ctx.causal, ctx.extras[0])
        d_q = d_q.clone()
        d_shared: list[Tensor] = []
        for (rows, keys, values), extra in zip(_parts(ctx.counts, shared), ctx.extras[1:], strict=True):
            part_q, part_k, part_v = backward(
                grad[rows], q[rows], keys, values, out[rows], lse[rows].contiguous(), False, extra
            )
            d_q[rows] += part_q
            d_shared += [part_k.sum(0), part_v.sum(0)]
        return (d_q, d_k, d_v, None, None, None, *d_shared)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
