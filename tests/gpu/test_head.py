"""The head of the codes in a rollout, on CPU and GPU: both forms within a bound of float64, and which one is taken."""

from __future__ import annotations

import pytest
import torch

from pyunictokens.rollout.head import CodeHead, GuidedStates
from tests.rollout.test_head import NARROW, case, truth

TENSOR_CORES = 4
"""Float32 sums within tensor cores may drop what is below the last bit instead of rounding it."""


@pytest.mark.parametrize("kind", ["auto", "16bit", "float32"])
@pytest.mark.parametrize("scale", [0.0, 5.0])
@pytest.mark.parametrize("shape", [(3, 7, 37, 29), (2, 65, 256, 520)], ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_values(device, dtype, shape, scale, kind):
    model, cond, uncond = case(dtype, shape, 11)
    wanted, bound = truth(model, cond, uncond, torch.full((len(cond),), scale))
    model.parts = tuple(None if part is None else part.to(device) for part in model.parts)
    cond, uncond = cond.to(device), uncond.to(device)
    head = CodeHead(model, kind)
    assert head.narrow == (kind == "16bit" or (kind == "auto" and device == "cuda"))
    found = head(GuidedStates(cond, uncond, scale) if scale else GuidedStates(cond))
    allowed = bound * (TENSOR_CORES if head.narrow and device == "cuda" else 1)
    assert found.dtype == torch.float32 and ((found.cpu() - wanted).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_rows_with_guidance_of_their_own(device, dtype):
    model, cond, uncond = case(dtype, (5, 7, 37, 29), 3)
    s = torch.tensor([5.0, 0.3, 2.0, 0.0, 0.0], dtype=torch.float64)
    wanted, bound = truth(model, cond, uncond, s)
    model.parts = tuple(None if part is None else part.to(device) for part in model.parts)
    found = CodeHead(model, "16bit")(GuidedStates(cond.to(device), uncond[:3].to(device), s[:3]))
    assert ((found.cpu() - wanted).abs() <= TENSOR_CORES * bound).all()
