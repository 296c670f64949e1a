"""maskgit_step: definition against float64, CPU core against definition, noise that ignores the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pyunictokens as uct
from pyunictokens.ops import MaskgitStep, philox
from pyunictokens.ops.backends import cpu as _native

CORE = _native.core()
NEAR = 1e-5  # two scores this close may fall either way


def _arguments(batch: int, positions: int, entries: int, scale: float = 1.0, unknown: float = 0.7) -> dict[str, Any]:
    codes = torch.randint(0, entries, (batch, positions))
    return {
        "logits": scale * torch.randn(batch, positions, entries),
        "codes": torch.where(torch.rand(batch, positions) < unknown, uct.MASK, codes),
        "mask_len": torch.randint(0, positions + 2, (batch,)),
        "temperature": 3 * torch.rand(batch),
        "seed": int(torch.randint(0, 2**62, ())),
        "sample_ids": torch.randint(0, 2**62, (batch,)),
        "step": torch.randint(0, 65536, (batch,)),
    }


def _noise(a: dict[str, Any]) -> tuple[Tensor, Tensor]:
    batch, positions, entries = a["logits"].shape
    sample, step = a["sample_ids"].repeat_interleave(positions), a["step"].repeat_interleave(positions)
    position = torch.arange(positions).repeat(batch)
    token = philox.gumbel(a["seed"], sample, step, position, entries).view(batch, positions, entries)
    rank = philox.gumbel(a["seed"], sample, step, position, 1, philox.STREAM_RANK).view(batch, positions)
    return token, rank


def _hold_against_float64(out: MaskgitStep, a: dict[str, Any], token: Tensor, rank: Tensor) -> None:
    """`out` is the exact answer, or differs only where two float64 scores are nearer than NEAR."""
    logp = torch.log_softmax(a["logits"].double(), -1)
    score = logp + token.double()
    unknown = a["codes"] < 0
    reached = score.gather(-1, out.chosen[..., None])[..., 0]
    assert (reached >= score.amax(-1) - NEAR)[unknown].all()
    assert (out.chosen == a["codes"])[~unknown].all()
    selected = logp.gather(-1, out.chosen[..., None])[..., 0]
    tolerance = 1e-6 * (1 + a["logits"].double().abs().amax())
    assert ((out.logp - selected).abs() < 4 * tolerance).all()
    confidence = selected + a["temperature"].double()[:, None] * rank.double()
    for b in range(len(unknown)):
        wanted = min(int(a["mask_len"][b]), int(unknown[b].sum()))
        assert int(out.masked[b].sum()) == wanted
        assert not (out.masked[b] & ~unknown[b]).any()
        kept = unknown[b] & ~out.masked[b]
        if wanted and kept.any():
            assert confidence[b][out.masked[b]].max() <= confidence[b][kept].min() + NEAR * (1 + a["temperature"][b])
    assert torch.equal(out.codes, torch.where(out.masked, uct.MASK, out.chosen))


SHAPES = [(3, 7, 1, 1.0), (2, 5, 63, 3.0), (4, 33, 130, 10.0), (2, 19, 4096, 1.0), (1, 9, 8191, 30.0), (5, 1, 64, 0.0)]


@pytest.mark.parametrize(("batch", "positions", "entries", "scale"), SHAPES)
def test_reference_is_the_definition(batch: int, positions: int, entries: int, scale: float) -> None:
    a = _arguments(batch, positions, entries, scale)
    _hold_against_float64(uct.ops.maskgit_step(**a, backend="reference"), a, *_noise(a))
    exact = {**a, "logits": a["logits"].double()}
    out = uct.ops.maskgit_step(**exact, backend="reference")
    assert out.logp.dtype == torch.float64
    _hold_against_float64(out, a, *_noise(a))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "positions", "entries", "scale"), SHAPES)
def test_cpu_core(level: str, batch: int, positions: int, entries: int, scale: float, dtype: torch.dtype) -> None:
    a = _arguments(batch, positions, entries, scale)
    a["logits"] = a["logits"].to(dtype)
    out = uct.ops.maskgit_step(**a, backend="cpu")
    assert out.logp.dtype == torch.float32
    _hold_against_float64(out, a, *_noise(a))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_explicit_noise(backend: str) -> None:
    a = _arguments(3, 17, 101)
    token = -torch.log(-torch.log(torch.rand(3, 17, 101).clamp(1e-9, 1 - 1e-6)))
    rank = -torch.log(-torch.log(torch.rand(3, 17).clamp(1e-9, 1 - 1e-6)))
    generated_token, generated_rank = _noise(a)
    for t, r in ((token, rank), (token, None), (None, rank)):
        out = uct.ops.maskgit_step(**a, token_gumbel=t, rank_gumbel=r, backend=backend)
        _hold_against_float64(out, a, generated_token if t is None else t, generated_rank if r is None else r)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_noise_depends_on_the_sample_and_not_on_the_batch(backend: str) -> None:
    a = _arguments(6, 20, 90)
    whole = uct.ops.maskgit_step(**a, backend=backend)
    order = torch.randperm(6)[:4]
    part = {key: value[order] if isinstance(value, Tensor) else value for key, value in a.items()}
    for row, b in enumerate(order.tolist()):
        found = uct.ops.maskgit_step(**part, backend=backend)
        for got, want in zip(found, whole, strict=True):
            assert torch.equal(got[row], want[b])
    assert not torch.equal(uct.ops.maskgit_step(**{**a, "seed": a["seed"] ^ 1}, backend=backend).chosen, whole.chosen)
    again = {**a, "step": (a["step"] + 1) % 65536}
    assert not torch.equal(uct.ops.maskgit_step(**again, backend=backend).chosen, whole.chosen)


def test_threads_do_not_change_the_result() -> None:
    a = _arguments(4, 64, 2048)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = uct.ops.maskgit_step(**a, backend="cpu")
        torch.set_num_threads(5)
        many = uct.ops.maskgit_step(**a, backend="cpu")
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(one, many, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_ties_go_to_the_lowest_index(backend: str) -> None:
    logits = torch.zeros(2, 8, 150)
    logits[0, :, [40, 90, 149]] = 5.0
    zero = {"token_gumbel": torch.zeros(2, 8, 150), "rank_gumbel": torch.zeros(2, 8)}
    codes = torch.full((2, 8), uct.MASK)
    codes[1, :3] = 7
    out = uct.ops.maskgit_step(
        logits, codes, mask_len=3, temperature=2.0, seed=0, sample_ids=torch.arange(2), step=0, **zero, backend=backend
    )
    assert out.chosen.tolist() == [[40] * 8, [7, 7, 7, 0, 0, 0, 0, 0]]
    assert out.masked[0].tolist() == [True] * 3 + [False] * 5
    assert out.masked[1].tolist() == [False] * 3 + [True] * 3 + [False] * 2


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_choices_follow_the_softmax(backend: str) -> None:
    probability = torch.tensor([0.5, 0.25, 0.2, 0.04, 0.01])
    draws = 40_000
    out = uct.ops.maskgit_step(
        probability.log().expand(40, draws // 40, 5),
        torch.full((40, draws // 40), uct.MASK),
        mask_len=0,
        temperature=0.0,
        seed=3,
        sample_ids=torch.arange(40),
        step=2,
        backend=backend,
    )
    found = out.chosen.flatten().bincount(minlength=5) / draws
    assert ((found - probability).abs() < 5 * (probability * (1 - probability) / draws).sqrt()).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_excluded_entries_are_never_chosen(backend: str) -> None:
    a = _arguments(2, 30, 100, unknown=1.0)
    a["logits"][..., ::2] = -torch.inf
    out = uct.ops.maskgit_step(**a, backend=backend)
    assert (out.chosen % 2 == 1).all()
    wanted = torch.log_softmax(a["logits"].double(), -1).gather(-1, out.chosen[..., None])[..., 0]
    assert torch.allclose(out.logp.double(), wanted, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_scalars_and_strides(backend: str) -> None:
    a = _arguments(3, 10, 50)
    a.update(mask_len=torch.tensor([4] * 3), temperature=torch.tensor([0.5] * 3), step=torch.tensor([9] * 3))
    wanted = uct.ops.maskgit_step(**a, backend=backend)
    wide = torch.randn(3, 14, 61)
    wide[:, 3:13, 4:54] = a["logits"]
    every_other = torch.stack([a["logits"], torch.zeros(3, 10, 50)], -1)[..., 0]
    for logits in (wide[:, 3:13, 4:54], every_other, a["logits"].transpose(0, 1).contiguous().transpose(0, 1)):
        assert not logits.is_contiguous()
        numbers = {**a, "logits": logits, "mask_len": 4, "temperature": 0.5, "step": 9}
        found = uct.ops.maskgit_step(**numbers, backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    zero_dim = {**a, "mask_len": torch.tensor(4, dtype=torch.int32), "temperature": torch.tensor(0.5)}
    assert torch.equal(uct.ops.maskgit_step(**zero_dim, backend=backend).codes, wanted.codes)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_more_to_mask_than_unknown_masks_all_unknown(backend: str) -> None:
    a = _arguments(4, 12, 20, unknown=0.5)
    out = uct.ops.maskgit_step(**{**a, "mask_len": 2**40}, backend=backend)
    assert torch.equal(out.masked, a["codes"] < 0)
    none = uct.ops.maskgit_step(**{**a, "mask_len": 0}, backend=backend)
    assert not none.masked.any()
    assert torch.equal(none.codes, none.chosen)


def test_cpu_is_chosen_where_it_can_run() -> None:
    a = _arguments(2, 5, 40)
    best = uct.ops.maskgit_step(**a)
    assert all(torch.equal(x, y) for x, y in zip(best, uct.ops.maskgit_step(**a, backend="cpu"), strict=True))
    assert uct.ops.maskgit_step(**{**a, "logits": a["logits"].double()}).logp.dtype == torch.float64


def test_works_in_a_forked_process() -> None:
    import os

    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    a = _arguments(4, 64, 2048)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        wanted = uct.ops.maskgit_step(**a, backend="cpu")  # the pool has its threads now
        child = os.fork()
        if child == 0:
            same = torch.equal(_native.maskgit_step(*_raw(a))[1], wanted.chosen)
            os._exit(0 if same else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        torch.set_num_threads(before)


def _raw(a: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of `_native.maskgit_step`, which uses no torch threads and so may run in a forked process."""
    names = ("logits", "codes", "mask_len", "temperature", "seed", "sample_ids", "step")
    return (*[a[name] for name in names], None, None, philox.STREAM_TOKEN)
