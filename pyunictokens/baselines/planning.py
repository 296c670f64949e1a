"""Arithmetic of plans: what is not on this machine, how many bytes and operations something takes. Loads no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from ..models.bundle import Sources
from ..models.checkpoint import resolve
from ..utils.errors import UserError

MOMENTS = 4
"""Float32 numbers that AdamW keeps of each learned one: itself, its gradient, two moments."""


def lacking(places: Iterable[str | None]) -> tuple[str, ...]:
    """Those of `places` (folders or hub ids) that are not on this machine."""
    found = []
    for place in places:
        if place is None:
            continue
        try:
            resolve(place, offline=True)
        except UserError:
            found.append(place)
    return tuple(dict.fromkeys(found))


def parts_lacking(sources: Sources) -> tuple[str, ...]:
    """Parts of a masked model that are not on this machine; the toy lacks nothing."""
    return lacking((sources.model, sources.vq, sources.tokenizer, sources.vision))


def numbers_of(make: Callable[[], nn.Module]) -> int:
    """Parameters of what `make` builds, built without memory for them."""
    with torch.device("meta"):
        return sum(value.numel() for value in make().parameters())


def bytes_of(held: int, learned: int, dtype: torch.dtype) -> int:
    """Bytes of `held` weights in `dtype` and of what `learned` numbers need on top in float32."""
    return held * dtype.itemsize + learned * MOMENTS * 4


def operations(call: Callable[[], object]) -> float:
    """Operations of the matrix products, convolutions and attention in `call()`; on meta tensors nothing is
    computed."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())
