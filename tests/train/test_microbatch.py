"""Microbatches of the update: every row once, sizes from memory, and memory that runs out amid a backward pass."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyunictokens.models import PromptKV, Showo
from pyunictokens.models.showo.costs import activation_bytes
from pyunictokens.train import microbatch as pieces
from pyunictokens.train.microbatch import Microbatches, add_gradients
from pyunictokens.train.trajectories import choose_timesteps
from pyunictokens.train.update import LossSettings, MicrobatchSizes, image_logprobs, streamed_backward
from pyunictokens.utils.errors import UserError

from .test_update import fake_answers, fake_images
from .world import tiny_concept, tiny_model

ADVANTAGES = torch.tensor([0.7, -0.4, 0.1, -0.9, 0.5])
CPU = torch.device("cpu")


@given(
    total=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    bounds=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    packed=st.integers(1, 40),
    room=st.integers(1, 40),
)
def test_every_row_and_timestep_is_taken_once_whatever_fits(total, bounds, packed, room):
    seen = torch.zeros(total, dtype=torch.int64)
    sizes = Microbatches(*bounds, packed=packed)

    def work(rows: slice, steps: slice) -> None:
        part = seen[rows, steps]
        if part.numel() > room:
            raise torch.OutOfMemoryError("as if")
        assert part.shape[0] <= (bounds[0] or total[0]) and part.shape[1] <= (bounds[1] or total[1])
        assert part.numel() <= packed
        part += 1

    count = sizes.run(*total, work, CPU)
    assert torch.equal(seen, torch.ones_like(seen)) and count >= total[0] * total[1] / min(packed, room)
    before = sizes.splits
    sizes.run(*total, work, CPU)
    assert sizes.splits == before, "what did not fit is not tried again"


class _Full(torch.autograd.Function):
    """Passes on forward; backward finds no memory."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        raise torch.OutOfMemoryError(f"no memory for {tuple(gradient.shape)}")


def learner(kind: str = "full") -> Showo:
    model = tiny_model().requires_grad_(kind == "full")
    model.attach(tiny_concept().requires_grad_(True))
    return model


def gradients(model: Showo) -> dict[str, Tensor]:
    assert model.concept is not None
    named = {**dict(model.named_parameters()), **{f"c.{n}": p for n, p in model.concept.named_parameters()}}
    found = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    for parameter in named.values():
        parameter.grad = None
    return found


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7, name


