"""Codes and ids of any integer type: the result is that of int64, bit for bit, on every path of the operations."""

from __future__ import annotations

import pytest
import torch

from pyunictokens import ops

TYPES = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32]


def _same(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)  # type: ignore[arg-type]
    return left == right if not isinstance(left, tuple) else all(map(_same, left, right))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_targets_of_any_integer_type(dtype: torch.dtype, backend: str | None) -> None:
    generator = torch.Generator().manual_seed(int(torch.randint(0, 1 << 30, ())))
    hidden, weight = torch.randn(2, 3, 5, 8, generator=generator), torch.randn(100, 8, generator=generator)
    target = torch.randint(0, 100, (2, 3, 5), generator=generator)
    logp = ops.selected_logprob(hidden, weight, target, backend=backend)
    assert torch.equal(ops.selected_logprob(hidden, weight, target.to(dtype), backend=backend), logp)
    rest = (logp - 0.1, logp + 0.1, torch.randn(2, generator=generator))
    results = []
    for each in (target, target.to(dtype)):
        x = hidden.clone().requires_grad_()
        loss, found, stats = ops.maskgit_grpo_loss(x, weight, each, *rest, backend=backend)
        loss.backward()
        results.append((loss.detach(), found, stats.kl, x.grad))
    assert _same(*results)


@pytest.mark.parametrize("dtype", [dtype for dtype in TYPES if dtype.is_signed])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_codes_of_any_signed_type(dtype: torch.dtype, backend: str | None) -> None:
    logits, codes = torch.randn(3, 7, 50), torch.randint(-1, 50, (3, 7))
    options = {"mask_len": 2, "temperature": 0.7, "seed": 3, "sample_ids": torch.arange(3), "step": 1}
    plain = ops.maskgit_step(logits, codes, **options, backend=backend)
    small = ops.maskgit_step(logits, codes.to(dtype), **options, backend=backend)
    assert small.codes.dtype == small.chosen.dtype == torch.int64
    assert all(_same(getattr(plain, name), getattr(small, name)) for name in ("codes", "chosen", "logp", "masked"))
