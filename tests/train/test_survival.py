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

from pyunictokens.evaluate.result import EvalResult, read_means
from pyunictokens.models import ConceptTokens
from pyunictokens.train import read_metrics, train_concept_tokens, train_grpo
from pyunictokens.train.checkpoint.run_state import RunFolder
from pyunictokens.train.metrics import MetricsLog
from pyunictokens.train.policy import load_policy
from pyunictokens.utils import files as io
from pyunictokens.utils.errors import UserError
from pyunictokens.utils.files import folder_lock
from pyunictokens.utils.signals import Stopped, stop_on_signals
from tests.soak import chaos
from tests.train.world import World, experts, grpo_config, stage_config, tiny_concept, tiny_model, world

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rows are filled"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


@pytest.fixture
def here(tmp_path: Path) -> World:
    return world(tmp_path / "data")


# --- kills -----------------------------------------------------------------------------------------------------------


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


# --- disks and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ("concept.safetensors", errno.ENOSPC),
        ("metrics.jsonl", errno.ENOSPC),
        ("step_0000_final.png", errno.EDQUOT),
        ("after.json", errno.EROFS),
        ("config.yaml", errno.ENOSPC),
        ("stages.json", errno.EFBIG),
    ],
)
def test_a_disk_that_takes_no_more_is_named_and_nothing_is_lost(
    here: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, code: int
) -> None:
    """The writing of one file fails; the error names it, and the run goes on from there when there is room again."""
    config, out = chaos.settings(steps=2, sample_every=1), tmp_path / "run"
    chaos.run(here, config, tmp_path / "straight")
    write, add = io.write_bytes_atomic, MetricsLog.write

    class Full:
        def write(self, data: bytes) -> None:
            raise OSError(code, os.strerror(code))

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            os.close(self.descriptor)

        def __init__(self, descriptor: int):
            self.descriptor = descriptor

    def full(path: Any, data: bytes) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if Path(path).name == place:
                patch.setattr(os, "fdopen", lambda descriptor, mode: Full(descriptor))
            write(path, data)

    monkeypatch.setattr(io, "write_bytes_atomic", full)
    monkeypatch.setattr("pyunictokens.data.images.write_bytes_atomic", full)
    if place == "metrics.jsonl":

        def broken(self: MetricsLog, values: Any) -> None:
            if self.file.name == place:
                self._handle.close()
                self._handle = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
            add(self, values)

        monkeypatch.setattr(MetricsLog, "write", broken)
    with pytest.raises((UserError, OSError), match=place.replace(".", r"\.")) as caught:
        chaos.run(here, config, out)
    assert os.strerror(code) in str(caught.value)
    monkeypatch.undo()
    assert not list(out.rglob(f".{place}*.part"))
    chaos.run(here, config, out)
    assert chaos.contents(out) == chaos.contents(tmp_path / "straight")