@pytest.mark.parametrize("kind", ["full", "concept"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_gradients_are_exact_when_memory_runs_out(kind, where, monkeypatch):
    """Where the blocks' gradients come first and the embeddings' last, a failure between them would leave half."""
    model = learner(kind)
    images, answers = fake_images(model, steps=4), fake_answers(model)
    settings = LossSettings(beta=0.05, micro_rows=5, micro_timesteps=4)
    plain = streamed_backward(model, ADVANTAGES, settings, images, answers)
    wanted = gradients(model)
    refused = []

    real = Showo.image_hidden

    def tight(model: Showo, codes: Tensor, prompts: Any, of_row: Any, at: Tensor) -> Tensor:
        if torch.is_grad_enabled() and len(codes) > (3 if kind == "concept" else 6):  # both halves in one
            refused.append(len(codes))
            if where == "forward":
                raise torch.OutOfMemoryError("no memory")
            codes = codes.clone()
            monkeypatch.setattr(model, "embed_codes", lambda c: _Full.apply(type(model).embed_codes(model, c)))
            if kind == "concept":  # the embeddings are frozen: fail at the prompt's keys instead
                keys = [[_Full.apply(layers[0]), *layers[1:]] for layers in prompts.keys]
                prompts = PromptKV(keys, prompts.values, prompts.next_position)
        hidden = real(model, codes, prompts, of_row, at)
        monkeypatch.setattr(model, "embed_codes", lambda c: type(model).embed_codes(model, c))
        return hidden

    monkeypatch.setattr(Showo, "image_hidden", tight)
    sizes = MicrobatchSizes()
    stats = streamed_backward(model, ADVANTAGES, settings, images, answers, sizes)
    assert sizes.images is not None and sizes.images.splits >= 2 and len(refused) == sizes.images.splits
    assert stats.packed_rows <= 3 < plain.packed_rows and stats.microbatches > plain.microbatches == 1
    assert stats.loss == pytest.approx(plain.loss, rel=1e-5) and stats.tokens == plain.tokens
    equal(gradients(model), wanted)
    refused.clear()
    streamed_backward(model, ADVANTAGES, settings, images, answers, sizes)
    assert not refused, "the size that fitted is remembered"


def test_one_row_that_does_not_fit_ends_with_a_way_out_and_no_half_gradient(monkeypatch):
    model = learner()
    images = fake_images(model)

    def never(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Showo, "image_hidden", never)
    with pytest.raises(UserError, match="checkpoint_layers=true"):
        streamed_backward(model, ADVANTAGES, LossSettings(), images)
    assert gradients(model) == {}


def test_scoring_goes_on_with_smaller_pieces(monkeypatch):
    model = learner()
    images = fake_images(model, scope="masked")
    wanted = image_logprobs(model, images, 5, 1)

    real = Showo.image_hidden

    def tight(model: Showo, codes: Tensor, *rest: Any) -> Tensor:
        if len(codes) > 4:
            raise torch.OutOfMemoryError("no memory")
        return real(model, codes, *rest)

    monkeypatch.setattr(Showo, "image_hidden", tight)
    sizes = MicrobatchSizes()
    assert (image_logprobs(model, images, 5, 1, sizes) - wanted).abs().max() < 1e-5
    assert sizes.scoring is not None and sizes.scoring.packed <= 2 and sizes.scoring.splits > 0


def test_gradients_are_added_all_or_none_and_hooks_run():
    first, second = (torch.randn(3, requires_grad=True) for _ in range(2))
    first.grad, seen = torch.ones(3), []
    second.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    unused = torch.randn(2, requires_grad=True)
    add_gradients((first * second).sum(), [first, second, unused, torch.randn(2)])
    assert torch.equal(first.grad, 1 + second) and torch.equal(second.grad, first)
    assert len(seen) == 1 and torch.equal(seen[0], first) and unused.grad is None
    kept = [first.grad.clone(), second.grad.clone()]
    with pytest.raises(torch.OutOfMemoryError):
        add_gradients((_Full.apply(first) * 2 + second).sum(), [second, first])
    assert torch.equal(first.grad, kept[0]) and torch.equal(second.grad, kept[1])
    add_gradients(torch.ones(()), [first])


def test_sums_that_nobody_watches_are_added_to_as_well():
    parameter, first, second = (torch.randn(3, requires_grad=True) for _ in range(3))
    for turn in (1, 2):
        add_gradients((parameter * first * second).sum(), [parameter], [first, second, torch.randn(1)])
        for leaf, others in ((parameter, first * second), (first, parameter * second), (second, parameter * first)):
            assert torch.allclose(leaf.grad, turn * others.detach())
    kept = [leaf.grad.clone() for leaf in (parameter, first, second)]
    with pytest.raises(torch.OutOfMemoryError):
        add_gradients((_Full.apply(parameter) + first).sum(), [parameter], [first])
    assert all(torch.equal(leaf.grad, its) for leaf, its in zip((parameter, first, second), kept, strict=True))


@pytest.mark.parametrize("rows", [0, 2])
def test_automatic_sizes_follow_the_memory_at_hand(rows, monkeypatch, caplog):
    model = learner()
    images = fake_images(model)
    longest, count = max(map(len, images.prompts)), model.config.num_vq_tokens
    layers = model.config.num_hidden_layers
    one = activation_bytes(model.config, longest, count, itemsize=4)
    least = activation_bytes(model.config, longest, count, checkpointed_layers=layers, itemsize=4)
    assert least < one
    fixed = sum(p.numel() * 4 for p in pieces.learning(model))

    def chosen(room: float) -> Microbatches:
        monkeypatch.setattr(pieces, "free_memory", lambda device: fixed + room)
        model.checkpoint_layers = False
        return Microbatches.choose(model, rows, 0, prompt=longest, count=count, guided=True)

    with caplog.at_level(logging.INFO):
        found = chosen(7.5 * one)
    assert (found.packed, found.checkpointed, model.checkpoint_layers) == (7, 0, False)
    assert "at most 7 packed rows" in caplog.text and "planned" in caplog.text
    short = chosen(3.9 * one)
    assert short.packed >= 4 and 0 < short.checkpointed <= layers and model.checkpoint_layers == short.checkpointed
    assert "layers are recomputed" in short.report(layers)
    assert chosen(0.0).packed == max(1, rows) and model.checkpoint_layers == layers
    scoring = Microbatches.choose(model, rows, 0, prompt=longest, count=count, guided=True, learn=False)
    assert scoring.fixed_bytes == 0 and scoring.packed >= 1
    given = Microbatches.choose(model, 3, 2, prompt=9, count=9, guided=True)
    assert given.report(2).endswith("6 packed rows (rollout × timestep), as set")


def test_an_automatic_update_is_the_same_update(monkeypatch):
    model = learner()
    images = fake_images(model, steps=4)
    streamed_backward(model, ADVANTAGES, LossSettings(), images)
    wanted = gradients(model)
    for room in (1 << 20, 1 << 30):
        monkeypatch.setattr(pieces, "free_memory", lambda device, room=room: float(room))
        stats = streamed_backward(model, ADVANTAGES, LossSettings(micro_rows=0, micro_timesteps=0), images)
        equal(gradients(model), wanted)
        assert stats.microbatches == (1 if room == 1 << 30 else stats.microbatches) and stats.microbatches >= 1
    assert pieces.free_memory(CPU) <= pieces.CPU_BYTES


def test_what_was_measured_replaces_what_was_planned(monkeypatch):
    monkeypatch.setattr(pieces, "free_memory", lambda device: 1000.0)
    sizes = Microbatches(0, 0, 4, planned_bytes=50.0, fixed_bytes=100.0, tried=False)
    sizes._learn(500.0, 4, CPU)
    assert (sizes.measured_bytes, sizes.packed) == (100.0, 9) and "measured" in sizes.report(3)
    sizes._learn(110.0, 4, CPU)
    assert sizes.measured_bytes == 12.5, "never below a quarter of the plan: the first piece may find memory cached"


@pytest.mark.parametrize("fraction", [0.2, 0.5, 1.0])
def test_some_timesteps_give_the_loss_on_average(fraction):
    model = learner("concept")
    images = fake_images(model, steps=5, scope="masked")
    whole = streamed_backward(model, ADVANTAGES, LossSettings(), images).loss
    parts = [choose_timesteps(images, "random", fraction, seed=seed) for seed in range(400)]
    kept = max(1, round(5 * fraction))
    assert all(part.inputs_RTN.shape[1] == kept for part in parts)
    assert parts[0].weight == pytest.approx(5 / kept)
    again = choose_timesteps(images, "random", fraction, seed=7)
    assert torch.equal(again.inputs_RTN, parts[7].inputs_RTN) and torch.equal(again.mask_RTN, parts[7].mask_RTN)
    alone = [
        streamed_backward(
            model, ADVANTAGES, LossSettings(), choose_timesteps(images, "random", fraction, seed=seed)
        ).loss
        for seed in range(12)
    ]
    if fraction == 1.0:
        assert alone == [pytest.approx(whole, rel=1e-6)] * 12
        return
    of_step = []
    for step in range(5):
        one = replace(
            images,
            inputs_RTN=images.inputs_RTN[:, [step]],
            chosen_RTN=images.chosen_RTN[:, [step]],
            old_logp_RTN=images.old_logp_RTN[:, [step]],
            ref_logp_RTN=images.ref_logp_RTN[:, [step]],
            mask_RTN=images.mask_RTN[:, [step]],
        )
        of_step.append(streamed_backward(model, ADVANTAGES, LossSettings(), one).loss)
    assert sum(of_step) == pytest.approx(whole, rel=1e-4)
    counts = torch.zeros(5)
    for seed, part in enumerate(parts):
        same = (images.chosen_RTN[:, :, None] == part.chosen_RTN[:, None]).all(-1).all(0)  # [T, kept]
        taken = same.any(1).nonzero()[:, 0].tolist()
        counts[taken] += 1
        if seed < 12:
            assert alone[seed] == pytest.approx(5 / kept * sum(of_step[s] for s in taken), rel=1e-4)
    assert (counts / 400 - kept / 5).abs().max() < 0.09, "each timestep is taken as often"
