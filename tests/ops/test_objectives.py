"""Reductions of per-token log-probabilities, and the objectives built on them, against loops in float64."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pyunictokens as uct
from pyunictokens.ops import objectives
from pyunictokens.utils.errors import UserError

from . import naive

R, T, N, D, K = 3, 4, 7, 5, 9


def _inputs() -> Tensor:
    """Codes before each step: fewer unknown at every step, none after the last; sample 2 stands still once."""
    order = torch.rand(R, 1, N).argsort(-1)
    unknown = torch.tensor([[7, 5, 3, 1], [6, 4, 2, 1], [7, 4, 4, 2]])
    return torch.where(order < unknown[..., None], uct.MASK, torch.randint(0, K, (R, T, N)))


def _known_after(inputs: Tensor, r: int, t: int, n: int) -> bool:
    return t == T - 1 or int(inputs[r, t + 1, n]) != uct.MASK


def test_scopes_by_a_loop() -> None:
    inputs = _inputs()
    masked, fresh = uct.ops.token_mask(inputs, "masked"), uct.ops.token_mask(inputs, "newly_unmasked")
    assert uct.ops.token_mask(inputs, "all") is None
    for r in range(R):
        for t in range(T):
            for n in range(N):
                unknown = int(inputs[r, t, n]) == uct.MASK
                assert bool(masked[r, t, n]) == unknown
                assert bool(fresh[r, t, n]) == (unknown and _known_after(inputs, r, t, n))
    assert torch.equal(uct.ops.token_mask(inputs.to(torch.int16), "newly_unmasked"), fresh)
    assert fresh.sum() == (inputs[:, 0] == uct.MASK).sum()  # every code becomes known once


def _gradient(reduce: Callable[[Tensor], Tensor], by_loop: Callable[[Tensor], Tensor], logp: Tensor) -> None:
    """Both reductions agree, and so do their gradients for a random push."""
    logp = logp.detach().requires_grad_()
    found, wanted = reduce(logp), by_loop(logp)
    assert found.dtype == wanted.dtype and torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    push = torch.randn_like(found)
    got, want = (torch.autograd.grad(x, logp, push)[0] for x in (found, wanted))
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)


def test_sequences_by_a_loop() -> None:
    logp, mask = -torch.rand(R, T, N, dtype=torch.float64), torch.rand(R, T, N) < 0.4
    mask[1] = False

    def by_loop(x: Tensor) -> Tensor:
        rows = []
        for r in range(R):
            kept = [x[r, t, n] for t in range(T) for n in range(N) if mask[r, t, n]]
            rows.append(sum(kept, x.new_zeros(())) / max(len(kept), 1))
        return torch.stack(rows)

    _gradient(lambda x: uct.ops.sequence_logprob(x, mask), by_loop, logp)
    _gradient(uct.ops.sequence_logprob, lambda x: torch.stack([x[r].mean() for r in range(R)]), logp)
    broken = torch.where(mask, logp, torch.nan)
    assert torch.equal(uct.ops.sequence_logprob(broken, mask.int()), uct.ops.sequence_logprob(logp, mask))
    assert uct.ops.sequence_logprob(logp.to(torch.bfloat16)).dtype == torch.float32


def test_transitions_by_a_loop() -> None:
    inputs = _inputs()
    logp, stayed = -torch.rand(R, T, N, dtype=torch.float64), -torch.rand(R, T, N, dtype=torch.float64)

    def by_loop(x: Tensor, extra: Tensor | None) -> Tensor:
        result = []
        for r in range(R):
            for t in range(T):
                total = x.new_zeros(())
                for n in range(N):
                    if int(inputs[r, t, n]) != uct.MASK:
                        continue
                    if _known_after(inputs, r, t, n):
                        total = total + x[r, t, n]
                    elif extra is not None:
                        total = total + extra[r, t, n]
                result.append(total)
        return torch.stack(result).view(R, T)

    _gradient(lambda x: uct.ops.transition_logprob(x, inputs), lambda x: by_loop(x, None), logp)
    _gradient(lambda x: uct.ops.transition_logprob(x, inputs, stayed), lambda x: by_loop(x, stayed), logp)
    _gradient(lambda x: uct.ops.transition_logprob(logp, inputs, x), lambda x: by_loop(logp, x), stayed)


@pytest.mark.parametrize("chunk", [1 << 22, 20])
@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_the_mass_below_the_least_kept_code(monkeypatch: pytest.MonkeyPatch, chunk: int, scale: float) -> None:
    monkeypatch.setattr(objectives, "CHUNK_ELEMENTS", chunk)
    inputs, double = _inputs(), torch.float64
    leaves = [torch.randn(R, T, N, D, dtype=double), torch.randn(R, T, N, D, dtype=double), torch.randn(K, D).double()]
    leaves = [x.requires_grad_() for x in [*leaves, torch.randn(K, dtype=double)]]
    hidden, uncond, weight, bias = leaves
    logp_all = torch.log_softmax(naive.logits(hidden, weight, bias, uncond, scale, 0.8), -1)
    target = torch.randint(0, K, (R, T, N))
    chosen = logp_all.gather(-1, target[..., None])[..., 0].detach()

    threshold, wanted = torch.zeros(R, T, dtype=double), torch.zeros(R, T, N, dtype=double)
    for r in range(R):
        for t in range(T):
            fresh = [n for n in range(N) if inputs[r, t, n] == uct.MASK and _known_after(inputs, r, t, n)]
            threshold[r, t] = min((float(chosen[r, t, n]) for n in fresh), default=0.0)
            for n in range(N):
                if inputs[r, t, n] == uct.MASK and n not in fresh:
                    below = [p.exp() for p in logp_all[r, t, n] if p < threshold[r, t]]
                    total = sum(below) if below else torch.tensor(torch.finfo(double).tiny, dtype=double)
                    wanted[r, t, n] = total.log()
    assert torch.equal(uct.ops.lowest_kept(chosen, inputs), threshold)

    found = uct.ops.remasked_logprob(
        hidden, weight, threshold, inputs, bias, hidden_uncond=uncond, guidance_scale=scale, temperature=0.8
    )
    assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-10)
    push = torch.randn_like(found)
    learn = leaves if scale else [hidden, weight, bias]
    for got, want in zip(
        torch.autograd.grad(found, learn, push), torch.autograd.grad(wanted, learn, push), strict=True
    ):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-10)


def test_a_step_that_keeps_nothing_masked_has_probability_of_its_codes_alone() -> None:
    inputs = torch.full((1, 1, 3), uct.MASK)
    hidden, weight = torch.randn(1, 1, 3, D), torch.randn(K, D, requires_grad=True)
    stayed = uct.ops.remasked_logprob(hidden, weight, torch.zeros(1, 1), inputs)
    assert (stayed == 0).all() and torch.autograd.grad(stayed.sum(), weight)[0].abs().sum() == 0


@pytest.mark.parametrize("level", ["sequence", "transition"])
def test_losses_of_coarser_ratios_by_a_loop(level: str) -> None:
    """Everything together: head → per-token log-probs → reduction → loss, as GSPO and Mask-GRPO write it."""
    inputs, double = _inputs(), torch.float64
    hidden = torch.randn(R, T, N, D, dtype=double, requires_grad=True)
    weight = torch.randn(K, D, dtype=double, requires_grad=True)
    target, advantages = torch.randint(0, K, (R, T, N)), torch.randn(R, dtype=double)
    logp = uct.ops.selected_logprob(hidden, weight, target)
    old = (logp + 0.1 * torch.randn_like(logp)).detach()
    mask = uct.ops.token_mask(inputs, "newly_unmasked")
    clip: dict[str, Any] = {"clip_low": 0.05, "clip_high": 0.08, "beta": 0.0}
    if level == "sequence":
        new, before = (uct.ops.sequence_logprob(x, mask) for x in (logp, old))
        loss, stats = uct.ops.grpo_loss(new, before, None, advantages, **clip)
    else:
        new, before = (uct.ops.transition_logprob(x, inputs) for x in (logp, old))
        loss, stats = uct.ops.grpo_loss(new, before, None, advantages, alpha=1 / T, **clip)

    plain = naive.logprob(target, torch.nn.functional.linear(hidden, weight))
    wanted, clipped, count = plain.new_zeros(()), 0, 0
    for r in range(R):
        difference = torch.where(mask[r], plain[r] - old[r], 0.0)
        logs = [difference.sum() / mask[r].sum()] if level == "sequence" else [difference[t].sum() for t in range(T)]
        for log in logs:
            ratio, a = log.exp(), advantages[r]
            wanted = wanted - torch.min(ratio * a, ratio.clamp(0.95, 1.08) * a) / (R * len(logs))
            clipped += int((a > 0 and ratio > 1.08) or (a < 0 and ratio < 0.95))
            count += 1
    assert torch.allclose(loss, wanted)
    assert math.isclose(float(stats.clip_fraction), clipped / count)
    for got, want in zip(
        torch.autograd.grad(loss, [hidden, weight]), torch.autograd.grad(wanted, [hidden, weight]), strict=True
    ):
        assert torch.allclose(got, want)


def test_ratios_of_rollouts_in_two_streamed_passes() -> None:
    """As docs/ops.md tells it: log-probs without gradients, the slope of the loss per token, then piece by piece."""
    hidden, weight = torch.randn(R, T, N, D, requires_grad=True), torch.randn(K, D, requires_grad=True)
    target, mask, advantages = torch.randint(0, K, (R, T, N)), torch.rand(R, T, N) < 0.7, torch.randn(R)
    old = uct.ops.sequence_logprob(-2.2 * torch.ones(R, T, N), mask)

    def loss_of(logp: Tensor) -> Tensor:
        new = uct.ops.sequence_logprob(logp, mask)
        return uct.ops.grpo_loss(new, old, None, advantages, beta=0.0, clip_low=1.0, clip_high=1e6)[0]  # never clipped

    wanted = torch.autograd.grad(loss_of(uct.ops.selected_logprob(hidden, weight, target)), [hidden, weight])
    assert wanted[0].abs().sum() > 0
    with torch.no_grad():
        pieces = [uct.ops.selected_logprob(hidden[:, [t]], weight, target[:, [t]]) for t in range(T)]
    leaf = torch.cat(pieces, 1).requires_grad_()
    (slope,) = torch.autograd.grad(loss_of(leaf), leaf)
    for t in range(T):
        uct.ops.selected_logprob(hidden[:, [t]], weight, target[:, [t]]).backward(slope[:, [t]])
    for leaf_tensor, want in zip((hidden, weight), wanted, strict=True):
        assert torch.allclose(leaf_tensor.grad, want, rtol=1e-4, atol=1e-6)


def test_the_entropy_is_left_out_on_request() -> None:
    arguments = torch.randn(R, N, D), torch.randn(K, D), torch.randint(0, K, (R, N)), -torch.rand(R, N)
    results = [
        uct.ops.maskgit_grpo_loss(*arguments, None, torch.randn(R), beta=0.0, with_entropy=wanted, backend="reference")
        for wanted in (True, False)
    ]
    assert float(results[0][2].entropy) > 0 and results[1][2].entropy is None
    assert torch.equal(results[0][1], results[1][1])


LOGP, CODES = torch.zeros(R, T, N), torch.zeros(R, T, N, dtype=torch.int64)
BAD = [
    (lambda: uct.ops.token_mask(CODES, "some"), "scope='some': must be one of all, masked, newly_unmasked"),
    (lambda: uct.ops.token_mask(CODES[0], "masked"), f"inputs: shape {(T, N)}, must be [R, T, N]"),
    (lambda: uct.ops.token_mask(LOGP, "masked"), "inputs: dtype float32, must be int64"),
    (lambda: uct.ops.sequence_logprob(torch.tensor(1.0)), "logp: a 0-d tensor, must be [R, ...]"),
    (lambda: uct.ops.sequence_logprob(LOGP, LOGP), "mask: dtype float32, must be bool"),
    (lambda: uct.ops.sequence_logprob(LOGP, torch.ones(N + 1).bool()), f"mask: shape {(N + 1,)} does not broadcast"),
    (lambda: uct.ops.transition_logprob(LOGP[:, :1], CODES), f"logp: shape {(R, 1, N)}, must be the shape of inputs"),
    (lambda: uct.ops.transition_logprob(LOGP, CODES, LOGP[0]), f"remasked_logp: shape {(T, N)}"),
    (lambda: uct.ops.lowest_kept(LOGP[0], CODES), f"old_logp: shape {(T, N)}"),
    (
        lambda: uct.ops.remasked_logprob(torch.zeros(R, T, N, D), torch.zeros(K, D), torch.zeros(R), CODES),
        f"threshold: shape {(R,)}, must be [R, T]",
    ),
    (
        lambda: uct.ops.remasked_logprob(torch.zeros(R, N, D), torch.zeros(K, D), torch.zeros(R, T), CODES),
        f"target: shape {(R, T, N)}, must be the leading shape of hidden",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_refusals(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        call()
