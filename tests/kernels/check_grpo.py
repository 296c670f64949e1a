"""grpo_loss of the `triton` backend, interpreted, against float64: loss, statistics and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pyunictokens as uct
from pyunictokens.kernels import grpo as kernels
from tests.ops import naive

CASES = [  # shape, mask, alpha, with a reference
    ((3, 7), "none", "number", True),
    ((2, 5, 130), "some", "tensor", True),
    ((5,), "none", "number", False),
    ((2, 3, 4), "empty", "tensor", True),
    ((4, 600), "rows", "step", False),
]


@pytest.mark.parametrize(("shape", "mask", "alpha", "with_ref"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("programs", [1024, 2])
def test_values(
    shape: tuple[int, ...],
    mask: str,
    alpha: str,
    with_ref: bool,
    dtype: torch.dtype,
    programs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "MOST_PROGRAMS", programs)
    double = torch.float64
    old = -torch.rand(shape, dtype=double) * 4
    gap = torch.rand(shape, dtype=double) * 0.1
    gap = torch.where(torch.rand(shape) < 0.4, gap + 0.35, gap) * torch.randn(shape).sign()
    logp = (old + gap).to(dtype)
    old = old.float()
    ref = (logp.float() + 0.1 * torch.randn(shape)) if with_ref else None
    keep = {
        "none": None,
        "some": torch.rand(shape) > 0.5,
        "empty": torch.zeros(shape, dtype=torch.bool),
        "rows": torch.rand(shape[0], *[1] * (len(shape) - 1)) > 0.5,
    }[mask]
    weights = {"number": 0.7, "tensor": torch.rand(shape), "step": torch.rand(shape[-1])}[alpha]
    advantages = torch.randn(shape[0])
    beta = 0.05 if with_ref else 0.0

    leaf, truth = logp.clone().requires_grad_(), logp.double().requires_grad_()
    loss, stats = uct.ops.grpo_loss(leaf, old, ref, advantages, alpha=weights, beta=beta, mask=keep, backend="triton")
    exact: Tensor | float = weights.double() if isinstance(weights, Tensor) else weights
    reference = None if ref is None else ref.double()
    arguments = old.double(), reference, advantages.double(), exact, 0.2, 0.2, beta, keep
    wanted, statistics = naive.loss(truth, *arguments)
    scale = advantages.abs().max().item() * leaf.numel() / shape[0]
    assert abs(loss.item() - wanted.item()) <= 1e-6 * scale
    for name, value in statistics.items():
        assert torch.allclose(getattr(stats, name).double(), value, rtol=1e-5, atol=1e-7), name
    assert stats.entropy is None
    with torch.no_grad():
        quiet, same = uct.ops.grpo_loss(
            leaf, old, ref, advantages, alpha=weights, beta=beta, mask=keep, backend="triton"
        )
    assert torch.equal(quiet, loss) and torch.equal(same.kl, stats.kl), "without a gradient the rest is the same"
    (got,), (want,) = torch.autograd.grad(loss, [leaf]), torch.autograd.grad(wanted, [truth])
    assert got.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert torch.allclose(got.double(), want, rtol=tolerance, atol=1e-8 if dtype == torch.float32 else 1e-6)


def test_small_gaps_to_the_reference_are_exact() -> None:
    gap = torch.tensor([[1e-6, -1e-4, 3e-3, 0.4999, -0.5001, 2.0, 0.0]], dtype=torch.float64)
    zero = torch.zeros(gap.shape)
    logp = zero.clone().requires_grad_()
    rounded = gap.float().double()
    loss, _ = uct.ops.grpo_loss(logp, zero, gap.float(), torch.zeros(1), beta=1.0, backend="triton")
    (slope,) = torch.autograd.grad(loss, [logp])
    assert torch.allclose(slope.double(), -torch.expm1(rounded), rtol=1e-6, atol=0.0)
    assert torch.allclose(loss.double(), (torch.expm1(rounded) - rounded).sum(), rtol=1e-6, atol=0.0)


def test_what_is_masked_out_may_be_nan() -> None:
    logp, old = torch.randn(2, 9), torch.randn(2, 9)
    mask = torch.rand(2, 9) > 0.5
    wanted, _ = uct.ops.grpo_loss(logp, old, old, torch.ones(2), mask=mask, backend="triton")
    for values in (logp, old):
        values[~mask] = torch.nan
    leaf = logp.requires_grad_()
    loss, stats = uct.ops.grpo_loss(leaf, old, old, torch.ones(2), mask=mask, backend="triton")
    loss.backward()
    assert torch.equal(loss, wanted)
    assert torch.isfinite(leaf.grad).all() and not leaf.grad[~mask].any()
    assert all(torch.isfinite(x) for x in stats[:4])


@pytest.mark.parametrize("tokens", [5, 700])
@pytest.mark.parametrize("with_ref", [False, True])
def test_what_is_nan_is_seen(tokens: int, with_ref: bool) -> None:
    logp, old = torch.full((2, tokens), -1.0), torch.full((2, tokens), -1.1)
    logp[1, 2] = torch.nan
    ref, beta = (old, 0.01) if with_ref else (None, 0.0)
    found = []
    for backend in ("triton", "reference"):
        leaf = logp.clone().requires_grad_()
        loss, stats = uct.ops.grpo_loss(leaf, old, ref, torch.tensor([1.0, -1.0]), beta=beta, backend=backend)
        found.append([loss.detach(), *stats[:4], torch.autograd.grad(loss, leaf)[0]])
    assert found[0][0].isnan() and found[0][3].isnan() and found[0][5].isnan().sum() == 1
    for mine, wanted in zip(*found, strict=True):
        assert torch.allclose(mine, wanted, rtol=1e-5, equal_nan=True)


def test_without_a_reference_there_is_no_distance_to_it() -> None:
    logp, old = torch.zeros(1, 4), torch.tensor([[0.0, -200.0, 200.0, 0.0]])
    loss, stats = uct.ops.grpo_loss(logp, old, None, torch.ones(1), beta=0.0, backend="triton")
    assert loss.item() == pytest.approx(-3.2) and stats.kl == 0.0 and stats.ratio_max == torch.inf


def test_strides_and_repetition() -> None:
    logp = torch.randn(7, 3).T.requires_grad_()
    old = torch.randn(3, 7)
    runs = [uct.ops.grpo_loss(logp, old, None, torch.ones(3), beta=0.0, backend="triton") for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    wanted, _ = uct.ops.grpo_loss(logp, old, None, torch.ones(3), beta=0.0, backend="reference")
    (got,), (want,) = torch.autograd.grad(runs[0][0], [logp]), torch.autograd.grad(wanted, [logp])
    assert torch.allclose(got, want, rtol=1e-5)
