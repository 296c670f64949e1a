"""Held-out prompts: measured with the same noise, the best policy kept, falls noticed, headroom said."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyunictokens.config.training import DsogConfig, HeldOutConfig
from pyunictokens.data.images import save_image
from pyunictokens.data.prompts import read_prompts
from pyunictokens.models import Showo
from pyunictokens.rewards.ensemble import as_rewards
from pyunictokens.rollout.engine import RolloutEngine
from pyunictokens.train import load_policy, read_metrics, reinforce, train_grpo
from pyunictokens.train.distributed.ranks import Ranks
from pyunictokens.train.grpo import run_grpo
from pyunictokens.train.held_out import SEED, HeldOut, Measurement, difference, verdict
from pyunictokens.train.images import ReferenceImages
from pyunictokens.train.tasks import ConceptTasks, PromptTasks
from pyunictokens.utils.errors import UserError
from tests.train.ranks import together
from tests.train.test_reinforce import PROMPTS, colour, config, parts, weights
from tests.train.world import grpo_config, tiny_concept, tiny_model, world

HELD_OUT = [{"prompt": "a red dog", "wanted": 0}, {"prompt": "the blue ball", "wanted": 2}]


def channel(prompts: list[str], images: Tensor, wanted: list[int]) -> list[float]:
    return [float(image[each].mean()) for image, each in zip(images, wanted, strict=True)]


def darkness(images: Tensor) -> Tensor:
    return -images.mean((1, 2, 3))


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]


def settings(**changes: Any) -> Any:
    held = HeldOutConfig(**{"every": 2, "patience": 0, **changes.pop("held", {})})
    return config(held_out=held, **changes)


def test_measurements_are_those_of_the_policy_at_that_step(tmp_path: Path) -> None:
    """Worked out anew from the policies that the run saved: beginning, best and end."""
    bundle = parts()
    result = reinforce(
        bundle, PROMPTS, channel, settings(steps=5), tmp_path / "run", held_out=HELD_OUT, metrics={"dark": darkness}
    )
    assert [each.step for each in result.held_out] == [0, 2, 4, 5]
    assert [line["step"] for line in lines(tmp_path / "run")] == [0, 2, 4, 5]

    def truth(model: Showo) -> tuple[list[float], list[float]]:
        engine = RolloutEngine(model, bundle.vq, bundle.tokenizer)
        texts = [each["prompt"] for each in HELD_OUT]
        pixels = engine.generate_images(
            texts, samples=2, steps=4, guidance_scale=2.0, seed=SEED, sample_ids=range(4)
        ).pixels
        assert pixels is not None
        pixels = pixels.clamp(-1, 1)
        wanted = [each["wanted"] for each in HELD_OUT for _ in range(2)]
        reward = torch.tensor(channel([], pixels, wanted)).view(2, 2).mean(1)
        return reward.tolist(), darkness(pixels).view(2, 2).mean(1).tolist()

    best = load_policy(tiny_model(), tmp_path / "run" / "best")
    told = json.loads((tmp_path / "run" / "best" / "held_out.json").read_text())
    assert result.best is not None and told["step"] == result.best.step
    assert result.best.mean("reward") == max(each.mean("reward") for each in result.held_out)
    for model, measured in (
        (tiny_model(), result.held_out[0]),
        (best, result.best),
        (bundle.model, result.held_out[-1]),
    ):
        reward, dark = truth(model)
        assert measured.values["reward"] == pytest.approx(reward, abs=1e-5)
        assert measured.values["channel"] == measured.values["reward"]
        assert measured.values["dark"] == pytest.approx(dark, abs=1e-5)
    assert result.held_out[0].mean("reward") != result.held_out[-1].mean("reward")


def test_measuring_changes_nothing_in_training(tmp_path: Path) -> None:
    with_it, without = parts(), parts()
    reinforce(with_it, PROMPTS, channel, settings(), tmp_path / "with", held_out=HELD_OUT)
    reinforce(without, PROMPTS, channel, settings(), tmp_path / "without")
    rest = weights(without.model)
    assert all(torch.equal(value, rest[name]) for name, value in weights(with_it.model).items())
    assert not (tmp_path / "without" / "held_out.jsonl").exists()


class Killed(Exception):
    pass


def test_a_resumed_run_measures_as_the_run_that_never_stopped(tmp_path: Path) -> None:
    chosen = settings(steps=6, checkpoint_every=3)
    straight = reinforce(parts(), PROMPTS, channel, chosen, tmp_path / "straight", held_out=HELD_OUT)

    def stop(what: str, done: int, wanted: int, now: Any = None, /) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        reinforce(parts(), PROMPTS, channel, chosen, tmp_path / "broken", held_out=HELD_OUT, progress=stop)
    resumed = reinforce(parts(), PROMPTS, channel, chosen, tmp_path / "broken", held_out=HELD_OUT, resume=True)
    assert lines(tmp_path / "broken") == lines(tmp_path / "straight")
    assert resumed.best is not None and straight.best is not None and resumed.best.step == straight.best.step
    one, other = (load_policy(tiny_model(), tmp_path / name / "best") for name in ("broken", "straight"))
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())
    with pytest.raises(UserError, match="held_out_prompts: the run has 2, this is 1"):
        reinforce(parts(), PROMPTS, channel, chosen, tmp_path / "broken", held_out=HELD_OUT[:1], resume=True)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_measurements_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    chosen = settings(steps=2, group_size=3, lr=1e-4, held={"images": 3})
    three = [*HELD_OUT, {"prompt": "a dog", "wanted": 1}]
    reinforce(parts(), PROMPTS, channel, chosen, tmp_path / "alone", held_out=three)

    def work(ranks: Ranks) -> None:
        reinforce(parts(), PROMPTS, channel, chosen, tmp_path / "two", held_out=three, ranks=ranks)

    assert together(2, work, tmp_path / "results") == [None, None]
    for mine, true in zip(lines(tmp_path / "two"), lines(tmp_path / "alone"), strict=True):
        assert mine["step"] == true["step"]
        assert mine["prompts"]["reward"] == pytest.approx(true["prompts"]["reward"], abs=1e-4)
    assert (tmp_path / "two" / "best" / "policy.json").exists()


# --- what the measurements say ---------------------------------------------------------------------------------------


def made(step: int, *values: float) -> Measurement:
    return Measurement(step, {"reward": list(values)})


def test_differences_are_taken_prompt_by_prompt() -> None:
    mean, error = difference(made(1, 0.5, 0.9, 0.1), made(0, 0.4, 0.7, 0.1), "reward")
    assert mean == pytest.approx(0.1) and error == pytest.approx(0.1 / math.sqrt(3))
    assert difference(made(1, 0.5, math.nan), made(0, 0.4, 0.7), "reward") == (pytest.approx(0.1), math.inf)


def test_falls_count_from_the_best_and_only_where_they_are_clear() -> None:
    rising = {step: 0.1 * step for step in range(8)}
    history = [made(0, 0.1, 0.5), made(2, 0.3, 0.7), made(4, 0.2, 0.6), made(6, 0.1, 0.5)]
    said = verdict(history, rising, "reward")
    assert said.best.step == 2 and said.falls == 2 and said.drop == pytest.approx(0.2) and said.training_rose
    falling = {step: -0.1 * step for step in range(8)}
    assert not verdict(history, falling, "reward").training_rose
    unclear = [*history[:3], made(6, 0.1, 0.8)]  # one up, one down: below the best by no more than the error
    assert verdict(unclear, rising, "reward").falls == 0
    assert verdict(history[:1], {}, "reward").falls == 0
    assert verdict([made(0, 0.9, 0.9), made(2, 0.1, 0.2), made(4, 0.1, 0.2)], rising, "reward").training_rose


def test_a_measurement_is_no_better_for_a_prompt_it_lost() -> None:
    """Both prompts fell; without the hard one the mean alone would say that the later policy is the better."""
    lost = [made(0, 0.9, 0.1), made(2, 0.8, math.nan), made(4, 0.7, 0.05)]
    said = verdict(lost, {}, "reward")
    assert said.best.step == 0 and said.drop == pytest.approx((0.2 + 0.05) / 2, abs=1e-15)
    assert verdict(lost[:2], {}, "reward").drop == pytest.approx(0.1, abs=1e-15)
    assert verdict([made(0, math.nan, math.nan), made(2, 0.1, 0.2)], {}, "reward").best.step == 2


def test_a_step_that_was_left_out_does_not_hide_that_training_rose(tmp_path: Path) -> None:
    """Its reward is no number; a resumed run has always read the log without it."""
    seen = [0]

    def fails_once(images: Tensor) -> Tensor:
        seen[0] += 1
        return torch.full((len(images),), math.nan) if seen[0] == 2 else images.mean((1, 2, 3))

    told: list[dict[int, float]] = []

    class Watched(HeldOut):
        def add(self, now: Measurement, training: Any, by: str) -> Any:
            told.append(dict(training))
            return super().add(now, training, by)

    bundle = parts()
    tasks, held = (PromptTasks(read_prompts(each)) for each in (["a red ball"], ["a dog"]))
    rewards = as_rewards(fails_once)
    assert bundle.vq is not None and bundle.tokenizer is not None
    run_grpo(
        bundle.model, bundle.vq, bundle.tokenizer, tasks, rewards, settings(steps=4), tmp_path / "run",
        held_out=Watched(held),
    )  # fmt: skip
    lines = {line["step"]: line["reward_mean"] for line in read_metrics(tmp_path / "run")}
    known = {step: reward for step, reward in lines.items() if reward is not None}
    assert len(known) == 3 and told[-1] == known


class Hack:
    """A reward that can be driven up: brightness; what is measured beside it falls with it."""

    def __call__(self, images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))


def test_reward_hacking_ends_the_run_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chosen = settings(
        steps=40, group_size=8, lr=3e-3, beta=0.0, held={"every": 2, "by": "dark", "patience": 3, "images": 4}
    )
    texts = ["a red ball", "a blue dog", "a toy"]
    with caplog.at_level(logging.INFO):
        result = reinforce(
            parts(), texts, Hack(), chosen, tmp_path / "run", held_out=["a dog", "the ball"], metrics={"dark": darkness}
        )
    assert result.steps < 40 and "reward hacking" in result.ended_early and "reward hacking" in caplog.text
    assert result.best is not None and result.best.step < result.steps
    lost = result.best.mean("dark") - result.held_out[-1].mean("dark")
    assert f"fallen by {lost:.3f} since step {result.best.step}" in result.ended_early
    assert (tmp_path / "run" / "final" / "model").is_dir(), "what was learned so far is written all the same"
    assert len(read_metrics(tmp_path / "run")) == result.steps
    again = reinforce(
        parts(), texts, Hack(), chosen, tmp_path / "run", held_out=["a dog", "the ball"],
        metrics={"dark": darkness}, resume=True,
    )  # fmt: skip
    assert again.steps == result.steps and again.ended_early == result.ended_early


def test_adapters_are_kept_as_the_best_too(tmp_path: Path) -> None:
    result = reinforce(
        parts(),
        PROMPTS,
        channel,
        settings(trainable="lora", steps=3, held={"every": 1}),
        tmp_path / "run",
        held_out=HELD_OUT,
    )
    assert result.best is not None and (tmp_path / "run" / "best" / "adapter_model.safetensors").exists()


def test_rows_of_an_attached_concept_learn_from_prompts_that_name_it(tmp_path: Path) -> None:
    bundle, seen = parts(), []
    concept = tiny_concept()
    bundle.model.attach(concept)  # type: ignore[attr-defined]
    before = concept.embed.detach().clone()

    def red(prompts: list[str], images: Tensor) -> Tensor:
        seen.extend(prompts)
        return images[:, 0].mean((1, 2))

    reinforce(
        bundle, ["a photo of <bo>", "a red ball"], red, settings(trainable="concept", steps=2), tmp_path / "run",
        held_out=["<bo> asleep"],
    )  # fmt: skip
    assert set(seen) == {"a photo of bo", "a red ball", "bo asleep"}
    assert not torch.equal(before, concept.embed)
    assert (tmp_path / "run" / "final" / "concept").is_dir() and (tmp_path / "run" / "best" / "concept").is_dir()


def test_the_reward_itself_may_judge_previews(tmp_path: Path) -> None:
    seen: list[int] = []

    def red(prompts: list[str], images: Tensor, wanted: list[int]) -> Tensor:
        assert len(prompts) == len(wanted) == len(images) and set(wanted) <= {0, 2}
        seen.append(len(images))
        return torch.stack([image[each].mean() for image, each in zip(images, wanted, strict=True)]) / 2 + 0.5

    chosen = settings(steps=2, group_size=3, dsog=DsogConfig(initial=0.5, preview_step=2))
    reinforce(parts(), PROMPTS, red, chosen, tmp_path / "run", preview_scorer="reward")
    lines = read_metrics(tmp_path / "run")
    assert all(line["pass_rate"] is not None and line["candidates"] >= 3 for line in lines)
    assert len(seen) > 2, "asked about previews too"


# --- headroom --------------------------------------------------------------------------------------------------------


def painted(tmp_path: Path, value: tuple[float, float, float]) -> str:
    file = tmp_path / f"{value}.png"
    save_image(torch.tensor(value)[:, None, None].expand(3, 20, 20), file)
    return str(file)


def test_headroom_is_said_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    red, blue = painted(tmp_path, (1.0, -1.0, -1.0)), painted(tmp_path, (-1.0, -1.0, 1.0))
    given = [{**each, "reference_image": file} for each, file in zip(HELD_OUT, (red, blue), strict=True)]
    with caplog.at_level(logging.INFO):
        result = reinforce(parts(), PROMPTS, channel, settings(steps=1), tmp_path / "run", held_out=given)
    own = result.held_out[0].mean("reward")
    assert f"reward of reference images 1.00, of your model {own:.2f}: headroom {1 - own:.2f}" in caplog.text
    assert json.loads((tmp_path / "run" / "headroom.json").read_text()) == {
        "references": pytest.approx(1.0, abs=1e-2), "own": pytest.approx(own), "tasks": 2,
    }  # fmt: skip


def test_no_headroom_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From training prompts here: the first groups are compared, no further image is drawn."""
    dark = painted(tmp_path, (-1.0, -1.0, -1.0))
    given = [{**each, "reference_image": dark} for each in PROMPTS]
    with caplog.at_level(logging.WARNING):
        reinforce(parts(), given, channel, settings(steps=5), tmp_path / "run")
    assert caplog.text.count("none. This reward does not prefer the true images") == 1
    told = json.loads((tmp_path / "run" / "headroom.json").read_text())
    rewards = [line["reward_mean"] for line in read_metrics(tmp_path / "run")[:4]]
    assert told["tasks"] == 4 and told["own"] == pytest.approx(sum(rewards) / 4, abs=1e-6)


