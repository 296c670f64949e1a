"""Statistics formed in the product's epilogue, interpreted: logits, parts, values and gradients against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pyunictokens.kernels import engine, epilogue, measured, plan, scores
from tests.kernels.check_head import _check, _loss
from tests.kernels.problems import problem

BF16, F16 = torch.bfloat16, torch.float16
SHAPE = 2, 3, 5, 24, 331  # R, T, N, D, K: three parts of a row, the last one not whole


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Chunks of eight rows, four of them at once, and statistics by the product."""
    monkeypatch.setenv("PYUNICTOKENS_PLANS", str(tmp_path / "plans.json"))
    monkeypatch.setattr(engine, "settings", engine.Settings(statistics="product"))
    monkeypatch.setattr(plan, "_cut", lambda tokens, *_: (max(1, min(tokens, 8)), max(1, min(tokens, 4))))


@pytest.fixture
def fills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every product that left parts."""
    found: list[int] = []
    fill = scores.fill

    def noted(rows_mD: torch.Tensor, *rest: object) -> None:
        found.append(len(rows_mD))
        fill(rows_mD, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(scores, "fill", noted)
    return found


@pytest.mark.parametrize("capability", [9, 10])
@pytest.mark.parametrize(("m", "width", "entries"), [(1, 8, 1), (130, 136, 700), (257, 24, 129), (3, 72, 1025)])
@pytest.mark.parametrize("biased", [False, True])
def test_logits_and_parts(
    monkeypatch: pytest.MonkeyPatch, capability: int, m: int, width: int, entries: int, biased: bool
) -> None:
    monkeypatch.setattr(scores, "assumed", capability)
    rows, weight = torch.randn(m, width).to(BF16), (torch.randn(entries, width) / 4).to(BF16)
    bias = torch.randn(entries).to(BF16) if biased else None
    pitch, temperature = scores.pitch(entries), 0.7
    held = torch.full((m, pitch), 7.0)
    parts = torch.full((3, m, scores.parts_of(entries)), torch.nan)
    scores.fill(rows, weight, bias, None, held[:, :entries], parts, 0, temperature)
    logits = rows.double() @ weight.double().T
    assert torch.allclose(held[:, :entries].double(), logits, rtol=1e-5, atol=1e-5)
    assert (held[:, entries:] == 7.0).all(), "what lies between two rows is left alone"
    x = (logits + (0.0 if bias is None else bias.double())) / temperature
    for part in range(parts.shape[2]):
        piece = x[:, part * plan.PART : (part + 1) * plan.PART]
        top = piece.amax(1)
        gap = piece - top[:, None]
        wanted = torch.stack([top, gap.exp().sum(1), (gap * gap.exp()).sum(1)])
        assert torch.allclose(parts[:, :, part].double(), wanted, rtol=1e-5, atol=1e-4)


def test_rows_beyond_the_count_cost_nothing() -> None:
    rows, weight = torch.randn(300, 16).to(BF16), torch.randn(140, 16).to(BF16)
    held, parts = torch.full((300, 140), 7.0), torch.full((3, 300, 2), 7.0)
    scores.fill(rows, weight, None, torch.tensor([110], dtype=torch.int32), held, parts, 10, 1.0)
    assert torch.allclose(held[:100], rows[:100].float() @ weight.float().T, rtol=1e-4, atol=1e-4)
    assert (parts[:, 100:] == 7.0).all() and (parts[:, :100] != 7.0).all()
    assert (held[128:] == 7.0).all(), "a tile without rows is not formed"


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("mask", ["none", "some", "rows", "empty"])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_values_and_gradients(dtype: torch.dtype, mask: str, counted: bool, guidance: float, fills: list[int]) -> None:
    engine.settings.counted = counted
    _check(problem(dtype, SHAPE, mask=mask, guidance=guidance))
    assert bool(fills) == (mask != "empty" or counted)


@pytest.mark.parametrize("capability", [9, 10])
def test_without_a_reference_without_bias(monkeypatch: pytest.MonkeyPatch, capability: int, fills: list[int]) -> None:
    monkeypatch.setattr(scores, "assumed", capability)
    _check(problem(BF16, (3, 2, 3, 8, 513), ref=False, bias=False, temperature=0.7, alpha="tensor", mask="some"))
    assert fills


def test_entries_that_are_ruled_out(fills: list[int]) -> None:
    p = problem(BF16, (1, 2, 3, 8, 400))
    p.values["bias"][torch.arange(400) % 3 == 0] = -torch.inf
    p.values["bias"][:300] = -torch.inf  # whole parts
    p.values["target"] = torch.full((1, 2, 3), 398)
    found = []
    for engine.settings.statistics in ("product", "rows"):
        v = p.leaves(BF16)
        v["old_logp"] = v["ref_logp"] = torch.full((1, 2, 3), -4.0)
        loss, logp, stats = _loss(v, with_entropy=True)
        loss.backward()
        found.append([loss, logp, stats.entropy, v["hidden"].grad.float()])
    assert fills and all(torch.isfinite(each).all() for each in found[0])
    assert all(torch.allclose(one, other, rtol=1e-2, atol=1e-5) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("counted", [False, True])
def test_two_runs_give_the_same_bits(counted: bool, fills: list[int]) -> None:
    engine.settings.counted = counted
    p, runs = problem(BF16, SHAPE, guidance=2.0, mask="some"), []
    for _ in range(2):
        v = p.leaves(BF16)
        loss, logp, stats = _loss(v)
        loss.backward()
        runs.append([loss, logp, *stats, *(v[name].grad for name in ("hidden", "weight", "bias", "hidden_uncond"))])
    assert fills and all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_parts_stand_in_for_a_look_at_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epilogue, "_survey", None)
    monkeypatch.setattr(epilogue, "_moments", None)
    _check(problem(BF16, SHAPE))


@pytest.mark.parametrize("shape", [(2, 3, 5, 12, 331), (2, 3, 5, 24, 331)], ids=["narrow rows", "float32"])
def test_where_it_cannot_run_the_row_kernel_does(shape: tuple[int, ...], fills: list[int]) -> None:
    dtype = BF16 if shape[3] == 12 else torch.float32
    _check(problem(dtype, shape))  # type: ignore[arg-type]
    assert not fills


def test_the_first_call_of_a_case_measures_both(monkeypatch: pytest.MonkeyPatch, fills: list[int]) -> None:
    engine.settings.statistics = None
    monkeypatch.setattr(measured, "_choices", {})
    monkeypatch.setattr(measured, "remembered", lambda key, like: measured.choices().get(key, measured.UNKNOWN).form)
    seconds = {"rows": 2.0, "product": 1.0}
    monkeypatch.setattr(measured, "_timed", lambda run: seconds)
    _check(problem(BF16, SHAPE))
    ((key, choice),) = measured.choices().items()
    assert choice == measured.Choice("product", seconds) and (key.width, key.entries, key.bias) == (24, 331, True)
    assert len(fills) == 1 + 8, "eight pieces of four rows or fewer, and one more for the trial"
    fills.clear()
    measured._choices = {key: measured.Choice("rows", seconds)}
    _check(problem(BF16, SHAPE))
    assert not fills
