"""The `triton` backend: enters the kernels of `pyunictokens.kernels` into the table, imported when first called.

Offered for CUDA tensors, and for CPU tensors where Triton's interpreter is on (TRITON_INTERPRET=1 before the first
import), which is how the kernels are tested without a GPU. Everything else is in kernels/.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..registry import Entry, mark_unavailable, offer
from ..types import Argument, Implementation

_interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
_deterministic = os.environ.get("PYUNICTOKENS_DETERMINISTIC", "1") != "0"
_engine: ModuleType | None = None


def engine() -> ModuleType:
    """The module `pyunictokens.kernels.engine`; the first call imports Triton."""
    global _engine
    if _engine is None:
        _engine = importlib.import_module("pyunictokens.kernels.engine")
        _engine.settings.deterministic = _deterministic
    return _engine


def set_deterministic(flag: bool) -> None:
    """Whether every sum of the GPU kernels is formed in one order: the default, unless PYUNICTOKENS_DETERMINISTIC=0.

    False lets programs share the sums of a small captured weight gradient out, in no fixed order. All other sums keep
    their order either way, because that costs nothing. torch.use_deterministic_algorithms(True) has the last word.
    """
    global _deterministic
    _deterministic = bool(flag)
    if _engine is not None:
        _engine.settings.deterministic = _deterministic


@contextmanager
def capture_warmup() -> Iterator[None]:
    """Inside, operations go the way they go while a CUDA graph is captured: make the calls before a capture in here.

    With a mask that is another way than the usual one (the number of kept tokens stays on the device), with kernels of
    its own. Triton compiles and loads a kernel when it first meets it, which must not happen inside a capture.
    """
    if objection():  # nothing can be captured here
        yield
        return
    settings = engine().settings
    before, settings.counted = settings.counted, True
    try:
        yield
    finally:
        settings.counted = before


def _call(name: str, device_of: int) -> Implementation:
    """The function `name` of the engine, with the device of its argument number `device_of` made current."""

    def call(*arguments: Argument) -> tuple[Tensor, ...]:
        tensor: Tensor = arguments[device_of]
        function: Implementation = getattr(engine(), name)
        if not tensor.is_cuda:
            return function(*arguments)
        with torch.cuda.device(tensor.device):
            return function(*arguments)

    return call


@cache
def objection() -> str:
    """Why the kernels cannot run here; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if not _interpreted and torch.cuda.device_count() == 0:
        return "no CUDA device is visible"
    return ""


mark_unavailable("triton", objection)
_devices = ("cuda", "cpu") if _interpreted else ("cuda",)
_dtypes = (torch.float32, torch.bfloat16, torch.float16)
_backward = _call("selected_logprob_backward", 2)
offer("selected_logprob", "triton", Entry(_call("selected_logprob", 0), _backward, _devices, _dtypes))
offer("grpo_loss", "triton", Entry(_call("grpo_loss", 0), None, _devices, _dtypes))
offer("maskgit_grpo_loss", "triton", Entry(_call("maskgit_grpo_loss", 0), None, _devices, _dtypes))
_backward = _call("qk_norm_rotary_backward", 0)
offer("qk_norm_rotary", "triton", Entry(_call("qk_norm_rotary", 0), _backward, _devices, _dtypes))
