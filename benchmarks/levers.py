"""The levers of a rollout step, each with a way to run the step with it and without it; benchmarks/engine_gpu.py times
both, and experiments/cost_tables.py predicts for some what they save.

Everything else of the step is as everybody gets it. A lever that cannot be had on a device says why.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import torch

from pyunictokens.models import Showo, adjoining, fused_gelu
from pyunictokens.models.fp8 import Fp8Products
from pyunictokens.models.showo import buffers, compiled, kernels, layers
from pyunictokens.ops import registry, rotary

Way = Callable[[Showo], AbstractContextManager[object]]
"""A context in which steps of a model are made and run."""
Objection = Callable[[Showo], str]
"""Why a lever cannot be had; empty if it can. It may raise."""


MISSING = "not to be had here"
"""How the reason of a lever that a machine does not have begins."""


@dataclass(frozen=True)
class Lever:
    """One choice that the step makes."""

    key: str
    """As experiments/cost_tables.py names its prediction, where there is one."""
    text: str
    on: Way
    off: Way
    objection: Objection = lambda model: ""
    heads: tuple[str, str] = ("auto", "auto")
    """Of the codes, with the lever and without."""
    seconds: float = 6.0
    """Of an H100, about, for both sides: with less left it does not begin."""


def plain(model: Showo) -> AbstractContextManager[object]:
    """As everybody gets it."""
    return nullcontext()


def told(**variables: str) -> Way:
    """With variables of the environment."""
    return lambda model: patch.dict(os.environ, variables)


def _replaced(owner: object, name: str, value: object) -> Way:
    return lambda model: patch.object(owner, name, value)


@contextmanager
def _compiled(model: Showo) -> Iterator[None]:
    with model.__dict__.setdefault("_lever_blocks", model.compiled_blocks()):  # one object: compiled once
        yield


@contextmanager
def _fp8(model: Showo) -> Iterator[None]:
    with model.__dict__.setdefault("_lever_fp8", Fp8Products(model)):  # one object: captured steps read its buffers
        yield


def _kernel(name: str) -> Objection:
    def objection(model: Showo) -> str:
        if model.device.type != "cuda":
            return "attention kernels are chosen on a GPU"
        if reason := kernels._objection(name, torch.cuda.get_device_capability(model.device)):
            return reason
        with patch.dict(os.environ, {kernels.SWITCH: name}):
            found, reason = kernels.attention_way(model.device)
        return "" if found == kernels.KERNELS[name].name else f"{found} runs in its place: {reason}"

    return objection


def _fp8_objection(model: Showo) -> str:
    if model.device.type == "cuda" and torch.cuda.get_device_capability(model.device) < (8, 9):
        return "this GPU has no products in e4m3"
    return ""


def _buffers_objection(model: Showo) -> str:
    serve = buffers.buffers_serve(model.device, model.dtype, model.config.head_dim)
    return "" if serve else "no attention kernel here reads lengths from the device"


def _gelu_objection(model: Showo) -> str:
    way, why = fused_gelu.gelu_way(model.device, model.dtype)
    return "" if way == "fused" else why


def _rotary_objection(model: Showo) -> str:
    found = registry.choose(rotary.NAME, None, model.device, model.dtype)
    return "there is no kernel for it here" if found == "reference" else ""


def _attention(name: str, text: str, **more: str) -> Lever:
    """An attention kernel against torch's own."""
    on, off = told(**{kernels.SWITCH: name}, **more), told(**{kernels.SWITCH: "torch"}, **more)
    return Lever(f"attention {name}", text, on, off, _kernel(name))


LEVERS: tuple[Lever, ...] = (
    Lever(
        "buffers",
        "keys and values in buffers that stay",
        told(**{buffers.SWITCH: "1"}),
        told(**{buffers.SWITCH: "0"}),
        _buffers_objection,
    ),
    Lever(
        "rotary",
        "q/k norm and rotary in one kernel",
        plain,
        _replaced(layers, "qk_norm_rotary", functools.partial(rotary.qk_norm_rotary, backend="reference")),
        _rotary_objection,
    ),
    Lever("head", "16-bit head of the codes", plain, plain, heads=("16bit", "float32")),
    Lever(
        "gelu",
        "GELU in the product's epilogue",
        plain,
        _replaced(fused_gelu, "_fused", lambda device, dtype: False),
        _gelu_objection,
    ),
    Lever(
        "qkv",
        "queries, keys and values from one product",
        _replaced(adjoining, "DEVICES", ("cuda", "cpu")),
        _replaced(adjoining, "DEVICES", ()),
    ),
    _attention("flash3", "flash-attn 3 in place of torch's flash kernel"),
    _attention("flash2", "flash-attn 2 in place of torch's flash kernel"),
    # Over buffers with lengths on the device cuDNN leaves the work to torch's kernel.
    _attention("cudnn", "cuDNN's attention in place of torch's flash kernel, without buffers", **{buffers.SWITCH: "0"}),
    Lever("fp8", "products of the blocks in e4m3", _fp8, plain, _fp8_objection, seconds=8.0),
    Lever(
        "compiled",
        "blocks compiled by torch.compile",
        _compiled,
        plain,
        lambda model: compiled.objection(model.device),
        seconds=25.0,
    ),
)
"""Those that are surest to run come first: what the last ones do to the process costs no other number."""
