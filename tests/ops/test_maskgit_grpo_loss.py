"""maskgit_grpo_loss against selected log-probs and the loss, both written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pyunictokens as uct
from pyunictokens.ops import reference

from . import naive

CASES = [  # R, T, N, D, K, guidance, beta, temperature, mask, bias
    (3, 2, 7, 12, 31, 5.0, 0.01, 1.0, "some", True),
    (2, 3, 5, 8, 17, 0.0, 0.0, 0.7, "none", True),
    (1, 1, 1, 4, 3, 2.0, 0.1, 1.3, "some", False),
    (2, 2, 3, 5, 9, 1.0, 0.05, 1.0, "rows", True),
    (2, 2, 3, 5, 9, 1.0, 0.05, 1.0, "all false", True),
]


def _problem(
    shape: tuple[int, int, int], width: int, entries: int, scale: float, temperature: float, mask_kind: str, bias: bool
) -> dict[str, Tensor | None]:
    double = torch.float64
    values: dict[str, Tensor | None] = {
        "hidden": torch.randn(*shape, width, dtype=double),
        "uncond": torch.randn(*shape, width, dtype=double) if scale else None,
        "weight": torch.randn(entries, width, dtype=double) / width**0.5,
        "bias": torch.randn(entries, dtype=double) if bias else None,
        "target": torch.randint(0, entries, shape),
        "advantages": torch.randn(shape[0], dtype=double),
        "mask": {
            "none": None,
            "some": torch.rand(shape) > 0.4,
            "rows": torch.tensor([True, False]).view(2, 1, 1),
            "all false": torch.zeros(shape, dtype=torch.bool),
        }[mask_kind],
    }
    scores = naive.logits(values["hidden"], values["weight"], values["bias"], values["uncond"], scale, temperature)
    logp = naive.logprob(values["target"], scores)
    values["old"] = logp + 0.3 * torch.randn_like(logp)
    values["ref"] = logp + 0.2 * torch.randn_like(logp)
    return values


@pytest.fixture(params=[1 << 22, 64])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Everything in one chunk, and a few rows at a time."""
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", request.param)
    return request.param


@pytest.mark.parametrize("case", CASES)
def test_values_gradients_and_statistics(chunk: int, case: tuple) -> None:
    r, t, n, width, entries, scale, beta, temperature, mask_kind, with_bias = case
    p = _problem((r, t, n), width, entries, scale, temperature, mask_kind, with_bias)
    names = [name for name in ("hidden", "uncond", "weight", "bias") if p[name] is not None]
    for name in names:
        p[name].requires_grad_()
    scores = naive.logits(p["hidden"], p["weight"], p["bias"], p["uncond"], scale, temperature)
    logp = naive.logprob(p["target"], scores)
    ref = p["ref"] if beta else None
    wanted, statistics = naive.loss(logp, p["old"], ref, p["advantages"], 0.6, 0.2, 0.2, beta, p["mask"])
    wanted_grads = torch.autograd.grad(wanted, [p[name] for name in names])
    keep = torch.ones(r, t, n, dtype=torch.bool) if p["mask"] is None else p["mask"].expand(r, t, n)
    entropy = torch.distributions.Categorical(logits=scores.detach()).entropy()[keep].sum() / keep.sum().clamp_min(1)

    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        f = {key: x.detach().to(dtype) if x is not None and x.is_floating_point() else x for key, x in p.items()}
        for name in names:
            f[name].requires_grad_()
        loss, found, stats = uct.ops.maskgit_grpo_loss(
            f["hidden"],
            f["weight"],
            f["target"],
            f["old"],
            f["ref"] if beta else None,
            f["advantages"],
            f["bias"],
            hidden_uncond=f["uncond"],
            guidance_scale=scale,
            temperature=temperature,
            beta=beta,
            mask=f["mask"],
            backend="reference",
        )
        assert loss.dtype == dtype
        assert torch.allclose(loss.double(), wanted, rtol=tolerance, atol=tolerance)
        assert not found.requires_grad
        assert torch.allclose(found[keep].double(), logp[keep], rtol=tolerance, atol=tolerance)
        assert (found[~keep] == 0).all()
        for key, value in {**statistics, "entropy": entropy}.items():
            assert torch.allclose(getattr(stats, key).double(), value, rtol=tolerance, atol=tolerance), key
        grads = torch.autograd.grad(loss, [f[name] for name in names])
        for name, got, want in zip(names, grads, wanted_grads, strict=True):
            assert torch.allclose(got.double(), want, rtol=tolerance, atol=tolerance), name


