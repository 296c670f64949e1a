"""The `paper` preset learns: on a tiny model of the real layout its policy moves, where the concept's rows alone do
not; DSOG's first threshold selects whatever the judge's scale; and a run that stands still says so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyunictokens.config.training import PRESETS, TrainConfig
from pyunictokens.rollout import DsogThreshold, RolloutEngine
from pyunictokens.train import GrpoConfig, read_metrics, train_concept_tokens, train_grpo
from pyunictokens.train.collector import Collector
from pyunictokens.train.images import ReferenceImages
from pyunictokens.train.objective import objective_of
from pyunictokens.train.tasks import ConceptTasks, named_for_class
from pyunictokens.train.trajectories import ImageTrajectories
from pyunictokens.train.update import MicrobatchSizes, answer_logprobs, image_logprobs
from pyunictokens.utils.signals import Stopped
from tests.train.world import World, experts, grpo_config, stage_config, tiny_concept, tiny_model, world

SMALL = ("timesteps=4", "max_new_tokens=4", "sample_every=0", "micro_rows=0", "micro_timesteps=0")
"""What makes a step of the preset small; nothing of what or how fast it learns."""


def paper(*words: str) -> GrpoConfig:
    return TrainConfig.preset("paper").override([f"grpo.{word}" for word in (*SMALL, *words)]).grpo


@pytest.fixture
def here(tmp_path: Path) -> World:
    return world(tmp_path / "data")


def test_the_preset_trains_the_model_as_the_authors_do() -> None:
    grpo = PRESETS["paper"].grpo
    assert (grpo.trainable, grpo.train_concept, grpo.lr) == ("full", True, 1e-6)
    assert (grpo.warmup, grpo.temperature, grpo.dsog.initial) == (10, 1.8, "auto")
    for name in ("fast", "quality"):
        other = PRESETS[name].grpo
        assert (other.trainable, other.warmup, other.temperature, other.dsog.initial) == ("full", 10, 1.8, "auto")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_kl_and_reward_move_under_paper_and_not_with_rows_alone(here: World, tmp_path: Path) -> None:
    kls, gains = {}, {}
    for kind in ("full", "concept"):
        arguments = here.fresh()
        train_grpo(**arguments, config=paper("steps=12", f"trainable={kind}"), out_dir=tmp_path / kind)
        kls[kind] = [line["kl"] for line in read_metrics(tmp_path / kind)]
        gains[kind] = reward_gained(arguments["model"], here)
    assert kls["full"][0] < 1e-10 and kls["full"][-1] > 1e-8
    assert kls["full"][-1] > 50 * kls["concept"][-1]
    assert gains["full"] > 0 and gains["full"] > 5 * abs(gains["concept"])


def reward_gained(trained: Any, here: World, samples: int = 96) -> float:
    """How much more the expected redness of images is under `trained` than under the model it began as: rollouts of the
    starting model, weighted by how much likelier they became (no sampling noise between the two)."""
    start = tiny_model()
    start.attach(tiny_concept())
    tokenizer = here.tokenizer.with_concept(tiny_concept().tokens)
    rollout = RolloutEngine(start, here.vq, tokenizer).generate_images(
        [tiny_concept().expand("a photo of <bo>.")], samples=samples, steps=4, guidance_scale=5.0, seed=11
    )
    assert rollout.pixels is not None and rollout.logp is not None
    red = rollout.pixels[:, 0].float().clamp(-1, 1).mean(dim=(1, 2)) * 0.5 + 0.5
    images = ImageTrajectories.of(start, rollout, None)
    before = image_logprobs(start, images, 32, 4, MicrobatchSizes()).double().sum(dim=(1, 2))
    after = image_logprobs(trained, images, 32, 4, MicrobatchSizes()).double().sum(dim=(1, 2))
    return float(((after - before).exp() * (red - red.mean()).double()).mean())


# --- DSOG's first threshold ----------------------------------------------------------------------------------------


class Cosines:
    """A judge of previews whose scores lie where BLIP-2's cosines do, around 0.35; remembers each call."""

    def __init__(self) -> None:
        self.scores: list[float] = []

    def __call__(self, prompts: Sequence[str]) -> Callable[[Tensor, Tensor], Tensor]:
        def scorer(pixels: Tensor, prompt_index: Tensor) -> Tensor:
            found = 0.35 + 0.2 * (pixels[:, 0].mean(dim=(1, 2)) - pixels[:, 2].mean(dim=(1, 2)))
            self.scores += found.tolist()
            return found

        return scorer


