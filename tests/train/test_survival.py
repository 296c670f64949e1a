"""Faults that a run must outlive, or end of with a clear word: docs/reliability.md names the test of each."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pyunictokens.evaluate.result import EvalResult
from pyunictokens.models import ConceptTokens
from pyunictokens.train import read_metrics, train_concept_tokens, train_grpo
from pyunictokens.train.checkpoint.run_state import RunFolder
from pyunictokens.utils.errors import UserError
from pyunictokens.utils.files import folder_lock
from pyunictokens.utils.signals import Stopped, stop_on_signals
from tests.soak import chaos
from tests.train.world import World, experts, grpo_config, stage_config, tiny_model, world

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rows are filled"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


@pytest.fixture
def here(tmp_path: Path) -> World:
    return world(tmp_path / "data")


# --- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_is_the_run_that_was_not(here: World, tmp_path: Path) -> None:
    """`make soak` does this more than a hundred times; here four kills while files are written, one by the clock."""
    config, out = chaos.settings(), tmp_path / "killed"
    calls = chaos.count_calls(here, config, tmp_path / "straight")
    assert calls > 60
    rng = random.Random(7)
    for _ in range(4):
        assert chaos.live(here, config, out, at_call=rng.randrange(1, calls // 3)) == -signal.SIGKILL
    assert chaos.live(here, config, out, after=0.2) in (0, -signal.SIGKILL)
    assert chaos.live(here, config, out) == 0
    assert chaos.contents(out) == chaos.contents(tmp_path / "straight") and not chaos.leftovers(out)


def test_a_kill_between_the_first_files_leaves_a_folder_that_can_be_gone_on_with(here: World, tmp_path: Path) -> None:
    config, out = chaos.settings(steps=2), tmp_path / "run"
    for call in range(1, 5):
        assert chaos.live(here, config, out, at_call=call) == -signal.SIGKILL
    chaos.run(here, config, out)
    assert {"config.yaml", "about.json", "after.json", "final"} <= {path.name for path in out.iterdir()}


def test_a_kill_at_its_first_file_leaves_nothing_of_it(here: World, tmp_path: Path) -> None:
    """Such a folder holds no run yet: the next life begins it, and resumes nothing."""
    out = tmp_path / "run"
    assert chaos.live(here, chaos.settings(steps=2), out, at_call=1) == -signal.SIGKILL
    assert chaos.leftovers(out)
    chaos.run(here, chaos.settings(steps=2), out)
    assert not chaos.leftovers(out)
    with RunFolder(tmp_path / "other", {}, {}):
        pass
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / ".run.json.abcdefgh.part").write_text("{")
    with RunFolder(begun, {}, {}):
        pass
    assert {path.name for path in begun.iterdir()} == {path.name for path in (tmp_path / "other").iterdir()}


def test_a_kill_inside_a_stage_costs_the_steps_since_its_checkpoint(here: World, tmp_path: Path) -> None:
    config = stage_config(stages=("understanding", "deepening"), epochs=9, max_steps=6, save_every=2)

    def live(out: Path, kill_at: tuple[str, int] | None = None) -> int:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                torch.set_num_threads(1)

                def progress(stage: str, done: int, *_: Any) -> None:
                    with open(out.parent / f"{out.name}.steps", "a") as steps:
                        steps.write(f"{stage} {done}\n")
                    if (stage, done) == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)

                again = (out / "stages.json").exists()
                parts = tiny_model(), here.vq, here.tokenizer, here.data
                train_concept_tokens(*parts, config, out, resume=again, progress=progress)
                code = 0
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert live(straight) == 0
    for kill_at in (("understanding", 3), ("understanding", 5), ("deepening", 5)):
        assert live(killed, kill_at) == -signal.SIGKILL
    assert live(killed) == 0
    done = (tmp_path / "killed.steps").read_text().split("\n")[:-1]
    numbers = [1, 2, 3, 3, 4, 5, 5, 6], [1, 2, 3, 4, 5, 5, 6]  # of a step that was cut off, the second time counts
    assert done == [f"{name} {n}" for name, all_ in zip(config.stages, numbers, strict=True) for n in all_]
    for name in ("understanding", "deepening", "concept"):
        one, other = (ConceptTokens.load(folder / name) for folder in (straight, killed))
        assert all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))
    assert read_metrics(straight, "stages.jsonl") == read_metrics(killed, "stages.jsonl")


# --- asked to stop ---------------------------------------------------------------------------------------------------


def after_calls(number: int) -> Any:
    left = iter(range(number))
    return lambda: next(left, None) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_after_the_step_with_its_checkpoint(here: World, tmp_path: Path, number: int) -> None:
    config, said = grpo_config(steps=4, checkpoint_every=0), []
    straight = train_grpo(**here.fresh(), config=config, out_dir=tmp_path / "straight")

    def progress(phase: str, done: int, *_: Any) -> None:
        if done == 1:
            os.kill(os.getpid(), number)

    with stop_on_signals(said.append) as stop, pytest.raises(Stopped, match="after step 2 of 4"):
        train_grpo(**here.fresh(), config=config, out_dir=tmp_path / "run", progress=progress, stop=stop)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002"]
    assert len(said) == 1 and signal.Signals(number).name in said[0]
    resumed = train_grpo(**here.fresh(), config=config, out_dir=tmp_path / "run", resume=True)
    assert torch.equal(resumed.concept.embed, straight.concept.embed)


def test_a_second_signal_ends_at_once_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    with stop_on_signals(patient=True) as stop:
        for _ in range(3):  # from the scheduler, and once more from torchrun
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
    assert signal.getsignal(signal.SIGTERM) is before
    kept = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does it
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, kept)
    answers: list[bool] = []

    def elsewhere() -> None:
        with stop_on_signals() as stop:
            answers.append(stop())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert answers == [False]


@pytest.mark.slow
def test_a_pipeline_can_be_stopped_in_every_part(here: World, tmp_path: Path) -> None:
    config = chaos.settings()
    chaos.run(here, config, tmp_path / "straight")
    out, lives = tmp_path / "run", []
    for _ in range(60):
        try:
            chaos.run(here, config, out, after_calls(len(lives) % 3))
            break
        except Stopped as stopped:
            lives.append(str(stopped))
    words = " ".join(lives)
    assert "measuring" in words and "stage" in words and "after step" in words
    assert chaos.contents(out) == chaos.contents(tmp_path / "straight")
    with pytest.raises(Stopped, match="stage understanding at step 2 of 8"):
        train_concept_tokens(
            tiny_model(), here.vq, here.tokenizer, here.data, stage_config(epochs=8, max_steps=8), tmp_path / "s",
            stop=after_calls(1),
        )  # fmt: skip


def test_the_best_checkpoints_stay_beside_the_last(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", {}, {}) as folder:
        for step, reward in enumerate([0.1, 0.9, 0.2, float("nan"), 0.9, 0.3, 0.2], start=1):
            folder.save(step, {"x": torch.zeros(1)}, {"reward": reward}, keep_last=2, keep_best=2)
        assert folder.steps() == [2, 5, 6, 7], "the two of 0.9, and the last two"
        folder.save(8, {"x": torch.zeros(1)}, {"reward": 0.0}, keep_last=1, keep_best=0)
        assert folder.steps() == [8]


def test_a_run_keeps_the_checkpoint_of_its_best_steps(here: World, tmp_path: Path) -> None:
    config, run = grpo_config(steps=6, checkpoint_every=2, keep_last=1, keep_best=1), tmp_path / "run"
    train_grpo(**here.fresh(), config=config, out_dir=run)
    rewards = [line["reward_mean"] for line in read_metrics(run)]
    means = {step: (rewards[step - 2] + rewards[step - 1]) / 2 for step in (2, 4, 6)}
    kept = {int(path.name[5:]) for path in (run / "checkpoints").iterdir()}
    assert kept == {6, max(means, key=lambda step: means[step])}
    state = json.loads((run / "checkpoints" / "step_000006" / "state.json").read_text())
    assert state["reward"] == pytest.approx(means[6])


# --- clocks and neighbours -------------------------------------------------------------------------------------------


def test_clocks_have_no_part_in_what_is_done_again(
    here: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run is gone on with under clocks that jump: nothing is measured again. After more training it is."""
    config, out = chaos.settings(steps=2), tmp_path / "run"
    chaos.run(here, config, out)
    measured: list[str] = []
    save = EvalResult.save
    monkeypatch.setattr(EvalResult, "save", lambda self, path: (measured.append(Path(path).name), save(self, path))[1])
    for age in (-1e9, 1e9):
        for number, path in enumerate(sorted(out.rglob("*"))):
            stamp = time.time() + age * (-1) ** number
            os.utime(path, (stamp, stamp))
        monkeypatch.setattr(time, "time", lambda age=age: 1.7e9 + age)
        chaos.run(here, config, out)
    assert measured == []
    wanted = chaos.contents(out)
    marker = json.loads((out / "measured.json").read_text())
    marker["after"]["weights"] = "of another time"
    (out / "measured.json").write_text(json.dumps(marker))
    chaos.run(here, config, out)
    assert measured == ["after.json"] and chaos.contents(out) == wanted


