"""The objectives of text diffusion against their plain definitions in float64, on texts that end and on images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import pyunictokens as uct
from pyunictokens import RolloutEngine, ops
from pyunictokens.config.training import GrpoConfig
from pyunictokens.models import ModelBundle
from pyunictokens.models.llada import LlamaWriter
from pyunictokens.rollout.types import TextRollout
from pyunictokens.train.objective import objective_of
from pyunictokens.train.trajectories import ImageTrajectories
from pyunictokens.train.update import LossSettings, image_logprobs, streamed_backward
from pyunictokens.utils.errors import UserError

from ..models.llama_tiny import Plain, write_checkpoint
from .test_update import fake_images
from .world import tiny_concept, tiny_model

ADVANTAGES = torch.tensor([0.9, -0.7, -0.4, 0.3], dtype=torch.float64)
KEYS = [(5, row) for row in range(4)]
HEAT = 0.8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llada"), "llada")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> ModelBundle:
    return uct.models.load(folder, torch.float64)


def written(bundle: ModelBundle) -> TextRollout:
    """Four texts of 8 tokens, some of which end before."""
    rollout = RolloutEngine.of(bundle).write(
        ["big cat ?", "a red dog"],
        samples=2,
        max_new_tokens=8,
        block_length=4,
        steps=4,
        temperature=HEAT,
        seed=5,
        record=True,
    )
    assert rollout.lengths.tolist() == [8, 8, 8, 8]
    rollout.lengths = torch.tensor([8, 5, 8, 3])  # as if an end token stood there
    return rollout


def texts(bundle: ModelBundle, scope: str = "newly_unmasked") -> ImageTrajectories:
    assert isinstance(bundle.model, LlamaWriter)
    return ImageTrajectories.of_texts(bundle.model, written(bundle), scope)


def plain_logp(plain: Plain, images: ImageTrajectories, row: int, view: int, place: int) -> Tensor:
    prompt = images.prompts[images.prompt_of_row[row]]
    shown = [3 if token < 0 else token for token in images.inputs_RTN[row, view].tolist()]
    logits = plain.logits(prompt + shown)[len(prompt) + place] / HEAT
    return logits.log_softmax(-1)[int(images.chosen_RTN[row, view, place])]


def plain_loss(name: str, plain: Plain, images: ImageTrajectories, settings: LossSettings) -> Tensor:
    """Term by term."""
    assert images.mask_RTN is not None and images.ref_logp_RTN is not None
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(images)):
        counted = images.mask_RTN[row].nonzero().tolist()
        terms: list[list[list[int]]] = [[place] for place in counted]
        if name == "coupled":  # a token with the two views that hide it
            terms = [[[v, n] for v, n in counted if n == place] for place in sorted({n for _, n in counted})]
            assert all(len(term) == 2 for term in terms)
        share = 1.0 if name == "unictask" else 1.0 / len(terms)
        for term in terms:
            new = sum(plain_logp(plain, images, row, v, n) for v, n in term) / len(term)
            old = sum(float(images.old_logp_RTN[row, v, n]) for v, n in term) / len(term)
            ref = sum(float(images.ref_logp_RTN[row, v, n]) for v, n in term) / len(term)
            assert isinstance(new, Tensor)
            ratio, a = (new - old).exp(), ADVANTAGES[row]
            gain = torch.min(ratio * a, ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high) * a)
            k3 = (ref - new).exp() - (ref - new) - 1
            total = total - settings.alpha_image * share * (gain - settings.beta * k3) / len(images)
    return total


@pytest.mark.parametrize("name", ["unictask", "unigrpo", "diffu_grpo", "coupled"])
def test_loss_and_gradients(name: str, folder: Path, bundle: ModelBundle) -> None:
    objective = objective_of(GrpoConfig(objective=name))
    model = LlamaWriter.from_pretrained(folder, torch.float64)
    recorded = texts(bundle)
    sample = recorded.chosen_RTN[:, -1]
    plain = Plain(folder)
    for images in objective.views(recorded, sample, KEYS, 2):
        now = image_logprobs(model, images, 2, 2)
        if name == "unictask":
            assert images.mask_RTN is not None
            assert (now - images.old_logp_RTN)[images.mask_RTN].abs().max() < 1e-5
        noise = torch.Generator().manual_seed(11)
        images.old_logp_RTN = now + 0.2 * torch.randn(now.shape, generator=noise, dtype=torch.float64)
        images.ref_logp_RTN = now + 0.2 * torch.randn(now.shape, generator=noise, dtype=torch.float64)
        settings = LossSettings(0.05, 0.1, 0.15, 0.4, 0.6, 3, 2, objective)
        for value in plain.weights.values():
            value.requires_grad_(True)
        wanted = plain_loss(name, plain, images, settings)
        gradients = dict(zip(plain.weights, torch.autograd.grad(wanted, list(plain.weights.values())), strict=True))
        model.requires_grad_(True).zero_grad()
        stats = streamed_backward(model, ADVANTAGES, settings, images)
        assert stats.loss == pytest.approx(float(wanted.detach()), rel=1e-6) and stats.clip_fraction > 0
        for key, parameter in model.named_parameters():
            gradient = gradients[key.removeprefix("model.transformer.")]
            assert parameter.grad is not None
            assert (parameter.grad - gradient).abs().max() <= 1e-6 * gradient.abs().max() + 1e-12, key


def test_unigrpo_draws_parts_that_lie_evenly_apart(bundle: ModelBundle) -> None:
    images = texts(bundle)
    sample, objective = images.chosen_RTN[:, -1], objective_of(GrpoConfig(objective="unigrpo"))
    views = objective.views(images, sample, KEYS, 4)
    assert len(views) == 4 and all(view.inputs_RTN.shape == (4, 1, 8) for view in views)
    lengths = [8, 5, 8, 3]
    for row, size in enumerate(lengths):
        start = np.random.default_rng(list(KEYS[row])).random()
        for epoch, view in enumerate(views):
            assert view.mask_RTN is not None
            hidden = view.inputs_RTN[row, 0] < 0
            assert int(hidden.sum()) == min(size, max(1, round((start + epoch / 4) % 1 * size)))
            assert torch.equal(hidden, view.mask_RTN[row, 0]) and not bool(hidden[size:].any())
            assert torch.equal(view.inputs_RTN[row, 0][~hidden], sample[row][~hidden])
    again, other = (objective.views(images, sample, [(s, r) for r in range(4)], 4)[0] for s in (5, 6))
    assert torch.equal(again.inputs_RTN, views[0].inputs_RTN)
    assert not torch.equal(other.inputs_RTN, views[0].inputs_RTN)


def test_diffu_grpo_hides_all_of_the_sample_and_some_of_the_prompt(bundle: ModelBundle) -> None:
    images = texts(bundle)
    objective = objective_of(GrpoConfig(objective="diffu_grpo"))
    views = objective.views(images, images.chosen_RTN[:, -1], KEYS, 40)
    hidden = total = 0
    for view in views:
        assert view.mask_RTN is not None and view.mask_RTN[:, 0].sum(-1).tolist() == [8, 5, 8, 3]
        for row, place in enumerate(view.prompt_of_row):
            was, now = images.prompts[images.prompt_of_row[row]], view.prompts[place]
            assert all(token in (before, 3) for before, token in zip(was, now, strict=True))
            hidden, total = hidden + sum(token == 3 for token in now), total + len(now)
    assert 0.11 < hidden / total < 0.19
    assert views[0].prompts != views[1].prompts
    model = tiny_model()
    model.attach(tiny_concept())
    drawn = fake_images(model, rows=4)
    (view,) = objective.views(drawn, drawn.chosen_RTN[:, -1], KEYS, 3)
    assert view.prompts == drawn.prompts and bool((view.inputs_RTN == -1).all())


def test_coupled_scores_every_token_twice(bundle: ModelBundle) -> None:
    images = texts(bundle)
    objective = objective_of(GrpoConfig(objective="coupled"))
    for view in objective.views(images, images.chosen_RTN[:, -1], KEYS, 3):
        assert view.mask_RTN is not None
        assert torch.equal(view.mask_RTN.sum(1), 2 * images.kept.long())
        assert torch.equal(view.mask_RTN[:, 2], images.kept)
        parts = view.mask_RTN[:, 0].sum(-1) / images.kept.sum(-1)
        assert bool((parts > 0.1).all() and (parts < 0.9).all())


def test_the_operations_at_lladas_vocabulary() -> None:
    """126464 ids: log-probs, loss and gradients of a few tokens, without logits, against logits in float64."""
    generator = torch.Generator().manual_seed(1)
    entries, shape = 126464, (2, 1, 5)
    hidden, weight = torch.randn(*shape, 8, generator=generator), torch.randn(entries, 8, generator=generator)
    chosen = torch.randint(entries, shape, generator=generator)
    hidden.requires_grad_(True)
    weight.requires_grad_(True)
    wide = (hidden.detach().double().requires_grad_(True), weight.detach().double().requires_grad_(True))
    true = (wide[0] @ wide[1].T / HEAT).log_softmax(-1).gather(-1, chosen[..., None])[..., 0]
    old, advantages = true.detach() - 0.1, torch.tensor([0.5, -0.8], dtype=torch.float64)
    ratio = (true - old).exp()
    gain = torch.min(ratio * advantages[:, None, None], ratio.clamp(0.8, 1.2) * advantages[:, None, None])
    (-gain.sum() / 2).backward()
    loss, logp, _ = ops.maskgit_grpo_loss(
        hidden, weight, chosen, old.float(), None, advantages.float(), temperature=HEAT, alpha=1.0, beta=0.0
    )
    loss.backward()
    assert (logp - true).abs().max() < 1e-4 and float(loss.detach()) == pytest.approx(
        float(-gain.detach().sum() / 2), rel=1e-4
    )
    for leaf, exact in zip((hidden, weight), wide, strict=True):
        assert leaf.grad is not None and exact.grad is not None
        assert (leaf.grad - exact.grad).abs().max() <= 1e-4 * exact.grad.abs().max()


def test_what_no_step_sampled_yet_does_not_count(bundle: ModelBundle) -> None:
    """Blocks that come later have no token at a step: what the record holds there is nobody's choice."""
    steps = written(bundle).steps
    assert steps is not None
    for scope in ("masked", "all"):
        images = texts(bundle, scope)
        assert images.mask_RTN is not None
        drawn = images.mask_RTN & (images.inputs_RTN < 0)
        assert drawn[[0, 2]].sum(-1).tolist() == [[4, 2, 4, 2]] * 2, "blocks of four tokens in two steps"
        now = image_logprobs(bundle.model, images)
        assert (now - steps.logp)[drawn].abs().max() < 1e-5, "log-probs of what was drawn"


def test_texts_count_up_to_their_end(bundle: ModelBundle) -> None:
    for scope in ("newly_unmasked", "masked", "all"):
        images = texts(bundle, scope)
        assert images.mask_RTN is not None and not bool((images.mask_RTN & ~images.kept[:, None]).any())
        assert (len(images.old_logp_RTN) == 0) == (scope != "newly_unmasked") and images.temperature == HEAT
    newly = texts(bundle).mask_RTN
    assert newly is not None and newly.sum(1).sum(1).tolist() == [8, 5, 8, 3], "each token once"
    rollout = RolloutEngine.of(bundle).write(["a cat"], max_new_tokens=8)
    assert isinstance(bundle.model, LlamaWriter)
    with pytest.raises(UserError, match="write them with record=True"):
        ImageTrajectories.of_texts(bundle.model, rollout)
