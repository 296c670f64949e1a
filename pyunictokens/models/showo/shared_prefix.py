"""Attention over a prompt that many rows share and over a row's own positions, taken apart and joined exactly.

    softmax over both = (e^{a}·own + e^{b}·shared) / (e^{a} + e^{b}),   a, b the log-sum-exp of the two parts' scores

So a prompt's keys and values are read where they lie, without a copy a row and without a mask, by any flash kernel that
gives its log-sum-exp. Backwards, a flash kernel forms P = exp(scores − lse) and D = Σ dO·O: given the joined output and
the joined log-sum-exp, each part's own backward pass yields its share of the whole gradient (as in ring attention, Liu
et al., 2023).

Shape suffixes: B rows, H heads, L new positions, P prompt positions, E head width.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from ...utils.errors import UserError
from ...utils.profiling import taken
from .padding import reading_marks

_aten = torch.ops.aten

Extra: TypeAlias = tuple[object, ...]
"""What a kernel's backward pass wants beside its output."""


class Kernel(Protocol):
    """A flash kernel: out [B, H, L, E], log-sum-exp [B, H, L], and what its backward pass wants besides."""

    name: str

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None
    ) -> tuple[Tensor, Tensor, Extra]:
        """`scale` of the scores; by default E^-½."""
        ...

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        extra: Extra,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True)
class RowLengths:
    """How many of a buffer's positions each row has. The tensors stay where they are; `used` may be written anew."""

    used: Tensor
    """int32 [B]."""
    new_starts: Tensor
    """int32 [B + 1]: 0, L, 2 L, …"""
    buffer_starts: Tensor
    """int32 [B + 1]: 0, S, 2 S, …"""

    @classmethod
    def make(cls, rows: int, new: int, size: int, device: torch.device) -> RowLengths:
        """For `rows` rows of `new` queries over buffers of `size` positions, of which none is used yet."""
        starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        return cls(torch.zeros(rows, dtype=torch.int32, device=device), starts * new, starts * size)


@runtime_checkable
class LengthsKernel(Protocol):
    """A flash kernel that reads of each row's keys as many as a number on the device says. It gives no gradients."""

    def over_lengths(self, q: Tensor, keys: Tensor, values: Tensor, lengths: RowLengths) -> Tensor:
        """q [B, H, L, E] over keys and values [B, S, H, E]: [B, H, L, E]."""
        ...


class CpuKernel:
    """Torch's flash kernel of the CPU; any dtype."""

    name = "torch's flash kernel (CPU)"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None
    ) -> tuple[Tensor, Tensor, Extra]:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse, ()

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        extra: Extra,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal)


class CudaKernel:
    """Torch's flash kernel of a GPU; 16-bit dtypes, head widths that are multiples of 8 up to 256."""

    name = "torch's flash kernel"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None
    ) -> tuple[Tensor, Tensor, Extra]:
        out, lse, *rest = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return out, lse, tuple(rest[:6])  # cumulative lengths, longest lengths, the two parts of the generator's state

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        extra: Extra,
    ) -> tuple[Tensor, Tensor, Tensor]:
        lengths, noise = extra[:4], extra[4:]
        return _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, *lengths, 0.0, causal, *noise
        )

    def over_lengths(self, q: Tensor, keys: Tensor, values: Tensor, lengths: RowLengths) -> Tensor:
        rows, _, new, _ = q.shape
        packed = q.transpose(1, 2).flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)
        starts = lengths.new_starts, lengths.buffer_starts
        out = _aten._flash_attention_forward(
            *packed, *starts, new, keys.shape[1], 0.0, False, False, seqused_k=lengths.used
        )[0]
        return out.unflatten(0, (rows, new)).transpose(1, 2)


class FlashAttnKernel(CudaKernel):
    """The flash-attn package (`pip install pyunictokens[flash]`) where no gradient is wanted; otherwise torch's."""

    name = "flash-attn, with gradients torch's flash kernel"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None
    ) -> tuple[Tensor, Tensor, Extra]:
        package = _flash_attn()
        if package is None or torch.is_grad_enabled():
            return super().forward(q, k, v, causal, scale)
        turned = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out, lse, _ = package.flash_attn_func(*turned, causal=causal, softmax_scale=scale, return_attn_probs=True)
        return out.transpose(1, 2), lse, ()

    def over_lengths(self, q: Tensor, keys: Tensor, values: Tensor, lengths: RowLengths) -> Tensor:
        package = _flash_attn()
        if package is None:
            return super().over_lengths(q, keys, values, lengths)
        out = package.flash_attn_with_kvcache(q.transpose(1, 2), keys, values, cache_seqlens=lengths.used)
        return out.transpose(1, 2)


@functools.cache
def _flash_attn() -> ModuleType | None:
    try:
        return importlib.import_module("flash_attn")
    except ImportError:
        return None


def kernel_for(q: Tensor, device: str | None = None) -> Kernel | None:
    """The kernel that takes tensors like `q` [B, H, L, E] (on another type of `device`); None where there is none that
    gives its log-sum-exp."""
    device = device or q.device.type
    if device == "cpu":
        return CpuKernel()
    width = q.shape[-1]
    if device == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 256:
        return FlashAttnKernel() if _flash_attn() is not None else CudaKernel()
    return None


TOGETHER = "torch's attention, keys put together"
"""What is used where no kernel gives its log-sum-exp, and on a CPU, where it is the faster."""


def attention_way(device: torch.device) -> tuple[str, str]:
    """How rows over shared prompts look at them on `device` in bfloat16, and why not by the flash-attn package."""
    if device.type != "cuda":
        return TOGETHER, f"the tensors are on {device.type}; kernels that read a prompt where it lies are for GPUs"
    kernel = kernel_for(torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device="meta"), device.type)
    assert kernel is not None
    try:
        importlib.import_module("flash_attn")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "flash_attn"
        return kernel.name, "flash-attn is not installed" if missing else f"flash-attn does not load: {error}"
    return kernel.name, "flash-attn is installed"


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
