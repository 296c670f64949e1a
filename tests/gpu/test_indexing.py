"""Above 2³¹ elements: the last rows of a large input get the same numbers as a small input with these rows alone.

On the CPU a step reads its logits through a stride above 2³¹ over memory that is mostly never touched; the other
operations want contiguous rows, which are tried on a GPU only (`tests/ops/test_large.py` holds the reference to it).
"""

from __future__ import annotations

import gc

import pytest
import torch

import pyunictokens as uct

from . import support

LIMIT = 1 << 31
ROWS = 8
"""Rows at the end that are compared."""


def _room(device: str, gigabytes: float) -> None:
    if device == "cpu":
        pytest.skip("needs contiguous rows: tens of gigabytes of host memory; tried on a GPU")
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GiB of GPU memory, {free:.0f} are free")


def test_a_step_with_a_stride_above_the_limit(device: str, backend: str) -> None:
    support.need("maskgit_step", backend, device, torch.bfloat16)
    if device == "cuda":
        _room(device, 6)
    positions, entries = 5, 24
    far = LIMIT + 40
    base = torch.empty(far + positions * entries, dtype=torch.bfloat16, device=device)  # untouched pages cost nothing
    logits = base.as_strided((2, positions, entries), (far, entries, 1))
    s = support.step(device, torch.bfloat16, (2, positions, entries))
    logits.copy_(s.logits)
    large = support.Step(logits, s.arguments)(backend)
    for mine, wanted in zip(large, s(backend), strict=True):
        assert torch.equal(mine, wanted)


def test_a_step_over_many_logits(device: str, backend: str) -> None:
    support.need("maskgit_step", backend, device, torch.bfloat16)
    _room(device, 40 if backend == "reference" else 8)
    batch, positions, entries = 260, 1024, 8192
    assert batch * positions * entries > LIMIT
    logits = torch.empty(batch, positions, entries, dtype=torch.bfloat16, device=device).normal_()
    arguments = {"mask_len": 400, "temperature": 1.0, "seed": 1, "step": 2, "backend": backend}
    codes = torch.full((batch, positions), uct.MASK, device=device)
    ids = torch.arange(batch, device=device)
    found = uct.ops.maskgit_step(logits, codes, sample_ids=ids, **arguments)
    last = uct.ops.maskgit_step(logits[-1:].clone(), codes[-1:], sample_ids=ids[-1:], **arguments)
    for mine, wanted in zip(found, last, strict=True):
        assert torch.equal(mine[-1:], wanted)


@pytest.mark.parametrize("operation", ["selected_logprob", "maskgit_grpo_loss"])
def test_a_head_over_many_hidden_states(device: str, backend: str, operation: str) -> None:
    support.need(operation, backend, device, torch.bfloat16)
    _room(device, 30)
    width, entries = 2048, 64
    tokens = LIMIT // width + 64
    hidden = torch.empty(1, 1, tokens, width, dtype=torch.bfloat16, device=device).normal_().requires_grad_()
    weight = torch.randn(entries, width, device=device, dtype=torch.bfloat16) / width**0.5
    target = torch.randint(0, entries, (1, 1, tokens), device=device)
    advantages, old = torch.ones(1, device=device), torch.full((1, 1, tokens), -4.0, device=device)

    def run(states: torch.Tensor, wanted: torch.Tensor, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if operation == "selected_logprob":
            logp = uct.ops.selected_logprob(states, weight, wanted, backend=backend)
            return logp, torch.autograd.grad(logp.sum(), states)[0]
        loss, logp, _ = uct.ops.maskgit_grpo_loss(
            states, weight, wanted, before, None, advantages, beta=0.0, backend=backend
        )
        return logp, torch.autograd.grad(loss, states)[0]

    logp, gradient = run(hidden, target, old)
    tail = hidden.detach()[..., -ROWS:, :].clone().requires_grad_()
    few_logp, few_gradient = run(tail, target[..., -ROWS:].contiguous(), old[..., -ROWS:].contiguous())
    torch.testing.assert_close(logp[..., -ROWS:], few_logp, rtol=1e-2, atol=1e-2)
    scale = few_gradient.float().norm()
    assert (gradient[..., -ROWS:, :].float() - few_gradient.float()).norm() <= 2e-2 * scale


def test_a_loss_over_many_tokens(device: str, backend: str) -> None:
    support.need("grpo_loss", backend, device, torch.bfloat16)
    _room(device, 120 if backend == "reference" else 40)
    rollouts, tokens = 5, LIMIT // 5 + 64
    old = torch.empty(rollouts, tokens, dtype=torch.bfloat16, device=device).normal_()
    logp = (old + 0.125).requires_grad_()
    advantages = torch.linspace(-1, 1, rollouts, device=device)
    loss, _ = uct.ops.grpo_loss(logp, old, None, advantages, beta=0.0, backend=backend)
    gradient = torch.autograd.grad(loss, logp)[0]
    tail = logp.detach()[:, -ROWS:].clone().requires_grad_()
    few, _ = uct.ops.grpo_loss(tail, old[:, -ROWS:].clone(), None, advantages, beta=0.0, backend=backend)
    assert torch.equal(gradient[:, -ROWS:], torch.autograd.grad(few, tail)[0])
    assert torch.isfinite(loss)
