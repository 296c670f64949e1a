"""GELU within the product before it, on CPU and GPU: values against float64, and that a GPU has it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyunictokens.models.fused_gelu import NEAR, gelu_way, linear_gelu
from tests.models.test_fused_gelu import layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_values(device, dtype):
    way, why = gelu_way(torch.device(device), dtype)
    assert way == ("fused" if device == "cuda" else "plain"), why
    for width, inner in ((37, 51), (64, 256)):
        linear = layer(dtype, width, inner).to(device)
        x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(2)).to(device, dtype)
        truth = F.gelu(F.linear(x.double(), linear.weight.double(), linear.bias.double()), approximate="tanh")
        found = linear_gelu(linear, x).double()
        unit = torch.finfo(dtype).eps / 2
        if way == "fused":  # rounded once, of a tanh that is good to 2⁻¹¹
            allowed = unit * truth.abs() + NEAR
        else:  # the sum is rounded, then GELU of it, whose slope is at most 1.13
            allowed = 3 * unit * truth.abs().clamp_min(1.0) + 2e-5
        assert ((found - truth).abs() <= allowed).all()
