"""Reinforcement on a list of prompts: no concept, rewards of one's own, resumed and over ranks as any run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyunictokens.models import Showo
from pyunictokens.rewards import RewardBatch
from pyunictokens.train import GrpoConfig, load_policy, read_metrics, reinforce
from pyunictokens.train.distributed.ranks import Ranks
from pyunictokens.train.reinforcement import Bundle
from pyunictokens.train.statistics import UpdateStats
from pyunictokens.train.update import streamed_backward
from pyunictokens.utils.errors import UserError
from tests.train.ranks import together
from tests.train.world import grpo_config, tiny_model, tiny_tokenizer, tiny_vq

PROMPTS = [
    {"prompt": "a red ball", "wanted": 0},
    {"prompt": "a blue dog", "wanted": 2},
    {"prompt": "a toy", "wanted": 0},
]


class Tiny:
    """A bundle of the tiny parts."""

    def __init__(self) -> None:
        self.model, self.vq, self.tokenizer = tiny_model(), tiny_vq(), tiny_tokenizer()


def parts() -> Bundle:
    return Tiny()


def colour(prompts: list[str], images: Tensor, wanted: list[int], **_: Any) -> list[float]:
    """How much of the wanted colour each image has."""
    assert len(prompts) == len(wanted) == len(images) and len(set(prompts)) == 1
    assert {"a red ball": 0, "a blue dog": 2, "a toy": 0}[prompts[0]] == wanted[0]
    assert images.shape[1:] == (3, 16, 16) and float(images.abs().max()) <= 1
    return [float(image[channel].mean()) for image, channel in zip(images, wanted, strict=True)]


def config(**changes: Any) -> GrpoConfig:
    return grpo_config(**{"trainable": "full", "steps": 4, "group_size": 4, **changes})


def weights(model: Showo) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def numbers(run: Path) -> list[dict[str, Any]]:
    return [{**line, "seconds": 0} for line in read_metrics(run)]


def test_a_run_without_a_concept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle, seen = parts(), []
    before = weights(bundle.model)
    with caplog.at_level(logging.WARNING):
        result = reinforce(
            bundle,
            PROMPTS,
            colour,
            config(sample_every=1),
            tmp_path / "run",
            progress=lambda what, done, wanted, now=None, /: seen.append((what, done, wanted)),
        )
    assert "no reward model judges previews: DSOG is off" in caplog.text
    assert result.steps == 4 and seen == [("grpo", done, 4) for done in (1, 2, 3, 4)]
    lines = read_metrics(tmp_path / "run")
    assert [line["mode"] for line in lines] == ["prompt"] * 4 and all(line["question"] is None for line in lines)
    drawn = [line["prompt"].rstrip(".") for line in lines]
    assert sorted(drawn[:3]) == sorted(each["prompt"] for each in PROMPTS), "each comes once before any comes twice"
    assert drawn[3] in drawn[:3]
    for line in lines:
        assert line["parts"] == {"colour": pytest.approx(line["reward_mean"])} and line["within_group_std"] > 0
        assert line["loss_answer"] == 0 and line["grad_norm"] > 0 and line["pass_rate"] is None
    after = weights(bundle.model)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    final = tmp_path / "run" / "final"
    assert not (final / "concept").exists()
    again = load_policy(tiny_model(), final)
    assert again.concept is None
    assert all(torch.equal(value, after[name]) for name, value in again.named_parameters())
    told = json.loads((tmp_path / "run" / "samples" / "step_0000.json").read_text())
    assert len(told["prompts"]) == 4 and (tmp_path / "run" / "samples" / "step_0000_final.png").exists()
    about = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert about["prompts"] == 3 and "concept" not in about


def test_adapters_learn_by_default_and_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(each) for each in PROMPTS))
    bundle = parts()
    result = reinforce(bundle, file, colour, config(trainable="lora", steps=2), tmp_path / "run")
    assert result.skipped == 0 and (tmp_path / "run" / "final" / "adapter_model.safetensors").exists()
    learned = load_policy(tiny_model(), tmp_path / "run" / "final")
    assert any(
        not torch.equal(value, dict(tiny_model().named_parameters())[n]) for n, value in weights(learned).items()
    )
    with pytest.raises(UserError, match="no concept whose rows could learn: set lora or full"):
        reinforce(parts(), file, colour, config(trainable="concept"), tmp_path / "other")
    with pytest.raises(UserError, match="holds no prompt"):
        reinforce(parts(), [], colour, config(), tmp_path / "other")


class Bright:
    def score(self, batch: RewardBatch) -> Tensor:
        return batch.images.mean((1, 2, 3))


def red(prompts: list[str], images: Tensor) -> list[float]:
    return images[:, 0].mean((1, 2)).tolist()


def test_several_rewards_with_weights(tmp_path: Path) -> None:
    reinforce(parts(), ["a red ball"], [red, Bright()], config(steps=1), tmp_path / "run", weights=[0.25, 2])
    (line,) = read_metrics(tmp_path / "run")
    assert line["parts"].keys() == {"red", "bright"}
    assert line["reward_mean"] == pytest.approx(0.25 * line["parts"]["red"] + 2 * line["parts"]["bright"], abs=1e-6)


def test_only_groups_that_differ_are_learned_from(tmp_path: Path) -> None:
    """Of three groups two have one reward throughout and no gradient: the update of the third alone is three times as
    large as that of all three, whose mean it was a part of."""

    def one_counts(prompts: list[str], images: Tensor) -> list[float]:
        return [float(image[2].mean()) if prompts[0] == "a blue dog" else 0.5 for image in images]

    norms = {}
    for kept in (1.0, 0.34):
        chosen = config(steps=1, groups=3, groups_kept=kept, beta=0.0, trainable="lora")
        reinforce(parts(), [row["prompt"] for row in PROMPTS], one_counts, chosen, tmp_path / f"{kept}")
        (line,) = read_metrics(tmp_path / f"{kept}")
        norms[kept] = line["grad_norm"]
        assert line["reward_mean"] == pytest.approx(0.5, abs=0.4)
    assert norms[1.0] > 0 and norms[0.34] == pytest.approx(3 * norms[1.0], rel=1e-3)
    with pytest.raises(UserError, match=r"groups_kept=0\.0: must be > 0"):
        config(groups_kept=0.0)


def test_a_reward_that_fails_is_named(tmp_path: Path) -> None:
    def broken(prompts: list[str], images: Tensor, wanted: list[int]) -> list[float]:
        raise ZeroDivisionError("no colours")

    with pytest.raises(UserError, match=r"broken.*ZeroDivisionError: no colours"):
        reinforce(parts(), PROMPTS, broken, config(), tmp_path / "run")


class Killed(Exception):
    pass


def test_the_second_inner_epoch_is_held_against_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`final_sample` has one view for all epochs, so its old log-probs must be taken before the first step."""
    chosen = config(steps=1, objective="final_sample", inner_epochs=2, beta=0.0, lr=1e-3, group_size=6)
    ratios: list[float] = []

    def noted(*given: Any) -> UpdateStats:
        found = streamed_backward(*given)
        ratios.append(found.ratio_max)
        return found

    monkeypatch.setattr("pyunictokens.train.learner.streamed_backward", noted)
    reinforce(parts(), PROMPTS[:1], colour, chosen, tmp_path / "run")
    first, second = ratios
    assert first == pytest.approx(1.0, abs=1e-3) and second > 1.01


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path: Path) -> None:
    settings = config(steps=5, checkpoint_every=2, objective="gspo", inner_epochs=2, clip_low=0.01, clip_high=0.01)
    straight = parts()
    reinforce(straight, PROMPTS, colour, settings, tmp_path / "straight")

    def stop(what: str, done: int, wanted: int, now: Any = None, /) -> None:
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        reinforce(parts(), PROMPTS, colour, settings, tmp_path / "broken", progress=stop)
    resumed = parts()
    reinforce(resumed, PROMPTS, colour, settings, tmp_path / "broken", resume=True)
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "straight")
    assert all(torch.equal(value, weights(straight.model)[name]) for name, value in weights(resumed.model).items())
    with pytest.raises(UserError, match="prompts: the run has 3, this is 2"):
        reinforce(parts(), PROMPTS[:2], colour, settings, tmp_path / "broken", resume=True)
    other = [*PROMPTS[:2], {"prompt": "a red toy", "wanted": 0}]
    with pytest.raises(UserError, match="prompts_sha256: the run has"):
        reinforce(parts(), other, colour, settings, tmp_path / "broken", resume=True)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("objective", ["gspo", "final_sample"])
def test_results_do_not_depend_on_the_number_of_ranks(objective: str, tmp_path: Path) -> None:
    choice = {"timestep_choice": "largest_change", "timestep_fraction": 0.5}
    some = {"groups": 2, "groups_kept": 0.5} if objective == "gspo" else {"rollouts_kept": 0.67}
    settings = config(steps=2, group_size=3, objective=objective, lr=1e-4, sample_every=1, **choice, **some)
    reinforce(parts(), PROMPTS, colour, settings, tmp_path / "alone")

    def work(ranks: Ranks) -> None:
        reinforce(parts(), PROMPTS, colour, settings, tmp_path / "two", ranks=ranks)

    assert together(2, work, tmp_path / "results") == [None, None]
    for mine, true in zip(numbers(tmp_path / "two"), numbers(tmp_path / "alone"), strict=True):
        for key in ("loss", "reward_mean", "kl", "ratio_mean", "clip_fraction"):
            assert mine[key] == pytest.approx(true[key], abs=1e-5), key
        assert mine["prompt"] == true["prompt"] and mine["grad_norm"] == pytest.approx(true["grad_norm"], rel=1e-3)
