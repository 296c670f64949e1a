"""The whole loop on a world in miniature: what it writes, how it goes on, and what it says of bad input."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pyunictokens.data import wording
from pyunictokens.models import ConceptTokens
from pyunictokens.rewards import Ensemble
from pyunictokens.rollout.engine import RolloutEngine
from pyunictokens.train import grpo, learner, read_metrics, train_grpo
from pyunictokens.train.checkpoint import run_state as state
from pyunictokens.train.collector import Collector
from pyunictokens.train.images import ReferenceImages
from pyunictokens.train.tasks import ConceptTasks
from pyunictokens.utils.devices import check_training_dtype
from pyunictokens.utils.errors import UserError
from pyunictokens.utils.profiling import PHASES, PhaseReport
from tests.train import naive
from tests.train.world import World, experts, grpo_config, tiny_concept, tiny_model, tiny_tokenizer, world

KEY_NAMES = (
    "step mode loss reward_mean reward_std within_group_std parts kl clip_fraction ratio_max grad_norm lr threshold "
    "pass_rate candidates no_face seconds answer prompt"
)
KEYS = KEY_NAMES.split()


class Killed(BaseException):
    """What a kill looks like from inside."""


def stop_after(steps: int) -> Any:
    def progress(phase: str, done: int, total: int, values: dict[str, Any]) -> None:
        if done == steps:
            raise Killed

    return progress


def numbers(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(folder)]


@pytest.fixture
def here(tmp_path: Path) -> World:
    return world(tmp_path / "data")


@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_a_run_writes_what_it_says(here: World, tmp_path: Path) -> None:
    seen = []
    result = train_grpo(
        **here.fresh(),
        config=grpo_config(sample_every=2),
        out_dir=tmp_path / "run",
        progress=lambda *event: seen.append(event[:3]),
    )
    assert seen == [("grpo", done, 4) for done in (1, 2, 3, 4)]
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and result.last["step"] == 3 and result.skipped == 0
    assert all(set(KEYS) <= line.keys() for line in lines)
    assert {line["mode"] for line in lines} == {"visual", "text_only"}
    for line in lines:
        assert line["parts"].keys() == {"tier", "ber", "der"}
        wanted = 0.4 * line["parts"]["tier"] + 0.3 * line["parts"]["ber"] + 0.3 * line["parts"]["der"]
        assert line["reward_mean"] == pytest.approx(wanted, abs=1e-6)
        assert line["ratio_max"] == pytest.approx(1, abs=1e-4) and line["within_group_std"] > 0
        assert line["candidates"] >= 3 and 0 <= line["pass_rate"] <= 1 and line["grad_norm"] > 0
    assert lines[0]["kl"] < 1e-10 < lines[3]["kl"]
    assert lines[0]["threshold"] == 0.5 and lines[1]["threshold"] != 0.5
    run = tmp_path / "run"
    report = PhaseReport.load(run / "phases.json")
    calls = {phase.name: phase.calls for phase in report.phases}
    assert tuple(calls) == PHASES and calls["update"] == calls["optimizer"] == calls["reference"] == 4
    assert 0 < sum(phase.seconds for phase in report.phases) < report.seconds
    counted = {phase.name for phase in report.phases if phase.flops}
    assert counted == {"prefill", "rollout steps", "previews", "decode", "answers", "reference", "update"}
    assert {file.name for file in (run / "samples").iterdir()} >= {
        f"step_{step}{end}" for step in ("0000", "0002", "0003") for end in ("_preview.png", "_final.png", ".json")
    }
    texts = json.loads((run / "samples" / "step_0003.json").read_text())
    assert len(texts["prompts"]) == len(texts["answers"]) == len(texts["rewards"]) == 3
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert sorted(folder.name for folder in (run / "checkpoints").iterdir()) == ["step_000002", "step_000004"]
    final = ConceptTokens.load(run / "final" / "concept")
    assert torch.equal(final.embed, result.concept.embed) and not torch.equal(final.embed, tiny_concept().embed)


@pytest.mark.filterwarnings("ignore:.*rows are filled")
@pytest.mark.parametrize(
    "kind", ["concept", pytest.param("lora", marks=pytest.mark.slow), pytest.param("full", marks=pytest.mark.slow)]
)
def test_a_resumed_run_is_the_run_that_never_stopped(kind: str, here: World, tmp_path: Path) -> None:
    config = grpo_config(steps=6, checkpoint_every=3, trainable=kind, schedule="cosine", warmup=1)
    straight = train_grpo(**here.fresh(), config=config, out_dir=tmp_path / "straight")
    with pytest.raises(Killed):  # after step 5, two steps past the checkpoint
        train_grpo(**here.fresh(), config=config, out_dir=tmp_path / "broken", progress=stop_after(5))
    torch.manual_seed(99)
    resumed = train_grpo(**here.fresh(), config=config, out_dir=tmp_path / "broken", resume=True)
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "straight")
    assert torch.equal(resumed.concept.embed, straight.concept.embed)
    one, other = (tmp_path / name / "checkpoints" / "step_000006" for name in ("straight", "broken"))
    first, second = (state.read_safetensors(folder / "tensors.safetensors") for folder in (one, other))
    trained = [name for name in first if not name.startswith("rng")]
    assert trained and all(torch.equal(first[name], second[name]) for name in trained)


@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_a_run_of_a_version_without_a_setting_goes_on_with_its_default(here: World, tmp_path: Path) -> None:
    config, run = grpo_config(steps=2, checkpoint_every=1), tmp_path / "run"
    with pytest.raises(Killed):
        train_grpo(**here.fresh(), config=config, out_dir=run, progress=stop_after(1))
    about = json.loads((run / "run.json").read_text())
    del about["settings"]["groups"], about["settings"]["dsog"]["eta"]
    (run / "run.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="groups: the run has 1, this is 2"):
        train_grpo(**here.fresh(), config=replace(config, groups=2), out_dir=run, resume=True)
    assert train_grpo(**here.fresh(), config=config, out_dir=run, resume=True).steps == 2


@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_full_disk_and_damage_leave_the_last_good_checkpoint(
    here: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, run = grpo_config(steps=4, checkpoint_every=1, keep_last=3), tmp_path / "run"
    write = state.write_tensors

    def full_at_three(path: Path, tensors: Any) -> str:
        if "step_000003" in str(path):
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        return write(path, tensors)

    monkeypatch.setattr(state, "write_tensors", full_at_three)
    with pytest.raises(UserError, match=r"step_000003.*No space left.*last good one is step 2.*--resume"):
        train_grpo(**here.fresh(), config=config, out_dir=run)
    assert sorted(folder.name for folder in (run / "checkpoints").iterdir()) == ["step_000001", "step_000002"]
    monkeypatch.undo()
    newest = run / "checkpoints" / "step_000002" / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-50])
    (run / "checkpoints" / ".step_000003.part").mkdir()  # what a kill leaves
    with caplog.at_level(logging.WARNING):
        train_grpo(**here.fresh(), config=config, out_dir=run, resume=True)
    assert "step 2 passed over" in caplog.text and "is damaged (checksum" in caplog.text
    straight = train_grpo(**here.fresh(), config=config, out_dir=tmp_path / "straight")
    assert numbers(run) == numbers(tmp_path / "straight") and straight.steps == 4
    for folder in (run / "checkpoints").glob("step_*"):
        (folder / "state.json").write_text("{}")
    with pytest.raises(UserError, match="no whole checkpoint"):
        train_grpo(**here.fresh(), config=config, out_dir=run, resume=True)


@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_a_folder_belongs_to_one_run(here: World, tmp_path: Path) -> None:
    config, run = grpo_config(steps=1, checkpoint_every=1), tmp_path / "run"
    with pytest.raises(UserError, match="holds no run to resume"):
        train_grpo(**here.fresh(), config=config, out_dir=run, resume=True)
    train_grpo(**here.fresh(), config=config, out_dir=run)
    with pytest.raises(UserError, match=r"already holds a run.*--resume"):
        train_grpo(**here.fresh(), config=config, out_dir=run)

    def resume(**changes: Any) -> None:
        settings = changes.pop("config", config)
        train_grpo(**{**here.fresh(), **changes}, config=settings, out_dir=run, resume=True)

    with pytest.raises(UserError, match="group_size: the run has 3, this is 4"):
        resume(config=replace(config, group_size=4))
    with pytest.raises(UserError, match="hidden_size: the run has 32, this is 64"):
        wide = ConceptTokens("bo", 64, num_understanding=3, num_generation=2)
        resume(model=tiny_model(width=64), concept=wide)
    with pytest.raises(UserError, match="concept_tokens: the run has 6, this is 7"):
        resume(concept=ConceptTokens("bo", 32, num_understanding=3, num_generation=3))
    with pytest.raises(UserError, match="starting_weights: the run has"):
        resume(model=tiny_model(seed=1))
    resume(config=replace(config, micro_rows=1, keep_last=5))  # changes no number
    with state.RunFolder(tmp_path / "locked", {}, {}), pytest.raises(UserError, match="another process"):
        state.RunFolder(tmp_path / "locked", {}, {}, resume=True)


class NotANumber:
    def score(self, batch: Any) -> Any:
        result = experts().score(batch)
        result.total[1] = float("nan")
        return result


@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_rewards_that_are_not_numbers_end_the_run(here: World, tmp_path: Path) -> None:
    before = tiny_concept().embed
    arguments = {**here.fresh(), "rewards": NotANumber()}
    with pytest.raises(UserError, match=r"2 steps in a row.*rewards \[.*nan"):
        train_grpo(**arguments, config=grpo_config(max_bad_steps=2), out_dir=tmp_path / "run")
    assert torch.equal(arguments["concept"].embed, before), "nothing may be learned from it"
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == 2 and all("nan" in line["skipped"] and line["reward_mean"] is None for line in lines)

    class Broken:
        def score(self, batch: Any) -> Any:
            return torch.full((len(batch),), float("inf"))

    broken = Ensemble({"tier": Broken(), "ber": Broken(), "der": Broken()})
    said = (
        r"steps in a row, the last of them step 2, are not finite: rewards .*reward model 'tier' scored image 0 .*inf"
    )
    with pytest.raises(UserError, match=said):
        train_grpo(**{**here.fresh(), "rewards": broken}, config=grpo_config(), out_dir=tmp_path / "other")


@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_a_run_that_ended_of_bad_steps_goes_on_behind_them_with_other_draws(here: World, tmp_path: Path) -> None:
    class AtFirst:
        """Gives NaN the first `bad` times."""

        def __init__(self, bad: int):
            self.bad, self.seen = bad, list[torch.Tensor]()

        def score(self, batch: Any) -> Any:
            self.seen.append(batch.images.clone())
            result = experts().score(batch)
            if len(self.seen) <= self.bad:
                result.total[1] = float("nan")
            return result

    config, run = grpo_config(steps=4, max_bad_steps=2, checkpoint_every=0), tmp_path / "run"
    first, second = AtFirst(2), AtFirst(1)
    with pytest.raises(UserError, match="2 steps in a row, the last of them step 1"):
        train_grpo(**{**here.fresh(), "rewards": first}, config=config, out_dir=run)
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step_000002"]
    result = train_grpo(**{**here.fresh(), "rewards": second}, config=config, out_dir=run, resume=True)
    assert result.skipped == 3 and len(second.seen) == 2, "one bad step more is no end"
    assert not any(torch.equal(one, other) for one in first.seen for other in second.seen)
    assert [bool(line["skipped"]) for line in read_metrics(run)] == [True, True, True, False]


@pytest.mark.filterwarnings("ignore:.*rows are filled")
@pytest.mark.parametrize("where", ["pixels", "logits", "answers"])
def test_a_rollout_that_is_not_finite_leaves_its_step_out(
    where: str, here: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an overflow in float16 makes them: NaN out of the image decoder, or out of the model's own heads."""
    name = "generate_text" if where == "answers" else "generate_images"
    real, calls = getattr(RolloutEngine, name), []

    def broken(self: RolloutEngine, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            return real(self, *args, **kwargs)
        if where == "pixels":
            result = real(self, *args, **kwargs)
            result.pixels[-1] = float("nan")
            return result
        bias = self.model.showo.lm_head.bias.data
        kept = bias.clone()
        bias.fill_(float("nan"))
        try:
            return real(self, *args, **kwargs)
        finally:
            bias.copy_(kept)

    monkeypatch.setattr(RolloutEngine, name, broken)
    result = train_grpo(**here.fresh(), config=grpo_config(steps=3), out_dir=tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert result.skipped == 1 and "rollouts of group 0" in lines[0]["skipped"] and lines[0]["reward_mean"] is None
    assert all(line["skipped"] is None and line["grad_norm"] > 0 for line in lines[1:]) and len(lines) == 3
    assert lines[0]["step"] == 0 and lines[1]["threshold"] == 0.5, "what was left out moved no threshold"


@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_a_step_that_is_not_finite_is_left_out_and_counted(
    here: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = iter([True])
    real = learner.streamed_backward

    def broken(*arguments: Any) -> Any:
        stats = real(*arguments)
        if next(once, False):
            for parameter in (arguments[0].concept.embed,):
                parameter.grad.fill_(float("nan"))
        return stats

    monkeypatch.setattr(learner, "streamed_backward", broken)
    result = train_grpo(**here.fresh(), config=grpo_config(steps=3), out_dir=tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert result.skipped == 1 and [bool(line["skipped"]) for line in lines] == [True, False, False]
    assert "gradient of length nan" in lines[0]["skipped"] and lines[1]["kl"] < 1e-10 < lines[2]["kl"]
    assert torch.isfinite(result.concept.embed).all()


def test_concepts_without_what_a_step_needs(here: World, tmp_path: Path) -> None:
    here.data.conversations = []
    with pytest.raises(UserError, match=r"no conversations about training images.*visual_ratio=0"):
        train_grpo(**here.fresh(), config=grpo_config(), out_dir=tmp_path / "run")
    arguments = {**here.fresh(), "concept": None}
    with pytest.raises(UserError, match="no concept attached"):
        train_grpo(**arguments, config=grpo_config(), out_dir=tmp_path / "other")


def test_reinforcement_in_float16_says_why_not(here: World, tmp_path: Path) -> None:
    arguments = here.fresh()
    arguments["model"].half()
    with pytest.raises(UserError, match=r"gradients below 6e-8 vanish.*dtype=bfloat16"):
        train_grpo(**arguments, config=grpo_config(), out_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for dtype in (torch.float32, torch.bfloat16):
        check_training_dtype(dtype)
    with pytest.warns(UserWarning, match="begun in float16 and goes on in it"):
        check_training_dtype(torch.float16, resume=True)


@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_rollouts_in_fp8_are_corrected_by_the_ratio(here: World, tmp_path: Path) -> None:
    """The first update's ratio is that of the model to what drew, not 1; the rest of the run is as ever."""
    config = replace(grpo_config(), steps=1, rollout_products="fp8")
    train_grpo(**here.fresh(), config=config, out_dir=tmp_path / "run")
    (line,) = read_metrics(tmp_path / "run")
    assert line["ratio_max"] > 1.01 and line["grad_norm"] > 0


def tasks_of(here: World, **options: Any) -> ConceptTasks:
    return ConceptTasks(here.data, here.concept, ReferenceImages(here.model, here.vq), **options)


def test_tasks_are_balanced_drawn_by_seed_and_never_from_the_test_half(here: World) -> None:
    tasks = [tasks_of(here, seed=1).draw(step) for step in range(40)]
    again = tasks_of(here, seed=1)
    assert [again.draw(step) for step in (39, 0, 17)] == [tasks[39], tasks[0], tasks[17]]
    assert [task.mode for task in tasks].count("visual") == 20
    assert [task.mode for task in tasks] != [tasks_of(here, seed=2).draw(step).mode for step in range(40)]
    prompts = {task.prompt for task in tasks if task.mode == "text_only"}
    assert prompts == {prompt for prompt, _ in here.data.fact_pairs_train}
    assert prompts.isdisjoint(prompt for prompt, _ in here.data.fact_pairs_test)
    for task in tasks:
        assert task.answer == (here.data.extra_info[task.correct] if task.mode == "text_only" else "<bo> is a dog.")
    third = [tasks_of(here, visual_ratio=0.25, seed=3).draw(step).mode for step in range(40)]
    assert third.count("visual") == 10


@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_without_reasoning_nothing_is_said_and_drawings_follow_the_prompts_alone(here: World, tmp_path: Path) -> None:
    result = train_grpo(**here.fresh(), config=grpo_config(reasoning=False, sample_every=1), out_dir=tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert all(line["loss_answer"] == 0 and line["parts_std"]["tier"] < 1e-6 for line in lines)
    asked = {task.prompt: task.answer for task in (tasks_of(here).draw(step) for step in range(4))}
    assert {line["prompt"]: line["answer"] for line in lines} == asked
    assert not torch.equal(result.concept.embed, tiny_concept().embed)


@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_one_group_fits_together_and_one_update_makes_the_better_likelier(here: World, tmp_path: Path) -> None:
    groups = []
    collect = Collector.collect

    class Kept(Collector):
        def collect(self, step: int, with_codes: bool = False) -> Any:
            groups.append(collect(self, step, with_codes)[0])
            return [groups[-1]]

    patch = pytest.MonkeyPatch()
    patch.setattr(grpo, "Collector", Kept)
    arguments = here.fresh()
    config = grpo_config(steps=1, lr=3e-3, group_size=4, beta=0.0, max_grad_norm=100.0, guidance_scale=1.0)
    train_grpo(**arguments, config=config, out_dir=tmp_path / "run")
    patch.undo()
    (group,) = groups
    told = group.summary
    assert torch.allclose(group.advantages, told.rewards - told.rewards.mean()) and group.advantages.std() > 0
    known = tiny_tokenizer().with_concept(tiny_concept().tokens)
    said_tokens = [known.decode([int(token) for token in row if token >= 0]) for row in group.local.answers.tokens_RL]
    assert told.texts == said_tokens
    for text, answer in zip(told.prompts, told.texts, strict=True):
        assert text == wording.compound_prompt(group.task.prompt, answer)
    images, answers = group.local.images, group.local.answers
    learned = arguments["model"]
    change = []
    for model in (tiny_model(), learned):
        if model is not learned:
            model.attach(tiny_concept())
        with torch.no_grad():
            drawn = naive.image_logp(model, images)
            said = naive.answer_logp(model, answers)
        change.append(config.alpha_image * drawn.sum((1, 2)) + config.alpha_answer * said.sum(1))
        if model is not learned:
            torch.testing.assert_close(drawn, images.old_logp_RTN, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(said, answers.old_logp_RL, rtol=1e-3, atol=1e-3)
    assert (group.advantages * (change[1] - change[0])).sum() > 0


@pytest.mark.filterwarnings("ignore:.*rows are filled")
def test_judges_of_images_read_the_description_where_it_is_wanted(here: World, tmp_path: Path) -> None:
    seen: dict[str, list[str]] = {}
    here.data.info = "<bo> is a small red dog."
    for judged_as in ("class", "info"):
        arguments = here.fresh()
        score = arguments["rewards"].score

        def kept(batch: Any, name: str = judged_as, score: Any = score) -> Any:
            seen.setdefault(name, []).extend(batch.prompts)
            return score(batch)

        rewards = SimpleNamespace(score=kept, experts=arguments["rewards"].experts)
        config = grpo_config(steps=1, judged_as=judged_as)
        train_grpo(**{**arguments, "rewards": rewards}, config=config, out_dir=tmp_path / judged_as)
    word = here.data.class_word
    assert all(word in text and "small red" not in text for text in seen["class"])
    assert [text.replace("a small red dog", word) for text in seen["info"]] == seen["class"] != seen["info"]
