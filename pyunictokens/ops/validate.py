"""Checks that every operation shares: each names the value, the limit and the way out.

Shapes, dtypes and devices are checked always, also while torch.compile traces. Values are looked at only on the CPU
(`on_cpu`): on a GPU that would wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..utils.errors import UserError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    """float32, bfloat16, …"""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def tensor(name: str, value: object, dtypes: Sequence[torch.dtype], like: Tensor | None = None) -> Tensor:
    """`value`, if it is a tensor of one of `dtypes`, on the device of `like`."""
    if not isinstance(value, Tensor):
        raise UserError(f"{name}: must be a tensor, got {type(value).__name__}")
    if hasattr(value, "full_tensor"):
        raise UserError(
            f"{name}: a DTensor; call the operation inside the forward of the module that FSDP2 wraps, where "
            "parameters are whole, or pass .full_tensor()"
        )
    if value.layout is not torch.strided:
        raise UserError(f"{name}: of layout {value.layout}, must be dense: pass .to_dense()")
    if value.dtype not in dtypes:
        raise UserError(f"{name}: dtype {dtype_names([value.dtype])}, must be {dtype_names(dtypes)}")
    if like is not None and value.device != like.device:
        raise UserError(f"{name}: on {value.device}, but the other tensors are on {like.device}; move one of them")
    return value


def codes(name: str, value: object, like: Tensor) -> Tensor:
    """`value`, a tensor of any integer type on the device of `like`, as int64: who stores codes keeps them small."""
    return tensor(name, value, (*INTEGERS, torch.uint16, torch.uint32), like).to(torch.int64)


def precision(name: str, value: Tensor, like: Tensor) -> None:
    """Raise where float64 meets another dtype: one of the two would be rounded without a word."""
    if (value.dtype == torch.float64) != (like.dtype == torch.float64):
        raise UserError(
            f"{name}: dtype {dtype_names([value.dtype])}, but hidden is {dtype_names([like.dtype])}: "
            "float64 goes with float64 only"
        )


def shape(name: str, value: Tensor, wanted: Sequence[int], meaning: str) -> None:
    """Raise unless `value` has exactly the shape `wanted`; `meaning` says which one that is, e.g. "[K, D]"."""
    if tuple(value.shape) != tuple(wanted):
        raise UserError(f"{name}: shape {tuple(value.shape)}, must be {meaning} = {tuple(wanted)}")


def number(name: str, value: object, low: float, *, strict: bool = False, hint: str = "") -> float:
    """A finite float ≥ low (> low if strict)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{name}={value!r}: must be a number")
    if not low <= value < math.inf or (strict and value == low):  # comparisons alone: torch.compile traces them
        limit = f"{'>' if strict else '≥'} {low:g}"
        raise UserError(f"{name}={value}: must be finite and {limit}{f' ({hint})' if hint else ''}")
    return float(value)


def integer(name: str, value: object, low: int, high: int) -> int:
    """An int in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{name}={value!r}: must be an integer")
    if not low <= value <= high:
        raise UserError(f"{name}={value}: must be in {low} … {high}")
    return value


def broadcastable(name: str, value: Tensor, wanted: Sequence[int], meaning: str) -> None:
    """Raise unless `value` broadcasts to the shape `wanted` without enlarging it."""
    ok = value.dim() <= len(wanted) and all(
        have in (1, want) for have, want in zip(reversed(value.shape), reversed(tuple(wanted)), strict=False)
    )
    if not ok:
        raise UserError(f"{name}: shape {tuple(value.shape)} does not broadcast to {meaning} = {tuple(wanted)}")


def on_cpu(value: Tensor) -> bool:
    """Whether looking at the values is free."""
    return value.device.type == "cpu"


def value_range(name: str, value: Tensor, low: int | float, high: int | float, hint: str = "") -> None:
    """On the CPU: raise unless every element is in [low, high] (a NaN never is). Elsewhere: nothing."""
    if not on_cpu(value) or value.numel() == 0:
        return
    smallest, largest = (x.item() for x in torch.aminmax(value.detach()))
    if not (smallest >= low and largest <= high):
        worst = largest if smallest >= low else smallest
        raise UserError(f"{name}: holds {worst}, must be in {low} … {high}{f' ({hint})' if hint else ''}")
