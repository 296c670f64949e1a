"""selected_logprob and maskgit_grpo_loss of the `triton` backend, interpreted: values and gradients against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pyunictokens as uct
from pyunictokens.kernels import engine, epilogue, plan
from tests.kernels.problems import TOLERANCE, Problem, close, problem, truth_logp
from tests.ops import naive

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
HEAD = ("hidden", "weight", "bias", "hidden_uncond")


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Microbatches of four rows, chunks of eight; settings that a test may change."""
    monkeypatch.setattr(engine, "settings", engine.Settings())
    monkeypatch.setattr(plan, "_cut", lambda tokens, *_: (max(1, min(tokens, 8)), max(1, min(tokens, 4))))


def _loss(v: dict[str, Any], **changes: Any) -> tuple[Tensor, Tensor, Any]:
    names = ("guidance_scale", "temperature", "alpha", "beta", "mask")
    return uct.ops.maskgit_grpo_loss(
        *(v[name] for name in ("hidden", "weight", "target", "old_logp", "ref_logp", "advantages", "bias")),
        **{"hidden_uncond": v["hidden_uncond"], **{name: v[name] for name in names}, "backend": "triton", **changes},
    )


def _wanted(p: Problem) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    v = p.leaves(torch.float64)
    scores = naive.logits(
        v["hidden"], v["weight"], v["bias"], v["hidden_uncond"], v["guidance_scale"], v["temperature"]
    )
    logp = naive.logprob(v["target"], scores)
    arguments = v["old_logp"], v["ref_logp"], v["advantages"], v["alpha"], 0.2, 0.2, v["beta"], v["mask"]
    loss, statistics = naive.loss(logp, *arguments)
    keep = torch.ones(logp.shape, dtype=torch.bool) if v["mask"] is None else v["mask"].expand(logp.shape)
    entropy = torch.distributions.Categorical(logits=scores.detach()).entropy()
    statistics["entropy"] = entropy[keep].sum() / keep.sum().clamp_min(1)
    leaves = {name: v[name] for name in HEAD if v[name] is not None}
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    return loss, torch.where(keep, logp, 0.0), statistics, gradients


def _check(p: Problem) -> None:
    v = p.leaves(p.dtype)
    loss, logp, stats = _loss(v)
    wanted, wanted_logp, statistics, gradients = _wanted(p)
    # Losses and statistics cancel, so their errors are held against what the errors of log-probs add up to.
    slack = TOLERANCE[p.dtype] * (1.0 + wanted_logp.abs().max().item())
    weight = float(torch.as_tensor(p.values["alpha"]).max() * p.values["advantages"].abs().max() + p.values["beta"])
    assert abs(loss.item() - wanted.item()) <= 0.2 * slack * weight * logp.numel() / len(logp)
    # log p near 0 cancels as well: its error is held against 1, the gradient's against what onehot − softmax leaves.
    ill = max(1.0, 0.1 / max(1e-6, (1 - wanted_logp.exp()).max().item()))
    assert (logp - wanted_logp).norm() <= TOLERANCE[p.dtype] * max(1.0, wanted_logp.norm().item())
    for name, value in statistics.items():
        assert abs(getattr(stats, name).item() - value.item()) <= slack * (1.0 + value.item()), name
    found = torch.autograd.grad(loss, [v[name] for name in gradients])
    for (name, gradient), got in zip(gradients.items(), found, strict=True):
        assert got.dtype == v[name].dtype
        close(got, gradient, p.dtype, f"d {name}", ill)


@pytest.mark.parametrize("mask", ["none", "some", "rows", "all", "empty"])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_masks_and_guidance(mask: str, counted: bool, guidance: float) -> None:
    engine.settings.counted = counted
    _check(problem(F32, mask=mask, guidance=guidance))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    ("mask", "counted", "guidance"), [("none", False, 0.0), ("some", False, 2.0), ("some", True, 2.0)]
)
def test_sixteen_bits(dtype: torch.dtype, mask: str, counted: bool, guidance: float) -> None:
    engine.settings.counted = counted
    _check(problem(dtype, mask=mask, guidance=guidance))


@pytest.mark.parametrize("alpha", ["tensor", "step"])
def test_without_a_reference_without_bias(alpha: str) -> None:
    _check(problem(F32, (3, 2, 3, 7, 130), ref=False, bias=False, temperature=0.7, alpha=alpha, mask="some"))


def test_rows_longer_than_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epilogue, "_block", lambda entries: (64, False, 4))
    _check(problem(F32, (2, 1, 4, 9, 331), temperature=1.3, mask="some"))


