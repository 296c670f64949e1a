"""How the operations meet what wraps a call: torch.autocast, torch.vmap, torch.func.

Autocast: the inputs of a head's product are cast where `nn.Linear` would cast them, and nothing else; inside an
operation autocast is off, so softmax, loss and sampling are the same with and without it. torch.vmap, torch.func and
forward mode are refused.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..utils.errors import UserError


def autocast_inputs(
    hidden: Tensor, hidden_uncond: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The three cast to the autocast dtype where autocast is on for their device; float64 is left alone."""
    kind = hidden.device.type
    if hidden.dtype == torch.float64 or not _autocast(kind):
        return hidden, hidden_uncond, weight
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), None if hidden_uncond is None else hidden_uncond.to(dtype), weight.to(dtype)


def no_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Autocast off on the device of `like`: the products of an implementation keep the dtypes it chose."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if _autocast(kind) else nullcontext()


def _autocast(kind: str) -> bool:
    return kind != "meta" and torch.is_autocast_enabled(kind)


def transformed() -> bool:
    """Whether torch.compile, torch.vmap, torch.func or forward mode is at work, for which a registered operation has no
    rules or is opaque."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def refuse_transforms(name: str) -> None:
    """Raise inside torch.vmap, torch.func's derivatives and forward-mode differentiation.

    A registered operation has rules for reverse mode alone. Without this check forward mode would return zeros.
    """
    if torch.compiler.is_compiling():
        return
    interpreter = torch._C._functorch.peek_interpreter_stack()
    if interpreter is None and forward_ad._current_level < 0:
        return
    if interpreter is not None and interpreter.key() == torch._C._functorch.TransformType.Vmap:
        raise UserError(
            f"{name}: not under torch.vmap; it takes whole batches: make the mapped dimension a leading one"
        )
    raise UserError(
        f"{name}: not under torch.func or forward-mode differentiation; use backward() or torch.autograd.grad"
    )
