"""Gradients against finite differences of the float64 truth, and `gradcheck` where a backend takes float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from . import support
from .support import VARIANTS, Head

SMALL = (2, 2, 3, 5, 7)


@pytest.mark.parametrize("variant", ["bias", "guided"])
def test_gradcheck_in_float64(device: str, backend: str, variant: str) -> None:
    support.need("selected_logprob", backend, device, torch.float64)
    h = support.head(device, torch.float64, SMALL, **VARIANTS[variant])

    def call(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        names = [name for name in ("hidden", "weight", "bias", "uncond") if h.get(name) is not None]
        mine = Head({**h.tensors, **dict(zip(names, leaves, strict=True))}, h.guidance, h.temperature)
        return support.logprob(mine, backend), support.fused(mine, backend)[0]

    assert torch.autograd.gradcheck(call, tuple(h.leaves), atol=1e-6)


@pytest.mark.parametrize("operation", ["selected_logprob", "maskgit_grpo_loss"])
@pytest.mark.parametrize("variant", ["bias", "guided", "masked guided"])
def test_slope_along_a_direction(device: str, backend: str, operation: str, variant: str) -> None:
    """The analytic slope in float32 is that of the truth, by a central difference in float64."""
    support.need(operation, backend, device)
    h = support.head(device, torch.float32, seed=5, **VARIANTS[variant])
    one = operation == "selected_logprob"
    result = support.logprob(h, backend) if one else support.fused(h, backend)[0]
    found = support.gradients(result, h)
    exact = h.double()
    directions = [torch.randn_like(leaf) for leaf in exact.leaves]
    slope = sum((g.cpu().double() * d).sum() for g, d in zip(found, directions, strict=True))

    def at(distance: float) -> Tensor:
        with torch.no_grad():
            moved = {
                id(leaf): leaf + distance * direction for leaf, direction in zip(exact.leaves, directions, strict=True)
            }
            tensors = {name: moved.get(id(value), value) for name, value in exact.tensors.items()}
            there = Head(tensors, h.guidance, h.temperature)
            return (support.truth_logprob(there) * exact["upstream"]).sum() if one else support.truth_fused(there)

    near = 1e-6
    wanted = (at(near) - at(-near)) / (2 * near)
    parts = sum((g.cpu().double() * d).abs().sum() for g, d in zip(found, directions, strict=True))
    assert abs(slope - wanted) <= 1e-4 * abs(wanted) + 1e-5 * parts


def test_only_what_is_wanted_gets_a_gradient(device: str, backend: str) -> None:
    support.need("maskgit_grpo_loss", backend, device)
    h = support.head(device, torch.float32, **VARIANTS["guided"])
    full = support.gradients(support.fused(h, backend)[0], h)
    for keep in range(len(h.leaves)):
        for place, leaf in enumerate(h.leaves):
            leaf.requires_grad_(place == keep)
        alone = support.gradients(support.fused(h, backend)[0], h, [h.leaves[keep]])[0]
        torch.testing.assert_close(alone, full[keep], rtol=1e-5, atol=1e-7)
    for leaf in h.leaves:
        leaf.requires_grad_(False)
    assert not support.fused(h, backend)[0].requires_grad