def test_a_file_that_may_not_grow_is_named(here: World, tmp_path: Path) -> None:
    """`ulimit -f` at the file of the reference weights: an error with its name, not a traceback."""
    import resource

    limit, config = resource.getrlimit(resource.RLIMIT_FSIZE), grpo_config(steps=1, trainable="full")
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*reference\.safetensors'"):
            train_grpo(**here.fresh(), config=config, out_dir=tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list((tmp_path / "run").glob(".*.part"))
    train_grpo(**here.fresh(), config=config, out_dir=tmp_path / "run", resume=True)


def flip(file: Path, place: float = 0.5) -> None:
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 1
    file.write_bytes(bytes(data))


def test_one_flipped_bit_in_a_checkpoint_is_noticed_wherever_it_is(
    here: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, run = grpo_config(steps=3, checkpoint_every=1, keep_last=3), tmp_path / "run"
    train_grpo(**here.fresh(), config=config, out_dir=run)
    wanted = read_metrics(run)[2]["loss"]
    flip(run / "checkpoints" / "step_000003" / "tensors.safetensors", 0.9)
    state = run / "checkpoints" / "step_000002" / "state.json"
    text = state.read_text()
    state.write_text(text.replace('"skipped": 0', '"skipped": 1'))
    assert state.read_text() != text
    with caplog.at_level(logging.WARNING):
        result = train_grpo(**here.fresh(), config=config, out_dir=run, resume=True)
    assert "step 3 passed over" in caplog.text and "step 2 passed over" in caplog.text
    assert result.skipped == 0 and read_metrics(run)[2]["loss"] == wanted


def test_one_flipped_bit_in_learned_tokens_is_noticed(tmp_path: Path) -> None:
    concept = tiny_concept()
    concept.save(tmp_path)
    assert torch.equal(ConceptTokens.load(tmp_path).embed, concept.embed)
    flip(tmp_path / "concept.safetensors", 0.95)
    with pytest.raises(UserError, match=r"concept\.safetensors: is damaged"):
        ConceptTokens.load(tmp_path)


@pytest.mark.parametrize("what", ["full", "lora"])
def test_one_flipped_bit_in_what_was_learned_is_noticed(here: World, tmp_path: Path, what: str) -> None:
    train_grpo(**here.fresh(), config=grpo_config(steps=1, trainable=what), out_dir=tmp_path / "run")
    final = tmp_path / "run" / "final"
    load_policy(tiny_model(), final)
    weights = final / ("model/model.safetensors" if what == "full" else "adapter_model.safetensors")
    flip(weights, 0.9)
    with pytest.raises(UserError, match=rf"{weights.name}: is damaged"):
        load_policy(tiny_model(), final)


def test_one_flipped_bit_in_a_table_that_says_its_checksum_is_noticed(tmp_path: Path) -> None:
    records: Any = {"vqa": [{"question": "?", "scores": {"bleu": [0.5]}}]}
    file = EvalResult("bo", {"seed": 3, "parts": {2: 1, 10: 2}}, records).save(tmp_path / "after.json")
    assert EvalResult.load(file).metrics["vqa.bleu"].mean == 0.5 and read_means(file)["vqa.bleu"] == 0.5
    good = file.read_text()
    for damaged in (good.replace("0.5", "0.7"), good.replace('"vqa"', '"qa"'), good.replace("vqa.bleu", "vqa.bleV")):
        file.write_text(damaged)
        for read in (EvalResult.load, read_means):
            with pytest.raises(UserError, match=r"after\.json: is damaged"):
                read(file)
    content = json.loads(good)
    del content["sha256"]
    file.write_text(json.dumps(content))  # of an earlier version
    assert EvalResult.load(file).metrics["vqa.bleu"].mean == 0.5


def test_a_reference_that_was_damaged_is_written_anew(
    here: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = grpo_config(steps=2, trainable="full", checkpoint_every=1)
    straight = train_grpo(**here.fresh(), config=config, out_dir=tmp_path / "straight")
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        train_grpo(**here.fresh(), config=config, out_dir=run, stop=lambda: True)
    flip(run / "reference.safetensors", 0.9)
    with caplog.at_level(logging.WARNING):
        resumed = train_grpo(**here.fresh(), config=config, out_dir=run, resume=True)
    assert "not the model this run begins with; written anew" in caplog.text
    assert torch.equal(resumed.concept.embed, straight.concept.embed)
    assert (run / "reference.safetensors").read_bytes() == (
        tmp_path / "straight" / "reference.safetensors"
    ).read_bytes()


def test_a_log_cut_in_the_middle_of_a_character_is_read(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write({"step": 0, "answer": "ein Bär\u2028 und\u0085 mehr"})
    assert read_metrics(tmp_path) == [{"step": 0, "answer": "ein Bär\u2028 und\u0085 mehr"}]
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 1, "answer": "ein B\u00e4'.encode()[:-1])
    assert [line["step"] for line in read_metrics(tmp_path)] == [0]
    with MetricsLog(tmp_path, from_step=1) as log:
        log.write({"step": 1})
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1]


def test_damaged_logs_and_markers_are_no_traceback(here: World, tmp_path: Path) -> None:
    """A flipped bit in a log of the stages, a line of thousands of digits, markers and descriptions of another kind."""
    config, out = chaos.settings(steps=2), tmp_path / "run"
    chaos.run(here, config, out)
    log = out / "stages" / "stages.jsonl"
    good = log.read_bytes()
    for wrong in (good.replace(b'"stage"', b'"staGe"', 1), good.replace(b'"step"', b'"steq"', 1), b"9" * 5000 + b"\n"):
        log.write_bytes(wrong)
        chaos.run(here, config, out)
    (out / "metrics.jsonl").write_bytes(b'{"step": ' + b"9" * 5000 + b"}\n" + (out / "metrics.jsonl").read_bytes())
    chaos.run(here, config, out, report=True)
    for content in ("[1]", "3", "null", "{", '{"after": [1]}', '{"after": {"settings": 3}}'):
        (out / "measured.json").write_text(content)
        chaos.run(here, config, out)
    for name, read in (
        ("about.json", lambda: chaos.run(here, config, out, report=True)),
        ("stages/stages.json", lambda: chaos.run(here, config, out)),
        ("before.json", lambda: chaos.run(here, config, out)),
        ("run.json", lambda: chaos.run(here, config, out)),
    ):
        file = out / name
        kept = file.read_bytes()
        for content in (
            "[1]",
            r'{"name": "\ud800", "notes": ["\ud800"]}',
            '{"format": 1}' if "before" in name else "7",
        ):
            file.write_text(content)
            with pytest.raises(UserError, match=file.name.replace(".", r"\.")):
                read()
        file.write_bytes(kept)
    chaos.run(here, config, out)


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
