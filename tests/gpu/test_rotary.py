"""Layer norm with partial rotary of q and k by each backend, against float64: values and all six gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyunictokens.ops import rotary

from . import support

NAMES = ("q", "k", "q_weight", "q_bias", "k_weight", "k_bias")
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}
"""Relative error of a whole tensor that one rounding to the dtype makes."""
SHAPES = {"cpu": (2, 2, 5, 10, 6), "cuda": (3, 5, 77, 64, 32)}
"""Batch rows, heads, positions, head width, entries that turn."""


def _run(values: dict[str, Tensor], dtype: torch.dtype, grads: tuple[Tensor, Tensor], backend: str) -> list[Tensor]:
    leaves = {name: value.detach().to(dtype).requires_grad_(name in NAMES) for name, value in values.items()}
    order = ("q", "k", "cos", "sin", *NAMES[2:])
    q, k = rotary.qk_norm_rotary(*(leaves[name] for name in order), 1e-5, backend=backend)
    return [q, k, *torch.autograd.grad((q, k), [leaves[name] for name in NAMES], [grad.to(dtype) for grad in grads])]


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_values_and_gradients(device: str, backend: str, dtype: torch.dtype) -> None:
    if backend not in ("reference", "triton"):
        pytest.skip("this operation has two backends")
    support.need(rotary.NAME, backend, device, dtype)
    torch.manual_seed(7)
    rows, heads, length, width, turned = SHAPES[device]
    angle = torch.rand(length, turned) * 6
    values = {name: (torch.randn(rows, length, heads, width) * 3 + 1).transpose(1, 2) for name in NAMES[:2]}
    values |= {name: torch.randn(width) for name in NAMES[2:]} | {"cos": angle.cos(), "sin": angle.sin()}
    values = {name: value.to(device, dtype) for name, value in values.items()}
    grads = torch.randn_like(values["q"]), torch.randn_like(values["k"])
    found, truth = _run(values, dtype, grads, backend), _run(values, torch.float64, grads, "reference")
    several = 4 if backend == "reference" else 1  # the plain path rounds after each operation
    for name, mine, wanted in zip(("q out", "k out", *NAMES), found, truth, strict=True):
        error = (mine.double() - wanted).norm() / wanted.norm()
        assert mine.dtype == dtype and error <= several * ROUNDING[dtype], f"{name}: relative error {error:.2g}"