def test_one_of_everything() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same token each time: in one alone nothing averages what may cancel in it
        _check(problem(F32, (1, 1, 1, 1, 2)))
        _check(problem(F32, (1, 1, 1, 130, 3), guidance=5.0))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("which", ["chunked", "fused"])
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_selected_logprob(dtype: torch.dtype, which: str, guidance: float) -> None:
    engine.settings.engine = which
    p = problem(dtype, (2, 2, 3, 20, 301), guidance=guidance, temperature=0.8)
    v, w = p.leaves(dtype), p.leaves(torch.float64)
    logp = uct.ops.selected_logprob(
        *(v[name] for name in ("hidden", "weight", "target", "bias")),
        hidden_uncond=v["hidden_uncond"],
        guidance_scale=guidance,
        temperature=0.8,
        backend="triton",
    )
    wanted = truth_logp(w)
    close(logp, wanted, dtype, "logp")
    grad = torch.randn_like(logp)
    names = [name for name in HEAD if v[name] is not None]
    gradients = torch.autograd.grad(wanted, [w[name] for name in names], grad.double())
    for name, got, want in zip(names, torch.autograd.grad(logp, [v[n] for n in names], grad), gradients, strict=True):
        close(got, want, dtype, f"d {name}")


@pytest.mark.parametrize("which", ["chunked", "fused"])
@pytest.mark.parametrize("counted", [False, True])
def test_loss_without_gradients(which: str, counted: bool) -> None:
    engine.settings.engine, engine.settings.counted = which, counted
    p = problem(F32, (2, 2, 3, 33, 150), guidance=1.0, mask="some")
    v = p.leaves(F32)
    with torch.no_grad():
        loss, logp, stats = _loss(v)
    wanted, wanted_logp, statistics, _ = _wanted(p)
    assert torch.allclose(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    close(logp, wanted_logp, F32, "logp")
    close(stats.entropy, statistics["entropy"], F32, "entropy")


@pytest.mark.parametrize("counted", [False, True])
def test_what_is_masked_out_may_be_nan(counted: bool) -> None:
    engine.settings.counted = counted
    p = problem(F32, guidance=2.0, mask="some", alpha="tensor")
    wanted = [x.detach() for x in _loss(p.leaves(F32))[:2]]
    for name in ("hidden", "hidden_uncond", "old_logp", "ref_logp", "alpha"):
        p.values[name][~p.values["mask"]] = torch.nan
    v = p.leaves(F32)
    loss, logp, stats = _loss(v)
    assert torch.equal(loss, wanted[0]) and torch.equal(logp, wanted[1])
    assert all(torch.isfinite(x) for x in stats)
    loss.backward()
    assert all(torch.isfinite(v[name].grad).all() for name in HEAD)
    assert not v["hidden"].grad[~p.values["mask"]].any()


@pytest.mark.parametrize("which", ["chunked", "fused"])
def test_entries_that_are_ruled_out(which: str) -> None:
    engine.settings.engine = which
    p = problem(F32, (1, 2, 3, 8, 200))
    p.values["bias"][torch.arange(200) % 3 == 0] = -torch.inf
    p.values["bias"][:140] = -torch.inf  # whole tiles
    p.values["target"] = torch.full((1, 2, 3), 199)
    v, w = p.leaves(F32), p.leaves(torch.float64)
    wanted = truth_logp(w)
    arguments = v["hidden"], v["weight"], v["target"], v["bias"]
    logp = uct.ops.selected_logprob(*arguments, backend="triton")
    close(logp, wanted, F32, "logp")
    (got,), (want,) = torch.autograd.grad(logp.sum(), [v["hidden"]]), torch.autograd.grad(wanted.sum(), [w["hidden"]])
    close(got, want, F32, "d hidden")
    with torch.no_grad():
        assert torch.isfinite(_loss({**v, "old_logp": logp, "ref_logp": logp}, with_entropy=True)[2].entropy)


@pytest.mark.parametrize("counted", [False, True])
def test_two_runs_give_the_same_bits(counted: bool) -> None:
    engine.settings.counted = counted
    p = problem(BF16, guidance=2.0, mask="some")
    runs = []
    for _ in range(2):
        v = p.leaves(BF16)
        loss, logp, stats = _loss(v)
        loss.backward()
        runs.append([loss, logp, *stats, *(v[name].grad for name in HEAD)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_sums_that_are_shared_out_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_cut", lambda tokens, *_: (tokens, tokens))
    engine.settings.counted, engine.settings.deterministic = True, False
    _check(problem(F32, (2, 5, 16, 5, 9), mask="some"))


def test_mixed_dtypes_are_computed_in_the_wider() -> None:
    p = problem(BF16)
    v, w = p.leaves(BF16), p.leaves(F32)
    mixed = {**w, "hidden": v["hidden"]}
    loss, logp, _ = _loss(mixed)
    exact, exact_logp, _ = _loss(w)
    assert torch.equal(logp, exact_logp) and torch.equal(loss, exact)
    loss.backward()
    assert v["hidden"].grad.dtype == BF16 and w["weight"].grad.dtype == F32


def test_masked_out_tokens_cost_no_products(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    multiply = engine.multiply

    def counting(a: Tensor, *rest: Any, **more: Any) -> None:
        rows.append(a.shape)
        multiply(a, *rest, **more)

    monkeypatch.setattr(engine, "multiply", counting)
    engine.settings.engine = "chunked"
    p = problem(F32, mask="some")
    v = p.leaves(F32)
    with torch.no_grad():
        _loss(v)
    assert sum(m for m, _ in rows) == int(p.values["mask"].sum())
