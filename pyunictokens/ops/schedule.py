"""How many codes stay masked after a MaskGIT step: the published schedules, evaluated in float32 as published.

The float32 matters. cos(⅔·π/2) is ½ in exact arithmetic and a little less in float32, so of 16 codes 7 stay masked and
not 8, and every later code depends on it.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

import torch
from torch import Tensor

from ..utils.errors import UserError

_FLOOR = 1e-6


def mask_schedule(name: str, step: int, steps: int) -> float:
    """Share of the codes that is still masked after step `step` (0 … steps−1) of `steps`, with t = (step + 1)/steps.

    cosine: cos(t·π/2). linear: 1 − t. pow<k>, for example pow2 or pow0.5: 1 − t^k. sigmoid: the logistic curve from −3
    to 3, turned and scaled to run from 1 to 0. All but cosine are kept in [1e-6, 1]. Evaluated in float32.

    Raises:
        UserError: unknown name, steps < 1, step outside 0 … steps−1.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UserError(f"steps={steps!r}: must be an integer ≥ 1")
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < steps:
        raise UserError(f"step={step!r}: must be an integer in 0 … {steps - 1} (steps={steps})")
    return _at(name, (step + 1) / steps)


def mask_rate(name: str, t: float) -> float:
    """The schedule at any t in [0, 1], as training draws it (`mask_schedule` is this at (step + 1)/steps).

    Raises:
        UserError: unknown name, t outside [0, 1].
    """
    if not 0.0 <= t <= 1.0:
        raise UserError(f"t={t}: must be in [0, 1]")
    return _at(name, float(t))


def mask_len(schedule: str, positions: int, unknown: int | Tensor, step: int, steps: int) -> int | Tensor:
    """Number of codes masked after a step: max(1, min(unknown − 1, ⌊N·mask_schedule⌋)), as published.

    `positions` is N. `unknown`, the number of codes unknown before the step, may be an int or an integer tensor [B];
    the result is an int or an int64 tensor on the same device (no transfer). One code stays masked even after the last
    step: the caller takes `chosen` there, where every code is known.

    Raises:
        UserError: as `mask_schedule`; positions < 1; a negative int `unknown`.
    """
    if positions < 1:
        raise UserError(f"positions={positions}: must be ≥ 1")
    share = torch.tensor(mask_schedule(schedule, step, steps), dtype=torch.float32)
    wanted = int((positions * share).floor())
    if isinstance(unknown, Tensor):
        return (unknown.to(torch.int64) - 1).clamp_max(wanted).clamp_min(1)
    if unknown < 0:
        raise UserError(f"unknown={unknown}: must be ≥ 0")
    return max(1, min(int(unknown) - 1, wanted))


@lru_cache(maxsize=4096)
def _at(name: str, t: float) -> float:
    x = torch.tensor(t, dtype=torch.float32)
    if name == "cosine":
        return float(torch.cos(x * math.pi * 0.5))
    if name == "linear":
        y = 1.0 - x
    elif name == "sigmoid":
        start, end = torch.tensor(-3.0), torch.tensor(3.0)
        low, high = torch.sigmoid(start), torch.sigmoid(end)
        y = (high - torch.sigmoid(x * (end - start) + start)) / (high - low)
    elif (match := re.fullmatch(r"pow(\d+(?:\.\d+)?|\.\d+)", name)) and float(match[1]) > 0:
        y = 1.0 - x ** float(match[1])
    else:
        raise UserError(f"schedule {name!r}: must be cosine, linear, sigmoid or pow<k> with k > 0, for example pow2")
    return float(y.clamp(_FLOOR, 1.0))
