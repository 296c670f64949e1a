"""The `cpu` backend: hands tensors to the compiled core (`pyunictokens._core`, csrc/) as addresses and sizes.

This is the last place that sees a tensor: everything that crosses has been checked by the public functions for shape,
dtype, device and range, and is made contiguous here. Without the compiled core the backend is marked unavailable, with
the reason.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._dispatch import Entry, mark_unavailable, offer

_core: ModuleType | None = None
try:
    _core = importlib.import_module("pyunictokens._core")
except ImportError as error:
    mark_unavailable("cpu", f"the compiled core cannot be imported ({error}); build it: pip install -e .")

level = ""
"""Instruction set to use (one of `_core.cpu_levels()`); empty: the best of this machine. Tests set it."""

_TYPE = {torch.float32: 0, torch.bfloat16: 1}


def core() -> ModuleType | None:
    """The compiled core, or None where it cannot be imported."""
    return _core


def build_info() -> dict[str, Any]:
    """What the compiled core contains and finds (compiler, CPU level, CUDA part); empty without a core."""
    return {} if _core is None else dict(_core.build_info())


def maskgit_step(
    logits: Tensor,
    codes: Tensor,
    mask_len: Tensor,
    temperature: Tensor,
    seed: int,
    sample_ids: Tensor,
    step: Tensor,
    token_gumbel: Tensor | None,
    rank_gumbel: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, chosen, logp, masked) from the fused row kernel. float32 and bfloat16 are read as they are."""
    assert _core is not None
    if logits.dtype == torch.float16:
        logits = logits.float()
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    batch, positions, entries = logits.shape
    codes, mask_len = codes.contiguous(), mask_len.contiguous()
    temperature, sample_ids, step = temperature.float().contiguous(), sample_ids.contiguous(), step.contiguous()
    token_gumbel = None if token_gumbel is None else token_gumbel.float().contiguous()
    rank_gumbel = None if rank_gumbel is None else rank_gumbel.float().contiguous()
    out_codes, out_chosen = torch.empty_like(codes), torch.empty_like(codes)
    logp, masked = torch.empty(codes.shape), torch.empty(codes.shape, dtype=torch.bool)
    _core.maskgit_step(
        logits.data_ptr(),
        _TYPE[logits.dtype],
        batch,
        positions,
        entries,
        logits.stride(0),
        logits.stride(1),
        codes.data_ptr(),
        mask_len.data_ptr(),
        temperature.data_ptr(),
        seed,
        sample_ids.data_ptr(),
        step.data_ptr(),
        stream,
        0 if token_gumbel is None else token_gumbel.data_ptr(),
        0 if rank_gumbel is None else rank_gumbel.data_ptr(),
        out_codes.data_ptr(),
        out_chosen.data_ptr(),
        logp.data_ptr(),
        masked.data_ptr(),
        torch.get_num_threads(),
        level,
    )
    return out_codes, out_chosen, logp, masked


if _core is not None:
    offer(
        "maskgit_step",
        "cpu",
        Entry(maskgit_step, devices=("cpu",), dtypes=(torch.float32, torch.bfloat16, torch.float16)),
    )
