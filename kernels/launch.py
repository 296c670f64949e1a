"""The one place that launches a Triton kernel, so that what would be launched can also be listed and compiled ahead.

Inside `recording()` nothing runs: each launch is noted with its arguments, which may then be meta tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Kernels run in Triton's interpreter, on the CPU. Read once: Triton decides when a kernel is defined."""


@dataclass(frozen=True)
class Launch:
    """One noted launch."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int


_noted: list[Launch] | None = None


def _mend_interpreter() -> None:
    """Four things the interpreter does unlike a GPU, on which kernels here rely.

    Loop bounds: it keeps a scalar as an array of one, which NumPy ≥ 2.4 does not take for an integer. Products of
    bfloat16: it keeps them as the integers of their bits and would multiply those. float32 to bfloat16: it cuts off, a
    GPU rounds. The smaller and the larger of two numbers: it gives NaN where one is, a GPU the other number.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patch, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot
    convert = interpreter._convert_float

    def patch_and_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def single(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def dot_of_singles(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, single(a), single(b), *rest)

    def convert_and_round(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != tl.float32 or target != tl.bfloat16:
            return convert(values, source, target, mode)
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)

    interpreter._patch_lang_tensor = patch_and_index
    interpreter._convert_float = convert_and_round
    interpreter.InterpreterBuilder.create_dot = dot_of_singles
    interpreter.InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    interpreter.InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)


if INTERPRETED:
    _mend_interpreter()


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, stages: int = 2, **constants: Any
) -> None:
    """`kernel` over `grid`; `constants` are its compile-time arguments. An empty grid launches nothing."""
    if _noted is not None:
        _noted.append(Launch(kernel, arguments, constants, warps, stages))
    elif all(grid):
        kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of running them."""
    global _noted
    before, _noted = _noted, []
    try:
        yield _noted
    finally:
        _noted = before


def power_of_two(value: int, low: int, high: int) -> int:
    """The least power of two ≥ value, kept in [low, high]."""
    return max(low, min(high, 1 << max(value - 1, 0).bit_length()))


def capturing(tensor: Tensor) -> bool:
    """Whether the current stream of this tensor's device is being captured into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
