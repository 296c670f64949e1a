"""Every objective against its plain definition: loops in float64 with every graph alive, over several inner epochs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyunictokens.config.training import OBJECTIVES, GrpoConfig, TrainConfig
from pyunictokens.models import Showo
from pyunictokens.ops import token_mask
from pyunictokens.train import read_metrics, train_grpo
from pyunictokens.train.objective import REGISTRY, Objective, objective_of
from pyunictokens.train.trajectories import (
    AnswerTrajectories,
    ImageTrajectories,
    changes,
    choose_timesteps,
    remask,
)
from pyunictokens.train.update import LossSettings, answer_logprobs, image_logprobs, streamed_backward
from pyunictokens.utils.errors import UserError
from tests.train import naive
from tests.train.test_update import fake_answers, fake_images, peak_bytes
from tests.train.world import World, grpo_config, tiny_concept, tiny_model, world

ADVANTAGES = torch.tensor([0.9, -0.7, -0.2], dtype=torch.float64)
CLIP = {"unictask": (0.1, 0.15), "mask_grpo": (0.2, 0.3), "gspo": (0.01, 0.015), "final_sample": (0.1, 0.15)}


def double_model() -> Showo:
    model = tiny_model().double().requires_grad_(True)
    model.attach(tiny_concept().double().requires_grad_(True))
    return model


def learners(model: Showo) -> dict[str, Tensor]:
    assert model.concept is not None
    return {**dict(model.named_parameters()), **{f"c.{n}": p for n, p in model.concept.named_parameters()}}


def recorded(model: Showo, objective: Objective) -> tuple[ImageTrajectories, AnswerTrajectories]:
    """Three rollouts as the loop prepares them; the reference differs a little from the policy."""
    images, answers = fake_images(model, rows=3, scope=objective.token_scope), fake_answers(model, rows=3)
    images.mask_RTN = token_mask(images.inputs_RTN, objective.token_scope)
    images = objective.actions(images, images.chosen_RTN[:, -1], [(5, row) for row in range(3)])
    now, said = image_logprobs(model, images, 3, 3), answer_logprobs(model, answers)
    generator = torch.Generator().manual_seed(11)
    images.old_logp_RTN, answers.old_logp_RL = now, said
    images.ref_logp_RTN = now + 0.2 * torch.randn(now.shape, generator=generator, dtype=torch.float64)
    answers.ref_logp_RL = said + 0.2 * torch.randn(said.shape, generator=generator, dtype=torch.float64)
    return images, answers


def plain(
    name: str, reduction: str, settings: LossSettings, logp: Tensor, old: Tensor, ref: Tensor, mask: Tensor, weight: Any
) -> tuple[Tensor, int]:
    """(loss of one part, ratios that are clipped), term by term. logp [R, T, N] or [R, L]."""
    total, clipped, rows = logp.new_zeros(()), 0, len(logp)
    for row in range(rows):
        places = [tuple(place) for place in mask[row].nonzero().tolist()]
        if name == "gspo":
            groups = [places]
        elif name == "mask_grpo" and logp.dim() == 3:
            groups = [[place for place in places if place[0] == step] for step in range(logp.shape[1])]
        else:
            groups = [[place] for place in places]
        share = 1.0 if reduction == "sum" else 1.0 / len(groups)
        for group in groups:
            count = len(group) if name == "gspo" else 1
            new, before, reference = (
                sum((x[(row, *place)] for place in group), logp.new_zeros(())) / count for x in (logp, old, ref)
            )
            ratio, a = (new - before).exp(), ADVANTAGES[row]
            gain = torch.min(ratio * a, ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high) * a)
            k3 = (reference - new).exp() - (reference - new) - 1
            total = total - weight * share * (gain - settings.beta * k3) / rows
            inside = 1 - settings.clip_low <= float(ratio.detach()) <= 1 + settings.clip_high
            clipped += not inside and bool((ratio.detach() > 1) == (a > 0))
    return total, clipped


@pytest.mark.parametrize("pieces", [(2, 2), (3, 1)])
@pytest.mark.parametrize(
    ("name", "reduction"),
    [("unictask", "sum"), ("unictask", "mean"), ("mask_grpo", "mean"), ("gspo", "auto"), ("final_sample", "sum")],
)
def test_loss_and_gradients_over_three_inner_epochs(name: str, reduction: str, pieces: tuple[int, int]) -> None:
    scope = "all" if pieces[0] == 2 else "newly_unmasked"
    config = GrpoConfig(objective=name, reduction=reduction, token_scope=scope)  # type: ignore[arg-type]
    objective = objective_of(config)
    low, high = CLIP[name]
    settings = LossSettings(0.05, low, high, 0.4, 0.6, *pieces, objective)
    model = double_model()
    images, answers = recorded(model, objective)
    reduction = "mean" if objective.published_reduction == "mean" else reduction
    met = 0
    for epoch in range(3):
        mask = torch.ones_like(images.inputs_RTN, dtype=torch.bool) if images.mask_RTN is None else images.mask_RTN
        drawn, off = plain(
            name,
            reduction,
            settings,
            naive.image_logp(model, images),
            images.old_logp_RTN,
            images.ref_logp_RTN,
            mask,
            0.6,
        )
        said, also = plain(
            name,
            reduction,
            settings,
            naive.answer_logp(model, answers),
            answers.old_logp_RL,
            answers.ref_logp_RL,
            answers.mask_RL,
            0.4,
        )
        named = learners(model)
        wanted = torch.autograd.grad(drawn + said, list(named.values()), allow_unused=True)
        stats = streamed_backward(model, ADVANTAGES, settings, images, answers)
        assert stats.loss_image == pytest.approx(float(drawn.detach()), rel=1e-6, abs=1e-9)
        assert stats.loss_answer == pytest.approx(float(said.detach()), rel=1e-6, abs=1e-9)
        if epoch == 0:
            assert stats.ratio_max == pytest.approx(1, abs=1e-9) and off + also == 0
        assert stats.clip_fraction * stats.tokens == pytest.approx(off + also, abs=0.01)
        met += off + also
        largest = max(float(gradient.abs().max()) for gradient in wanted if gradient is not None)
        with torch.no_grad():
            for (key, parameter), gradient in zip(named.items(), wanted, strict=True):
                found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                true = torch.zeros_like(parameter) if gradient is None else gradient
                assert (found - true).abs().max() <= 1e-7 * true.abs().max() + 1e-9 * largest, key
                parameter -= 0.02 / largest * true
                parameter.grad = None
    assert met > 0, "clipping acted"


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_a_ratio_of_rollouts_needs_no_memory_for_timesteps(tmp_path: Path) -> None:
    few, many = (
        peak_bytes(steps, tmp_path, LossSettings(micro_rows=2, objective=REGISTRY["gspo"]())) for steps in (5, 50)
    )
    assert few > 300_000 and many <= 1.10 * few


def test_advantages_by_a_loop() -> None:
    rewards = torch.rand(7, dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    for kind in ("mean", "std", "leave_one_out"):
        found = objective_of(GrpoConfig(advantage=kind)).advantages(rewards, groups)  # type: ignore[arg-type]
        for row in range(7):
            own = [float(rewards[i]) for i in range(7) if groups[i] == groups[row]]
            others = [float(rewards[i]) for i in range(7) if groups[i] == groups[row] and i != row]
            wanted = float(rewards[row]) - (np.mean(others) if kind == "leave_one_out" else np.mean(own))
            if kind == "std":
                wanted /= np.std(own, ddof=1) + 1e-4
            assert float(found[row]) == pytest.approx(wanted, abs=1e-12)
    equal = objective_of(GrpoConfig(advantage="std")).advantages(torch.full((3,), 0.4), torch.zeros(3).long())
    assert equal.abs().max() < 1e-3, "a group without spread teaches nothing"


# --- timesteps -----------------------------------------------------------------------------------------------------


def test_changes_by_a_loop() -> None:
    chosen, embedding = torch.randint(0, 9, (3, 5, 7), dtype=torch.int16), torch.randn(9, 4)
    chosen[:, 2] = chosen[:, 1]  # nothing changes
    found = changes(chosen, embedding)
    for row in range(3):
        assert found[row, 0] == 1 and found[row, 2] == 0
        for step in (1, 3, 4):
            pairs = [(embedding[int(chosen[row, step - 1, n])], embedding[int(chosen[row, step, n])]) for n in range(7)]
            apart = [1 - float(torch.dot(a, b) / (a.norm() * b.norm())) for a, b in pairs]
            assert float(found[row, step]) == pytest.approx(np.mean(apart), abs=1e-5)


def test_each_rollout_keeps_the_timesteps_that_change_it_most() -> None:
    model = tiny_model()
    model.attach(tiny_concept())
    images = fake_images(model, steps=5, rows=4, scope="masked")
    images.chosen_RTN = torch.randint(0, 32, images.chosen_RTN.shape, dtype=torch.int16)
    images.chosen_RTN[0, 1] = images.chosen_RTN[0, 0]
    images.chosen_RTN[1, 4] = images.chosen_RTN[1, 3]
    embedding = model.image_head()[0]
    kept = choose_timesteps(images, "largest_change", 0.6, seed=0, embedding_KD=embedding)
    found = changes(images.chosen_RTN, embedding)
    assert kept.inputs_RTN.shape == (4, 3, 16) and kept.weight == pytest.approx(5 / 3)
    for row in range(4):
        order = sorted(sorted(range(5), key=lambda step: -float(found[row, step]))[:3])
        for name in ("inputs_RTN", "chosen_RTN", "old_logp_RTN", "ref_logp_RTN", "mask_RTN"):
            assert torch.equal(getattr(kept, name)[row], getattr(images, name)[row, order]), name
    assert 1 not in sorted(range(5), key=lambda step: -float(found[0, step]))[:3]
    alone = choose_timesteps(  # a rollout's choice is its own, so ranks do not matter
        images.part(slice(2, 3), slice(None), torch.device("cpu")),
        "largest_change",
        0.6,
        seed=9,
        embedding_KD=embedding,
    )
    assert torch.equal(alone.inputs_RTN[0], kept.inputs_RTN[2])
    assert choose_timesteps(images, "all", 1.0, seed=0) is images


def test_remasking_hides_as_many_codes_at_random_places() -> None:
    model = tiny_model()
    images = fake_images(model, steps=4, rows=3)
    sample = torch.randint(0, 32, (3, 16))
    found = remask(images, sample, [(7, row) for row in range(3)])
    hidden = found.inputs_RTN < 0
    assert torch.equal(hidden.sum(-1), (images.inputs_RTN < 0).sum(-1)) and torch.equal(hidden, found.mask_RTN)
    assert torch.equal(found.chosen_RTN.long(), sample[:, None].expand(3, 4, 16))
    assert torch.equal(found.inputs_RTN[~hidden], found.chosen_RTN[~hidden])
    assert len(found.old_logp_RTN) == 0, "old log-probs belong to the recorded choices"
    again = remask(images, sample, [(7, row) for row in range(3)])
    other = remask(images, sample, [(8, row) for row in range(3)])
    assert torch.equal(again.inputs_RTN, found.inputs_RTN) and not torch.equal(other.inputs_RTN, found.inputs_RTN)
    alone = remask(images.part(slice(2, 3), slice(None), torch.device("cpu")), sample[2:], [(7, 2)])
    assert torch.equal(alone.inputs_RTN[0], found.inputs_RTN[2])
    many = remask(fake_images(model, steps=2, rows=1), sample[:1], [(0, 0)])
    often = torch.stack([remask(many, sample[:1], [(seed, 0)]).mask_RTN[0, 1] for seed in range(300)]).float().mean(0)
    rate = float(many.mask_RTN[0, 1].float().mean())
    assert (often - rate).abs().max() < 0.15, "every position alike"


# --- chosen by a setting -------------------------------------------------------------------------------------------


def test_names_and_classes_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(REGISTRY) == OBJECTIVES and TrainConfig().grpo.objective == "unictask"
    for name in OBJECTIVES:
        chosen = TrainConfig().override([f"grpo.objective={name}", "grpo.advantage=std"]).grpo
        assert type(objective_of(chosen)) is REGISTRY[name] and objective_of(chosen).advantage == "std"
    mine = objective_of(GrpoConfig(objective=f"{__name__}:Mine"))
    assert type(mine) is Mine and mine.reduction == "mean"
    for name, said in [
        (
            "gpso",
            "objective='gpso': must be one of unictask, mask_grpo, gspo, final_sample, unigrpo, diffu_grpo",
        ),
        ("no_such_module:X", "No module named 'no_such_module'"),
        (f"{__name__}:World", "must be a class derived from"),
        (f"{__name__}:Nobody", "Nobody"),
    ]:
        with pytest.raises(UserError, match=re.escape(said)):
            objective_of(GrpoConfig(objective=name))


class Mine(Objective):
    published_reduction = "mean"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["timestep_choice=all", "timestep_fraction=0.5"], "timestep_fraction=0.5 with timestep_choice=all"),
        (["timestep_choice=largest_change"], "say how many timesteps, e.g. timestep_fraction=0.2"),
        (["alpha_image=0", "alpha_answer=0"], "nothing would be learned"),
        (["alpha_image=0", "reasoning=false"], "nothing would be learned"),
        (["grpo.advantage=median"], "must be one of mean, std, leave_one_out"),
        (["inner_updates=2", "inner_epochs=3"], "inner_updates is the old name of inner_epochs: give one of the two"),
    ],
)
def test_what_does_not_go_together(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        TrainConfig().override(words)


def test_a_rollout_of_which_nothing_counts_has_no_ratio() -> None:
    objective = objective_of(GrpoConfig(objective="gspo", token_scope="newly_unmasked"))
    images = fake_images(tiny_model(), rows=3)
    images.mask_RTN = token_mask(images.inputs_RTN, "newly_unmasked")
    objective.check(images)
    images.mask_RTN[1] = False
    with pytest.raises(UserError, match=r"no token of rollout 1 counts .*token_scope=masked"):
        objective.check(images)


def test_old_names_of_settings_are_read(tmp_path: Path) -> None:
    for word in ("inner_updates=3", "grpo.inner_updates=3"):
        with pytest.warns(UserWarning, match="inner_updates is now called inner_epochs"):
            assert TrainConfig().override([word]).grpo.inner_epochs == 3
    file = tmp_path / "old.yaml"
    file.write_text("grpo: {inner_updates: 2}\n")
    with pytest.warns(UserWarning, match="inner_updates is now called inner_epochs"):
        config = TrainConfig.from_yaml(file)
    assert config.grpo.inner_epochs == 2
    config.to_yaml(file)
    assert "inner_epochs: 2" in file.read_text() and "inner_updates" not in file.read_text()


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world(tmp_path_factory.mktemp("world") / "data")


@pytest.mark.filterwarnings("ignore:.*rows are filled")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_with_each(name: str, here: World, tmp_path: Path) -> None:
    words = [f"grpo.objective={name}", "grpo.inner_epochs=2", "timestep_choice=largest_change", "timestep_fraction=0.5"]
    words += ["grpo.advantage=leave_one_out", "grpo.trainable=full", "grpo.lr=1e-3"]
    base = TrainConfig(grpo=grpo_config(steps=2))
    arguments = here.fresh()
    result = train_grpo(**arguments, config=base.override(words).grpo, out_dir=tmp_path / name)
    lines = read_metrics(tmp_path / name)
    assert len(lines) == 2 and result.skipped == 0
    for line in lines:
        assert line["grad_norm"] > 0 and line["ratio_mean"] == pytest.approx(1, abs=1e-3)
        assert (line["entropy"] is None) == (name in ("mask_grpo", "gspo", "coupled"))
    assert lines[1]["kl"] > 0
    start = dict(tiny_model().named_parameters())
    assert any(not torch.equal(start[key], value) for key, value in arguments["model"].named_parameters())


@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_objectives_learn_differently(here: World, tmp_path: Path) -> None:
    learned = {}
    for name in OBJECTIVES:
        config = replace(grpo_config(steps=1, checkpoint_every=0), objective=name)
        result = train_grpo(**here.fresh(), config=config, out_dir=tmp_path / name)
        learned[name] = result.last["loss_image"], result.last["grad_norm"]
    assert len({round(norm, 6) for _, norm in learned.values()}) == len(OBJECTIVES)
