"""Above 2³¹ elements: positions are 64-bit everywhere. Strided inputs and the meta device keep the memory small."""

from __future__ import annotations

import torch

import pyunictokens as uct

META = torch.device("meta")
TOKENS, WIDTH, ENTRIES = 1 << 20, 4096, 3  # 2³² elements of hidden


def _overlapping_rows() -> torch.Tensor:
    """[1, TOKENS, WIDTH] in which row i is base[i : i + WIDTH]: rows differ, memory is that of one row per token."""
    return torch.randn(TOKENS + WIDTH).as_strided((1, TOKENS, WIDTH), (0, 1, 1))


def test_the_reference_finds_the_last_rows_of_a_large_input() -> None:
    hidden, weight = _overlapping_rows(), torch.randn(ENTRIES, WIDTH, requires_grad=True)
    assert hidden.numel() > 1 << 31
    places = torch.tensor([0, (1 << 19) + 3, TOKENS - 1])
    target, mask = torch.zeros(1, TOKENS, dtype=torch.int64), torch.zeros(1, TOKENS, dtype=torch.bool)
    target[0, places], mask[0, places] = torch.tensor([2, 1, 2]), True
    old, advantages = torch.full((), -1.0).expand(1, TOKENS), torch.tensor([0.7])
    loss, logp, _ = uct.ops.maskgit_grpo_loss(
        hidden, weight, target, old, None, advantages, beta=0.0, mask=mask, backend="reference"
    )
    (gradient,) = torch.autograd.grad(loss, weight)

    few, few_target = hidden[:, places], target[:, places]
    wanted, wanted_logp, _ = uct.ops.maskgit_grpo_loss(
        few, weight, few_target, old[:, places], None, advantages, beta=0.0, backend="reference"
    )
    (wanted_gradient,) = torch.autograd.grad(wanted, weight)
    assert torch.equal(logp[:, places], wanted_logp) and torch.equal(loss, wanted)
    assert torch.equal(gradient, wanted_gradient)


def test_shapes_above_the_limit_on_the_meta_device() -> None:
    hidden = torch.empty(1, TOKENS, WIDTH, device=META, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(1 << 20, WIDTH, device=META, dtype=torch.bfloat16, requires_grad=True)
    target = torch.empty(1, TOKENS, dtype=torch.int64, device=META)
    logp = uct.ops.selected_logprob(hidden, weight, target)
    logp.sum().backward()
    assert logp.shape == (1, TOKENS) and logp.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape
    assert weight.grad is not None and weight.grad.numel() == 1 << 32


def test_a_step_above_the_limit_on_the_meta_device() -> None:
    rows, codes, entries = 2, 1 << 11, 1 << 20  # 2³² logits
    logits = torch.empty(1, 1, 1, device=META).expand(rows, codes, entries)
    known = torch.empty(rows, codes, dtype=torch.int64, device=META)
    ids = torch.empty(rows, dtype=torch.int64, device=META)
    out = uct.ops.maskgit_step(logits, known, mask_len=5, temperature=1.0, seed=0, sample_ids=ids, step=0)
    assert out.codes.shape == out.logp.shape == (rows, codes) and logits.numel() > 1 << 31
