"""Twice the same, bit by bit: in another place of memory, after other work, in any batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from . import support
from .support import VARIANTS

LARGER = {"cpu": (2, 2, 9, 8, 40), "cuda": (4, 5, 256, 192, 4096)}


def _all(backend: str, h: support.Head, operation: str) -> list[Tensor]:
    if operation == "selected_logprob":
        result = support.logprob(h, backend)
        return [result, *support.gradients(result, h)]
    if operation == "grpo_loss":
        logp = (h["old"] + 0.1 * h["upstream"]).requires_grad_()
        loss = support.tokens_loss(logp, h, backend)
        return [loss, *torch.autograd.grad(loss, logp)]
    loss, logp, stats = support.fused(h, backend)
    return [loss, logp, *(x for x in stats if x is not None), *support.gradients(loss, h)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", ["selected_logprob", "grpo_loss", "maskgit_grpo_loss"])
def test_the_same_twice(device: str, backend: str, operation: str, dtype: torch.dtype) -> None:
    support.need(operation, backend, device, dtype if operation != "grpo_loss" else torch.float32)
    h = support.head(device, dtype, LARGER[device], **VARIANTS["masked guided"])
    first = [x.clone() for x in _all(backend, h, operation)]
    noise = [torch.randn(1 << (10 + i), device=device) for i in range(8)]  # other places, other contents
    for _ in range(3):
        del noise[:1]
        for mine, again in zip(first, _all(backend, h, operation), strict=True):
            assert torch.equal(mine, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_twice_and_in_another_batch(device: str, backend: str, dtype: torch.dtype) -> None:
    support.need("maskgit_step", backend, device, dtype)
    s = support.step(device, dtype)
    first, again = s(backend), s(backend)
    for mine, other in zip(first, again, strict=True):
        assert torch.equal(mine, other)
    order = torch.arange(len(s.logits) - 1, -1, -1, device=device)
    turned = {k: v[order] if isinstance(v, Tensor) else v for k, v in s.arguments.items()}
    for mine, other in zip(first, support.Step(s.logits[order], turned)(backend), strict=True):
        assert torch.equal(mine[order], other)