def test_headroom_of_a_concept_is_that_of_its_photos(tmp_path: Path) -> None:
    """The image a question is about, with the true answer, beside the first groups' own rewards."""
    given = world(tmp_path / "data")
    chosen = grpo_config(steps=4, visual_ratio=1.0, dsog=DsogConfig(enabled=False))
    parts_of = given.fresh()
    del parts_of["preview_scorer"]
    train_grpo(**parts_of, config=chosen, out_dir=tmp_path / "run")
    told = json.loads((tmp_path / "run" / "headroom.json").read_text())
    images = ReferenceImages(given.model, given.vq)
    tasks = ConceptTasks(given.data, given.concept, images, visual_ratio=1.0)
    want = []
    for number in range(4):
        task = tasks.draw(number)
        colours = images.pixels(task.image).mean((1, 2)) / 2 + 0.5
        answer = tasks.for_answer_judges(task.answer)
        want.append(0.4 / (1 + len(answer.split())) + 0.3 * float(colours[0]) + 0.3 * float(colours[2]))
    assert told["tasks"] == 4 and told["references"] == pytest.approx(sum(want) / 4, abs=1e-5)
    own = [line["reward_mean"] for line in read_metrics(tmp_path / "run")]
    assert told["own"] == pytest.approx(sum(own) / 4, abs=1e-6)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_used(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def wants(prompts: list[str], images: Tensor, label: list[str]) -> list[float]:
        return [0.0] * len(prompts)

    with pytest.raises(UserError, match="'wants' asks for label, and prompts have the columns wanted"):
        reinforce(parts(), PROMPTS, wants, config(), run)
    with pytest.raises(UserError, match="asks for label, and prompts have no column"):
        reinforce(parts(), ["a"], wants, config(), run)
    with pytest.raises(UserError, match="asks for wanted, and held_out have no column"):
        reinforce(parts(), PROMPTS, channel, config(), run, held_out=["a dog"])
    with pytest.raises(UserError, match="prompts: 'b' has no label, which reward function 'wants' asks for"):
        reinforce(parts(), [{"prompt": "a", "label": "x"}, {"prompt": "b"}], wants, config(), run)
    with pytest.raises(UserError, match="metrics are measured on held-out prompts"):
        reinforce(parts(), PROMPTS, colour, config(), run, metrics={"dark": darkness})
    with pytest.raises(UserError, match=r"held_out\.by='dork': must be one of reward, channel"):
        reinforce(parts(), PROMPTS, channel, settings(held={"by": "dork"}), run, held_out=HELD_OUT)
    with pytest.raises(UserError, match="'nothing': must be MODULE:FUNCTION of your own, NAME or NAME=WEIGHTS"):
        reinforce(parts(), PROMPTS, "nothing", config(), run)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"empty\.txt: holds no prompt"):
        reinforce(parts(), tmp_path / "empty.txt", colour, config(), run)


def test_held_out_prompts_that_also_train_are_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="1 of 2 held-out prompts also train, as 'a red ball'"):
        reinforce(parts(), PROMPTS, channel, settings(steps=1), tmp_path / "run", held_out=[HELD_OUT[0], PROMPTS[0]])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1.0], r"returned 1 numbers for 4 images.*first prompt 'a"),
        (["high"] * 4, r"gave 'high' for image 0 \(prompt 'a"),
        ([math.nan] * 4, r"nan"),
    ],
    ids=["length", "text", "nan"],
)
def test_rewards_that_are_no_numbers(values: list[Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        reinforce(parts(), PROMPTS, lambda prompts, images: values, config(max_bad_steps=1), tmp_path / "run")


def test_a_held_out_prompt_without_a_finite_reward_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(prompts: list[str], images: Tensor) -> list[float]:
        return [math.nan if "red dog" in text else 0.25 for text in prompts]

    result = reinforce(parts(), PROMPTS, broken, settings(steps=1), tmp_path / "run", held_out=HELD_OUT)
    assert result.held_out[0].mean("reward") == 0.25 and "prompt 'a red dog'" in caplog.text
