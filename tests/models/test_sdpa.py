"""Attention of every model: the definition in float64, whatever dtype the operands have."""

from __future__ import annotations

import pytest
import torch

from pyunictokens.models.sdpa import attend


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["all", "mask", "added", "causal"])
def test_attention_and_its_gradient_are_those_of_the_definition(dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(0)
    length = past = 7
    q, k, v = (torch.randn(3, 2, n, 8).to(dtype).requires_grad_(True) for n in (length, past, past))
    seen = torch.rand(3, 1, length, past) < 0.6
    seen[..., 0] = True
    seen = torch.ones(length, past).tril().bool() if kind == "causal" else seen
    mask = {"mask": seen, "added": torch.where(seen, 0.0, -torch.inf).to(dtype)}.get(kind)
    found = attend(q, k, v, mask, causal=kind == "causal", scale=0.3)
    assert found.dtype == dtype
    if dtype in (torch.bfloat16, torch.float16):  # the float32 result, rounded once
        wide_mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
        longer = attend(*(each.detach().float() for each in (q, k, v)), wide_mask, causal=kind == "causal", scale=0.3)
        assert torch.equal(found, longer.to(dtype))
    wide = [each.detach().double().requires_grad_(True) for each in (q, k, v)]
    scores = 0.3 * wide[0] @ wide[1].transpose(-1, -2)
    scores = scores if kind == "all" else scores.masked_fill(~seen, -torch.inf)
    wanted = scores.softmax(-1) @ wide[2]
    grad = torch.randn(wanted.shape, dtype=torch.float64).to(dtype)
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=near, atol=near)
    ours = torch.autograd.grad(found, (q, k, v), grad)
    theirs = torch.autograd.grad(wanted, wide, grad.double())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=near, atol=near)
