"""Costs on many GPUs: counts beside real parameters and messages that are dealt out, and the page beside its script."""

from __future__ import annotations

import pytest

from experiments import cost_scale
from experiments.cost_scale import between, optimizer, share, step, work
from pyunictokens.models import ConceptTokens, ShowoConfig
from pyunictokens.models.showo import costs as cost
from tests.train.test_update import tiny_model as trained_model


def test_parameters_that_learn() -> None:
    model = trained_model(width=64, layers=3)
    config = model.config
    assert cost.learned_parameters(config) == cost.parameters(config)
    wanted, rank = 0, 4
    for name, matrix in model.named_parameters():
        if name.rpartition(".")[0].rpartition(".")[2] in {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}:
            wanted += rank * sum(matrix.shape) if matrix.ndim == 2 else 0
    assert cost.learned_parameters(config, "lora", rank=rank) == wanted > 0
    tokens = ConceptTokens("bo", 64, 2, 1)
    rows = sum(value.numel() for value in tokens.parameters())
    assert cost.learned_parameters(config, "concept", rows=4) == rows


def test_state_on_one_rank_and_on_many() -> None:
    config = ShowoConfig()
    assert cost.sharded_state_bytes(config) == cost.state_bytes(config)
    everything = sum(cost.sharded_state_bytes(config, ranks=7) for _ in range(7))
    assert everything == pytest.approx(cost.parameters(config) * (7 * (2 + 4) + 12))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_rings_are_counted_message_by_message(ranks: int) -> None:
    """A ring in which each rank owns one chunk: sums go round once, results once, and new weights once more."""
    chunk, sent = 5, 0
    for bytes_each in (4, 4, 2):  # partial sums, sums, weights in bfloat16
        for _ in range(ranks - 1):
            sent += chunk * bytes_each  # every rank hands one chunk to its neighbour
    assert cost.exchanged_bytes(chunk * ranks, ranks) == sent


def test_the_fullest_rank_is_waited_for() -> None:
    for groups in (1, 2, 7):
        for ranks in (1, 2, 8, 64):
            dealt = [0] * ranks
            for rollout in range(groups * cost_scale.GROUP):
                dealt[rollout % ranks] += 1
            assert share(groups, ranks) == max(dealt)
    assert step("full", 64, 1).fast == pytest.approx(step("full", 64, 7).fast), "the same fullest rank"
    assert work(9, "full").slow < 9 * work(1, "full").slow and work(18, "lora").fast == 2 * work(9, "lora").fast
    one, eight = step("full", 1, 1), step("full", 8, 8)
    saved = optimizer("full", 1).fast - optimizer("full", 8).fast
    assert eight.fast - one.fast == pytest.approx(between("full", 8) - saved) and between("full", 1) == 0.0


def test_the_page_is_what_the_arithmetic_says() -> None:
    text = cost_scale.FILE.read_text(encoding="utf-8")
    assert cost_scale.updated(text, cost_scale.PARTS) == text, "run python -m experiments.cost_scale"
