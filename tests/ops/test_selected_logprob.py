"""selected_logprob against float64 torch that holds the logits: values, gradients, dtypes, odd shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pyunictokens as uct
from pyunictokens.ops import reference

from . import naive

CASES = [  # leading shape, D, K, guidance, temperature, with bias
    ((3, 5, 7), 13, 29, 5.0, 1.0, True),
    ((11,), 8, 3, 0.0, 0.7, True),
    ((2, 1), 5, 1, 2.5, 1.3, False),
    ((), 6, 17, 1.0, 1.0, True),
    ((0, 4), 6, 17, 0.0, 1.0, True),
]


def _inputs(lead: tuple[int, ...], width: int, entries: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    double = torch.float64
    return (
        torch.randn(*lead, width, dtype=double),
        torch.randn(*lead, width, dtype=double),
        torch.randn(entries, width, dtype=double) / width**0.5,
        torch.randn(entries, dtype=double),
        torch.randint(0, entries, lead),
    )


@pytest.fixture(params=[1 << 22, 40])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Everything in one chunk, and a few rows at a time."""
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", request.param)
    return request.param


@pytest.mark.parametrize(("lead", "width", "entries", "scale", "temperature", "with_bias"), CASES)
def test_values_and_gradients(
    chunk: int, lead: tuple[int, ...], width: int, entries: int, scale: float, temperature: float, with_bias: bool
) -> None:
    *leaves, target = _inputs(lead, width, entries)
    hidden, uncond, weight, bias = [x.requires_grad_() for x in leaves]
    wanted = naive.logprob(
        target, naive.logits(hidden, weight, bias if with_bias else None, uncond, scale, temperature)
    )
    grad = torch.randn(lead, dtype=torch.float64)
    wanted_grads = torch.autograd.grad(wanted, [hidden, uncond, weight, bias], grad, allow_unused=True)

    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        copies = [x.detach().to(dtype).requires_grad_() for x in (hidden, uncond, weight, bias)]
        found = uct.ops.selected_logprob(
            copies[0],
            copies[2],
            target,
            copies[3] if with_bias else None,
            hidden_uncond=copies[1],
            guidance_scale=scale,
            temperature=temperature,
            backend="reference",
        )
        assert found.dtype == dtype
        assert found.shape == target.shape
        assert torch.allclose(found.double(), wanted, atol=tolerance, rtol=tolerance)
        grads = torch.autograd.grad(found, copies, grad.to(dtype), allow_unused=True)
        for got, want in zip(grads, wanted_grads, strict=True):
            if want is None:
                assert got is None
            else:
                assert torch.allclose(got.double(), want, atol=10 * tolerance, rtol=10 * tolerance)


def test_gradcheck() -> None:
    *leaves, target = _inputs((2, 3), 4, 7)
    hidden, uncond, weight, bias = [x.requires_grad_() for x in leaves]

    def call(hidden: Tensor, uncond: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return uct.ops.selected_logprob(
            hidden, weight, target, bias, hidden_uncond=uncond, guidance_scale=1.5, temperature=0.8
        )

    assert torch.autograd.gradcheck(call, (hidden, uncond, weight, bias))


def test_only_the_wanted_gradients_are_formed() -> None:
    hidden, _, weight, bias, target = _inputs((4,), 6, 9)
    bias.requires_grad_()
    uct.ops.selected_logprob(hidden, weight, target, bias).sum().backward()
    assert hidden.grad is None
    assert weight.grad is None
    probability = torch.softmax(naive.logits(hidden, weight, bias.detach(), None, 0, 1), -1)
    wanted = (torch.nn.functional.one_hot(target, 9) - probability).sum(0)
    assert bias.grad is not None
    assert torch.allclose(bias.grad, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    hidden, uncond, weight, bias, target = _inputs((4, 9), 32, 65)
    low = [x.to(dtype).requires_grad_() for x in (hidden, uncond, weight, bias)]
    exact = [x.detach().double() for x in low]
    found = uct.ops.selected_logprob(low[0], low[2], target, low[3], hidden_uncond=low[1], guidance_scale=4.0)
    wanted = naive.logprob(target, naive.logits(exact[0], exact[2], exact[3], exact[1], 4.0, 1.0))
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), wanted, atol=1e-4)
    found.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == dtype for x in low)


def test_an_excluded_entry_has_no_probability_and_no_gradient() -> None:
    hidden, _, weight, bias, target = _inputs((6,), 5, 8)
    target = target.clamp_max(6)
    bias[7] = -torch.inf
    weight.requires_grad_()
    found = uct.ops.selected_logprob(hidden, weight, target, bias)
    assert torch.allclose(found, naive.logprob(target, naive.logits(hidden, weight[:7], bias[:7], None, 0, 1)))
    found.sum().backward()
    assert weight.grad is not None
    assert (weight.grad[7] == 0).all()
    assert torch.isfinite(weight.grad).all()