@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_auto_starts_where_the_wanted_part_passes(here: World, tmp_path: Path) -> None:
    rates = {}
    for initial in ("auto", "0.5"):
        judge = Cosines()
        config = paper("steps=4", "trainable=concept", f"dsog.initial={initial}")
        train_grpo(**{**here.fresh(), "preview_scorer": judge}, config=config, out_dir=tmp_path / initial)
        lines = read_metrics(tmp_path / initial)
        rates[initial] = sum(line["pass_rate"] for line in lines) / len(lines)
        if initial == "auto":
            first = judge.scores[: 4 * config.group_size]
            share = sum(score > lines[0]["threshold"] for score in first) / len(first)
            assert share == pytest.approx(config.dsog.target_pass_rate, abs=1 / len(first))
            assert min(first) < lines[0]["threshold"] < max(first) < 0.5
    assert rates["0.5"] < 0.02 and 0.08 < rates["auto"] < 0.6


@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_the_calibrated_threshold_is_kept_and_not_measured_again(here: World, tmp_path: Path) -> None:
    judge, config = Cosines(), paper("steps=2", "trainable=concept", "checkpoint_every=1")
    whole = train_grpo(**{**here.fresh(), "preview_scorer": Cosines()}, config=config, out_dir=tmp_path / "whole")

    def stop_after_one() -> bool:
        return (tmp_path / "part" / "metrics.jsonl").exists() and len(read_metrics(tmp_path / "part")) == 1

    arguments = {"config": config, "out_dir": tmp_path / "part"}
    with pytest.raises(Stopped):
        train_grpo(**{**here.fresh(), "preview_scorer": judge}, **arguments, stop=stop_after_one)
    calibrated = len(judge.scores)
    judge.scores.clear()
    train_grpo(**{**here.fresh(), "preview_scorer": judge}, **arguments, resume=True)
    lines = [read_metrics(tmp_path / name) for name in ("whole", "part")]
    assert [line["threshold"] for line in lines[0]] == [line["threshold"] for line in lines[1]]
    assert len(judge.scores) == lines[1][1]["candidates"] < calibrated
    assert whole.steps == 2


@pytest.mark.parametrize(
    ("scores", "rate", "threshold"),
    [
        ([0.1, 0.2, 0.3, 0.4], 0.25, 0.35),
        ([0.4, 0.3, 0.2, 0.1], 0.5, 0.25),
        ([0.3, float("nan"), float("-inf"), 0.2], 0.25, 0.25),
        ([float("nan")] * 3, 0.25, 0.5),
        ([], 0.25, 0.5),
        ([5.0, 6.0], 0.5, 0.99),
    ],
)
def test_a_threshold_starts_between_those_that_pass_and_those_that_do_not(
    scores: list[float], rate: float, threshold: float
) -> None:
    found = DsogThreshold(target_pass_rate=rate)
    assert found.start_at(scores) == found.value == pytest.approx(threshold) and found.trend == 0


# --- a run that stands still ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*rows are filled")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("trainable=concept", "warmup=0"), True),
        (("trainable=full", "warmup=0", "lr=1e-12"), True),
        (("trainable=full", "warmup=0", "beta=0", "lr=1e-12"), True),
        (("trainable=full", "warmup=0", "lr=1e-4"), False),
        (("trainable=full", "warmup=5", "lr=1e-12"), False),  # ten steps after the warm-up are not over
    ],
)
def test_a_policy_that_has_not_moved_is_told_of_once(
    words: tuple[str, ...], said: bool, here: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = paper("steps=13", "timesteps=2", "group_size=2", "dsog.enabled=false", *words)
    with caplog.at_level(logging.WARNING):
        train_grpo(**here.fresh(), config=config, out_dir=tmp_path / "run")
    found = [record.message for record in caplog.records if "the policy has not moved" in record.message]
    assert len(found) == said
    assert not said or "after 10 steps" in found[0]


# --- the authors' way, by option -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("The dog is brown.", "<bo> is brown."),
        ("a small Dog", "a small <bo>"),
        ("<bo> is a dog", "<bo> is a dog"),
        ("dogged work", "dogged work"),
        ("", ""),
    ],
)
def test_the_class_word_of_an_answer_becomes_the_token(answer: str, named: str) -> None:
    assert named_for_class(answer, "dog", "<bo>") == named