def test_it_is_the_two_smaller_operations_in_one() -> None:
    p = _problem((3, 2, 4), 6, 11, 3.0, 1.0, "some", True)
    alpha = torch.rand(2, 1, dtype=torch.float64)
    leaves = [p[name].requires_grad_() for name in ("hidden", "uncond", "weight", "bias")]
    logp = uct.ops.selected_logprob(
        p["hidden"], p["weight"], p["target"], p["bias"], hidden_uncond=p["uncond"], guidance_scale=3.0
    )
    apart, stats_apart = uct.ops.grpo_loss(
        logp, p["old"], p["ref"], p["advantages"], alpha=alpha, beta=0.02, mask=p["mask"]
    )
    grads_apart = torch.autograd.grad(apart, leaves)
    loss, _, stats = uct.ops.maskgit_grpo_loss(
        p["hidden"],
        p["weight"],
        p["target"],
        p["old"],
        p["ref"],
        p["advantages"],
        p["bias"],
        hidden_uncond=p["uncond"],
        guidance_scale=3.0,
        alpha=alpha,
        beta=0.02,
        mask=p["mask"],
    )
    assert torch.allclose(loss, apart)
    assert torch.allclose(torch.stack(stats[:4]), torch.stack(stats_apart[:4]))
    for got, want in zip(torch.autograd.grad(2 * loss, leaves), grads_apart, strict=True):
        assert torch.allclose(got, 2 * want)


def test_gradcheck() -> None:
    p = _problem((2, 1, 3), 4, 7, 1.5, 1.0, "some", True)
    p["old"] = p["old"].detach() + 5.0  # ratios near 0: away from the kinks of the clipping
    leaves = [p[name].requires_grad_() for name in ("hidden", "uncond", "weight", "bias")]

    def call(hidden: Tensor, uncond: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return uct.ops.maskgit_grpo_loss(
            hidden,
            weight,
            p["target"],
            p["old"],
            p["ref"],
            p["advantages"],
            bias,
            hidden_uncond=uncond,
            guidance_scale=1.5,
            beta=0.3,
            mask=p["mask"],
        )[0]

    assert torch.autograd.gradcheck(call, leaves)


def test_without_gradients_none_is_formed() -> None:
    p = _problem((2, 2, 3), 5, 9, 0.0, 1.0, "none", True)
    p["hidden"].requires_grad_()
    with torch.no_grad():
        loss, _, _ = uct.ops.maskgit_grpo_loss(
            p["hidden"], p["weight"], p["target"], p["old"], p["ref"], p["advantages"], p["bias"]
        )
    assert not loss.requires_grad
    wanted, _ = naive.loss(
        naive.logprob(p["target"], naive.logits(p["hidden"].detach(), p["weight"], p["bias"], None, 0, 1)),
        p["old"],
        p["ref"],
        p["advantages"],
        0.6,
        0.2,
        0.2,
        0.01,
        None,
    )
    assert torch.allclose(loss, wanted)


def test_masked_tokens_cost_no_matrix_work(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 0
    linear = torch.nn.functional.linear

    def counting(x: Tensor, *rest: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x)
        return linear(x, *rest)

    monkeypatch.setattr(reference.torch.nn.functional, "linear", counting)
    p = _problem((2, 3, 5), 4, 7, 0.0, 1.0, "some", True)
    rows = 0
    uct.ops.maskgit_grpo_loss(
        p["hidden"].requires_grad_(), p["weight"], p["target"], p["old"], p["ref"], p["advantages"], mask=p["mask"]
    )[0].backward()
    assert rows == int(p["mask"].sum())
