"""Devices and dtypes by the names that a command line or a settings file gives them."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    import torch


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device that is there. Raises UserError."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name}: must be auto, cpu, cuda or cuda:N") from None
    if device.type not in {"cpu", "cuda"}:
        raise UserError(f"device {name}: must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name}: torch sees {torch.cuda.device_count()} GPUs here; use cpu")
    return device


def pick_dtype(name: str, device: torch.device | None = None) -> torch.dtype:
    """A dtype by name; `auto` is bfloat16 on a GPU that computes in it, else float32. Raises UserError."""
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        on_gpu = device is not None and device.type == "cuda"
        return torch.bfloat16 if on_gpu and torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    if name not in known:
        raise UserError(f"dtype {name}: must be auto, float32, bfloat16 or float16")
    return known[name]


def usable_cores() -> int:
    """Cores that this process may use, where the system tells; else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 (AVX-512 BF16, AMX), where torch can tell; they take
    half of float32's time."""
    import torch

    tell = getattr(torch.cpu, "get_capabilities", None)  # came after torch 2.9
    found = tell() if tell is not None else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def check_training_dtype(dtype: torch.dtype, resume: bool = False) -> None:
    """Raise UserError for float16, in which gradients would be formed too. A run that was begun in it before this was
    refused (`resume`) goes on, with a warning."""
    import torch

    if dtype != torch.float16:
        return
    problem = (
        "dtype=float16: gradients below 6e-8 vanish in it and sums above 65504 overflow, and losses are not scaled "
        "against that here: train with dtype=bfloat16 (as small, with the range of float32) or float32. Generating "
        "and evaluating in float16 work"
    )
    if not resume:
        raise UserError(problem)
    warnings.warn(f"{problem}. This run was begun in float16 and goes on in it", stacklevel=3)
