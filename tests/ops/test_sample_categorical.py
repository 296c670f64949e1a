"""sample_categorical: the distribution, top-k, temperature, log-probs, and noise that ignores the batch."""

from __future__ import annotations

import pytest
import torch

import pyunictokens as uct
from pyunictokens.ops import philox


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_it_is_gumbel_max_with_the_text_stream(backend: str) -> None:
    logits, ids = torch.randn(5, 333), torch.tensor([4, 2**40, 0, 9, 1])
    found, logp = uct.ops.sample_categorical(
        logits, seed=8, sample_ids=ids, step=6, temperature=0.8, top_k=0, backend=backend
    )
    step, position = torch.full((5,), 6), torch.zeros(5, dtype=torch.long)
    noise = philox.gumbel(8, ids, step, position, 333, philox.STREAM_TEXT).double()
    scores = logits.double() / 0.8
    assert torch.equal(found, (scores + noise).argmax(-1))
    wanted = torch.log_softmax(scores, -1).gather(-1, found[:, None])[:, 0]
    assert torch.allclose(logp.double(), wanted, atol=1e-5)


def test_noise_depends_on_the_sample_and_not_on_the_batch() -> None:
    logits = torch.randn(8, 50)
    ids = torch.randint(0, 2**62, (8,))
    whole, _ = uct.ops.sample_categorical(logits, seed=1, sample_ids=ids, step=torch.arange(8))
    order = torch.tensor([6, 2, 3])
    part, _ = uct.ops.sample_categorical(logits[order], seed=1, sample_ids=ids[order], step=order)
    assert torch.equal(part, whole[order])


def test_top_k_restricts_the_choice_but_not_the_logp() -> None:
    logits = torch.randn(2000, 30)
    found, logp = uct.ops.sample_categorical(logits, seed=2, sample_ids=torch.arange(2000), step=0, top_k=3)
    rank = (logits > logits.gather(-1, found[:, None])).sum(-1)
    assert sorted(set(rank.tolist())) == [0, 1, 2]
    wanted = torch.log_softmax(logits, -1).gather(-1, found[:, None])[:, 0]
    assert torch.allclose(logp, wanted, atol=1e-6)
    large, _ = uct.ops.sample_categorical(logits, seed=2, sample_ids=torch.arange(2000), step=0, top_k=10**6)
    free, _ = uct.ops.sample_categorical(logits, seed=2, sample_ids=torch.arange(2000), step=0)
    assert torch.equal(large, free)


def test_greedy() -> None:
    logits = torch.randn(7, 40)
    for setting in ({"temperature": 0.0}, {"top_k": 1}):
        found, logp = uct.ops.sample_categorical(logits, seed=2, sample_ids=torch.arange(7), step=0, **setting)
        assert torch.equal(found, logits.argmax(-1))
        assert torch.allclose(logp, torch.log_softmax(logits, -1).amax(-1), atol=1e-6)


def test_frequencies_follow_the_temperature() -> None:
    draws = 20_000
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(draws, 4)
    found, _ = uct.ops.sample_categorical(logits, seed=5, sample_ids=torch.arange(draws), step=1, temperature=2.0)
    wanted = torch.softmax(logits[0] / 2.0, -1)
    share = found.bincount(minlength=4) / draws
    assert ((share - wanted).abs() < 5 * (wanted * (1 - wanted) / draws).sqrt()).all()