def test_compound_prompts_hold_the_info_where_that_is_wanted(here: World) -> None:
    found = {
        compound: ConceptTasks(
            here.data, here.concept, ReferenceImages(here.model, here.vq), compound=compound
        ).completed("A photo of <bo>.", "The dog is red.")
        for compound in ("answer", "info")
    }
    assert found == {
        "answer": "A photo of <bo>. The dog is red.",
        "info": f"A photo of <bo>. {here.data.info.rstrip('.')}. <bo> is red.",
    }


def test_the_published_stages_ask_in_the_published_form(here: World, tmp_path: Path) -> None:
    stages = PRESETS["unictokens"].stages
    assert stages.stages == ("understanding", "generation", "deepening") and stages.l2_pull == 0
    assert (stages.weight_decay, stages.eps, stages.lr, stages.epochs) == (1e-4, 1e-6, 1e-3, 20)
    asked: list[str] = []
    encode = here.tokenizer.with_concept(tiny_concept().tokens)

    class Kept:
        def __getattr__(self, name: str) -> Any:
            return getattr(encode, name)

        def encode(self, text: str) -> list[int]:
            asked.append(text)
            return encode.encode(text)

    plain = here.tokenizer

    class Plain:
        def __getattr__(self, name: str) -> Any:
            return getattr(plain, name)

        def with_concept(self, tokens: Any) -> Any:
            return Kept()

    config = stage_config(stages=("understanding",), max_steps=2, epochs=1, question_form="unictokens")
    train_concept_tokens(here.model, here.vq, Plain(), here.data, config, tmp_path / "stages")  # type: ignore[arg-type]
    questions = [text for text in asked if "ASSISTANT" in text]
    start = "USER: <bo> is <token_0><token_1><token_2>."
    assert questions and all(text.startswith(start) and text.endswith(" ASSISTANT:") for text in questions)


def test_rollouts_of_published_tokens_are_asked_in_the_published_form(here: World, tmp_path: Path) -> None:
    model = here.model.attach(tiny_concept())
    tokenizer = here.tokenizer.with_concept(tiny_concept().tokens)
    helpers = "".join(f"<token_{place}>" for place in range(5))
    config = grpo_config(steps=1, beta=0.01)
    groups = {}
    for form in ("ours", "unictokens"):
        images = ReferenceImages(model, here.vq)
        tasks = ConceptTasks(here.data, tiny_concept(), images, question_form=form, seed=config.seed)  # type: ignore[arg-type]
        engine = RolloutEngine(model, here.vq, tokenizer)
        collector = Collector(engine, tasks, experts(), None, DsogThreshold(), objective_of(config), config)
        (groups[form],) = collector.collect(0)
        assert tasks.for_model("<bo> and <bo>.") == f"{helpers}<bo> and {helpers if form != 'ours' else ''}<bo>."
    for form, group in groups.items():
        question = group.task.question
        assert question is not None and group.local is not None and group.local.answers is not None
        worded = {
            "ours": model.question_text(question.replace("<bo>", helpers + "<bo>", 1)),
            "unictokens": f"USER: <bo> is <token_0><token_1><token_2>.{question} ASSISTANT:",
        }[form]
        answers = group.local.answers
        assert answers.question == tokenizer.encode(worded)
        # what was recorded is the chance of the tokens after exactly this question
        found = answer_logprobs(model, answers)
        torch.testing.assert_close(found, answers.old_logp_RL.float(), atol=1e-5, rtol=1e-4)