def test_two_runs_on_one_folder(here: World, tmp_path: Path) -> None:
    config, out = chaos.settings(steps=1), tmp_path / "run"
    chaos.run(here, config, out)
    for name, folder in ((".pipeline.lock", out), (".lock", out), (".lock", out / "stages")):
        with folder_lock(folder, name), pytest.raises(UserError, match="another process is working in this folder"):
            chaos.run(here, config, out)
    holder = (
        "import sys, time\nfrom pyunictokens.utils.files import folder_lock\n"
        f"with folder_lock({str(out)!r}, '.pipeline.lock'):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            with pytest.raises(UserError, match="another process"):
                chaos.run(here, config, out)
        finally:
            other.kill()
    chaos.run(here, config, out)  # the system let go of the dead one's lock


def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import fcntl

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), folder_lock(tmp_path):
        assert "cannot be locked (No locks available)" in caplog.text


# --- experts ---------------------------------------------------------------------------------------------------------


class Hanging:
    """Scores at once, but for one step never."""

    def __init__(self, at: int):
        self.calls, self.at, self.wake = 0, at, threading.Event()

    def score(self, batch: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            self.wake.wait(30)
        return experts().score(batch)


def test_an_expert_that_hangs_ends_the_run_with_its_place(here: World, tmp_path: Path) -> None:
    hanging = Hanging(at=2)
    arguments = {**here.fresh(), "rewards": hanging}
    started = time.monotonic()
    with pytest.raises(UserError, match=r"scoring by the reward models gave no answer in 0\.5 s; .*wait\)"):
        train_grpo(**arguments, config=grpo_config(reward_timeout=0.5, checkpoint_every=1), out_dir=tmp_path / "run")
    hanging.wake.set()
    assert time.monotonic() - started < 15
    resumed = train_grpo(**here.fresh(), config=grpo_config(checkpoint_every=1), out_dir=tmp_path / "run", resume=True)
    straight = train_grpo(**here.fresh(), config=grpo_config(checkpoint_every=1), out_dir=tmp_path / "straight")
    assert torch.equal(resumed.concept.embed, straight.concept.embed), "the limit is no part of the result"


def test_a_judge_of_previews_that_hangs_is_asked_once(here: World, tmp_path: Path) -> None:
    asked, wake = [], threading.Event()

    def judge(prompts: Any) -> Any:
        def scorer(pixels: Any, index: Any) -> Any:
            asked.append(len(pixels))
            wake.wait(30)
            return pixels[:, 0].mean((1, 2))

        return scorer

    arguments = {**here.fresh(), "preview_scorer": judge}
    with (
        pytest.warns(UserWarning, match="scorer failed"),
        pytest.raises(UserError, match="judging previews gave no answer"),
    ):
        train_grpo(**arguments, config=grpo_config(reward_timeout=0.3), out_dir=tmp_path / "run")
    wake.set()
    assert len(asked) == 1


def test_foreign_code_that_calls_exit_ends_no_run_in_silence(here: World, tmp_path: Path) -> None:
    class Leaves:
        def score(self, batch: Any) -> Any:
            sys.exit(0)

    def judge(prompts: Any) -> Any:
        return lambda pixels, index: sys.exit(0)

    for number, limit in enumerate((0.0, 5.0)):
        config = grpo_config(reward_timeout=limit, steps=1)
        with pytest.raises(UserError, match="scoring by the reward models failed: SystemExit: 0"):
            train_grpo(**{**here.fresh(), "rewards": Leaves()}, config=config, out_dir=tmp_path / f"a{number}")
        with pytest.warns(UserWarning, match="scorer failed .* judging previews failed: SystemExit: 0"):
            train_grpo(**{**here.fresh(), "preview_scorer": judge}, config=config, out_dir=tmp_path / f"b{number}")


def test_an_expert_that_raises_is_named(here: World, tmp_path: Path) -> None:
    class Broken:
        def score(self, batch: Any) -> Any:
            raise ZeroDivisionError("no dogs")

    def judge(prompts: Any) -> Any:
        def scorer(pixels: Any, index: Any) -> Any:
            raise ZeroDivisionError("no cats")

        return scorer

    for number, limit in enumerate((0.0, 5.0)):
        config = grpo_config(reward_timeout=limit, steps=1)
        with pytest.raises(UserError, match="scoring by the reward models failed: ZeroDivisionError: no dogs"):
            train_grpo(**{**here.fresh(), "rewards": Broken()}, config=config, out_dir=tmp_path / f"a{number}")
        with pytest.warns(UserWarning, match="scorer failed .* judging previews failed: ZeroDivisionError: no cats"):
            train_grpo(**{**here.fresh(), "preview_scorer": judge}, config=config, out_dir=tmp_path / f"b{number}")
