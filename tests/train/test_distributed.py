"""Training over ranks: the same numbers on 1, 2 and 4 of them, checkpoints that any number resumes, and lost ranks."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pyunictokens.cli.train import train
from pyunictokens.rollout.engine import RolloutEngine
from pyunictokens.train import learner, read_metrics, train_grpo
from pyunictokens.train.checkpoint import run_state as state
from pyunictokens.train.checkpoint.writer import Saver
from pyunictokens.train.distributed import heartbeat as watch
from pyunictokens.train.distributed.ranks import Ranks
from pyunictokens.utils.errors import RankLost, UserError
from pyunictokens.utils.signals import Stopped
from tests.train.ranks import together
from tests.train.world import World, experts, grpo_config, world

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rows are filled"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]

LR = 1e-4
CONFIGS = {
    "uneven": grpo_config(steps=3, group_size=5, lr=LR, sample_every=1, inner_epochs=2),
    "few": grpo_config(steps=2, group_size=3, lr=LR, sample_every=1, timestep_fraction=0.5),
    "whole": grpo_config(steps=3, group_size=3, groups=2, lr=LR, trainable="full", sample_every=1, max_grad_norm=0.5),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world(tmp_path_factory.mktemp("world") / "data")


@pytest.fixture(scope="module")
def alone(here: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process."""
    out = tmp_path_factory.mktemp("alone")
    for name, config in CONFIGS.items():
        train_grpo(**here.fresh(), config=config, out_dir=out / name)
    assert not torch.distributed.is_initialized()
    return out


def learned(run: Path) -> dict[str, torch.Tensor]:
    """Everything that a run learned."""
    files = sorted((run / "final").rglob("*.safetensors"))
    return {name: value for file in files for name, value in state.read_safetensors(file).items()}


def equal(run: Path, other: Path) -> None:
    """The same drawings, answers and thresholds; losses, rewards and weights as near as sums in another order are."""
    lines, wanted = read_metrics(run), read_metrics(other)
    assert len(lines) == len(wanted) > 0
    for line, true in zip(lines, wanted, strict=True):
        exact = (
            "step",
            "mode",
            "threshold",
            "pass_rate",
            "candidates",
            "question",
            "answer",
            "prompt",
            "skipped",
            "lr",
        )
        assert {key: line[key] for key in exact} == {key: true[key] for key in exact}
        near = ("loss", "loss_answer", "loss_image", "reward_mean", "reward_std", "within_group_std", "kl", "entropy")
        for key in (*near, "clip_fraction", "ratio_mean"):
            assert line[key] == pytest.approx(true[key], abs=1e-5), key
        assert line["grad_norm"] == pytest.approx(true["grad_norm"], rel=1e-4)
        assert line["parts"] == pytest.approx(true["parts"], abs=1e-5)
    for file in sorted((other / "samples").glob("*")):
        same = run / "samples" / file.name
        if file.suffix == ".png":
            assert same.read_bytes() == file.read_bytes(), "codes differ"
        else:
            told, true = json.loads(same.read_text()), json.loads(file.read_text())
            assert told.pop("rewards") == pytest.approx(true.pop("rewards"), abs=1e-5) and told == true
    mine, theirs = learned(run), learned(other)
    assert mine.keys() == theirs.keys()
    off = torch.cat([(mine[name] - value).flatten().abs() for name, value in theirs.items()])
    # AdamW divides a gradient by its own size: where that is rounding alone, a step may go either way
    assert off.max() < 2 * len(lines) * LR and off.square().mean().sqrt() < 0.02 * LR


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_results_do_not_depend_on_the_number_of_ranks(here: World, alone: Path, tmp_path: Path, count: int) -> None:
    """Five rows on two and four ranks, three on four (one has none), two groups of three with a spread optimizer."""

    def work(ranks: Ranks) -> Any:
        found = {}
        for name, config in CONFIGS.items():
            result = train_grpo(**here.fresh(), config=config, out_dir=tmp_path / name, ranks=ranks)
            found[name] = result.last, {k: v.detach() for k, v in result.concept.named_parameters()}
        return found

    results = together(count, work, tmp_path / "results")
    for name in CONFIGS:
        equal(tmp_path / name, alone / name)
        last, rows = results[0][name]
        for other_last, other_rows in (result[name] for result in results[1:]):
            assert {**other_last, "seconds": 0} == {**last, "seconds": 0}, "ranks are of one mind"
            assert all(torch.equal(rows[key], other_rows[key]) for key in rows)
        shards = tmp_path / name / "checkpoints" / f"step_{CONFIGS[name].steps:06d}" / "shards"
        assert len(list(shards.glob("*.safetensors"))) == (count if name == "whole" else 0)
        report = json.loads((tmp_path / name / "phases.json").read_text())
        assert "synchronisation" in {phase["name"] for phase in report["phases"]}


@pytest.mark.slow
def test_checkpoints_are_resumed_by_any_number_of_ranks(here: World, alone: Path, tmp_path: Path) -> None:
    """Stopped on two ranks (the second was asked), gone on with by one and by three; and from one to two."""
    config = CONFIGS["whole"]

    def stopped(ranks: Ranks | None, out: Path, config: Any) -> None:
        calls = []

        def stop() -> bool:
            calls.append(1)
            return len(calls) == 2 and (ranks is None or ranks.rank == ranks.world - 1)

        with pytest.raises(Stopped, match="after step 2 of 3"):
            train_grpo(**here.fresh(), config=config, out_dir=out, stop=stop, ranks=ranks)

    def resumed(ranks: Ranks | None, out: Path, config: Any) -> None:
        train_grpo(**here.fresh(), config=config, out_dir=out, resume=True, ranks=ranks)

    plain = replace(config, shard="none")
    beside = replace(config, save_in_background=True, checkpoint_every=1)

    def two(ranks: Ranks) -> None:
        stopped(ranks, tmp_path / "two", beside)
        stopped(ranks, tmp_path / "plain", plain)
        resumed(ranks, tmp_path / "plain", config)  # what was whole is spread

    assert together(2, two, tmp_path / "results2") == [None, None]
    stopped(None, tmp_path / "one", config)
    shutil.copytree(tmp_path / "two", tmp_path / "two-one")
    shard = next((tmp_path / "two" / "checkpoints" / "step_000002" / "shards").glob("shard-00002-*"))
    shutil.copytree(tmp_path / "two", tmp_path / "damaged")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    (tmp_path / "damaged" / shard.relative_to(tmp_path / "two")).write_bytes(data)

    def three(ranks: Ranks) -> None:
        for name in ("two", "one", "damaged"):
            resumed(ranks, tmp_path / name, config)

    assert together(3, three, tmp_path / "results3") == [None] * 3
    resumed(None, tmp_path / "two-one", config)
    for name in ("two", "one", "two-one", "plain", "damaged"):
        equal(tmp_path / name, alone / "whole")
    assert not list(tmp_path.rglob("*.part"))


def test_what_is_not_finite_on_one_rank_is_left_out_on_all(here: World, tmp_path: Path) -> None:
    class Broken:
        """Its rewards are no numbers in the first step, on the second rank."""

        def __init__(self, rank: int):
            self.calls, self.rank = 0, rank

        def score(self, batch: Any) -> Any:
            self.calls += 1
            found = experts().score(batch)
            if self.calls == 1 and self.rank == 1:
                found.total[0] = float("nan")
            return found

    def work(ranks: Ranks) -> Any:
        calls, real = [], learner.streamed_backward

        def broken(*arguments: Any) -> Any:
            stats = real(*arguments)
            calls.append(1)
            if ranks.rank == 1 and len(calls) == 1:
                arguments[0].concept.embed.grad.fill_(float("nan"))
            elif ranks.rank == 1 and len(calls) == 2:
                stats.loss = float("inf")
            return stats

        learner.streamed_backward = broken  # type: ignore[assignment]
        arguments = {**here.fresh(), "rewards": Broken(ranks.rank)}
        config = grpo_config(steps=4, max_bad_steps=4)
        result = train_grpo(**arguments, config=config, out_dir=tmp_path / "run", ranks=ranks)
        return result.skipped, {name: value.detach() for name, value in result.concept.named_parameters()}

    (skipped, rows), (other, other_rows) = together(2, work, tmp_path / "results")
    assert skipped == other == 3 and all(torch.equal(rows[key], other_rows[key]) for key in rows)
    assert all(value.isfinite().all() for value in rows.values())
    told = [line["skipped"] or "" for line in read_metrics(tmp_path / "run")]
    assert "nan" in told[0] and "gradient of length nan" in told[1] and "loss inf" in told[2] and told[3] == ""


def test_a_rollout_that_is_not_finite_on_one_rank_is_left_out_on_all(here: World, tmp_path: Path) -> None:
    def work(ranks: Ranks) -> Any:
        real, calls = RolloutEngine.generate_images, []

        def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            result = real(self, *args, **kwargs)
            if ranks.rank == 1 and len(calls) == 1:
                assert result.pixels is not None
                result.pixels.fill_(float("nan"))
            return result

        RolloutEngine.generate_images = broken  # type: ignore[method-assign]
        result = train_grpo(**here.fresh(), config=grpo_config(steps=2), out_dir=tmp_path / "run", ranks=ranks)
        return result.skipped, {name: value.detach() for name, value in result.concept.named_parameters()}

    (skipped, rows), (other, other_rows) = together(2, work, tmp_path / "results")
    assert skipped == other == 1 and all(torch.equal(rows[key], other_rows[key]) for key in rows)
    told = [line["skipped"] or "" for line in read_metrics(tmp_path / "run")]
    assert "rollouts of group 0: images" in told[0] and told[1] == ""


# --- ranks that fail or are lost -------------------------------------------------------------------------------------


def test_a_stranger_at_the_store_ends_nothing(here: World, tmp_path: Path, hasty: None) -> None:
    """Who reaches the watch's port and writes what last words look like is not believed; it listens at one address."""

    def work(ranks: Ranks) -> Any:
        watcher = ranks._watch  # type: ignore[attr-defined]
        if ranks.first:
            port = watcher._server.port
            tables = "".join(Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6"))
            listening = [line.split() for line in tables.splitlines()]
            places = [line[1] for line in listening if line[3] == "0A" and line[1].endswith(f":{port:04X}")]
            assert places == [f"0100007F:{port:04X}"], places
            stranger = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
            for key in ("words", f"{watcher._secret}/words"):  # even with a name that it cannot know
                stranger.set(key, json.dumps([1, "I am ill"]))
                time.sleep(0.5)
                stranger.set(key, json.dumps([1, "I am ill", "0" * 64]))
        for _ in range(10):
            time.sleep(0.2)
            ranks.barrier()
        return "well"

    assert together(2, work, tmp_path / "results") == ["well", "well"]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter times than thirty seconds."""
    for name, value in (("BEAT", 0.1), ("SILENCE", 1.5), ("GRACE", 1.0)):
        monkeypatch.setattr(watch, name, value)


def test_a_rank_that_is_killed_is_named(here: World, tmp_path: Path, hasty: None) -> None:
    def work(ranks: Ranks) -> None:
        def progress(phase: str, done: int, total: int, values: Any) -> None:
            if ranks.rank == 1 and done == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        config = grpo_config(steps=4, checkpoint_every=1)
        train_grpo(**here.fresh(), config=config, out_dir=tmp_path / "run", ranks=ranks, progress=progress)

    started = time.monotonic()
    first, killed, third = together(3, work, tmp_path / "results", seconds=40)
    assert killed == -signal.SIGKILL and time.monotonic() - started < 30
    for lost in (first, third):
        assert isinstance(lost, RankLost)
        assert str(lost).startswith("rank 1 (") and "is gone" in str(lost) and "--resume" in str(lost)
    assert not first.quiet and third.quiet, "one of them tells"
    train_grpo(**here.fresh(), config=grpo_config(steps=4, checkpoint_every=1), out_dir=tmp_path / "run", resume=True)
    train_grpo(**here.fresh(), config=grpo_config(steps=4), out_dir=tmp_path / "straight")
    for line, true in zip(read_metrics(tmp_path / "run"), read_metrics(tmp_path / "straight"), strict=True):
        assert line["loss"] == pytest.approx(true["loss"], abs=1e-5) and line["answer"] == true["answer"]


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_rank_that_freezes_ends_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], frozen: int, hasty: None
) -> None:
    def work(ranks: Ranks) -> None:
        if ranks.rank == frozen:
            os.kill(os.getpid(), signal.SIGSTOP)
        ranks.gather(None)  # waits for a rank that never comes, in a call that Python cannot end

    results = together(2, work, tmp_path / "results", seconds=30, lost=frozen)
    assert results[1 - frozen] == 1, "the exit code"
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert f"rank {frozen} (" in line and "is gone" in line


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_fails_tells_the_others_why(here: World, tmp_path: Path, culprit: int, hasty: None) -> None:
    def work(ranks: Ranks) -> None:
        class Broken:
            def score(self, batch: Any) -> Any:
                if ranks.rank == culprit:
                    raise ZeroDivisionError("no dogs")
                return experts().score(batch)

        train_grpo(**{**here.fresh(), "rewards": Broken()}, config=grpo_config(), out_dir=tmp_path / "run", ranks=ranks)

    results = together(2, work, tmp_path / "results", seconds=40)
    assert isinstance(results[culprit], UserError) and "no dogs" in str(results[culprit])
    other = results[1 - culprit]
    assert isinstance(other, RankLost) and other.quiet and f"rank {culprit} (" in str(other) and "no dogs" in str(other)


def test_a_disk_that_takes_no_more_ends_all_ranks(here: World, tmp_path: Path, hasty: None) -> None:
    """Rank 0 alone writes; what it fails with, beside the steps, is told at the next one."""

    def work(ranks: Ranks) -> None:
        def full(path: Path, tensors: Any) -> str:
            raise OSError(28, "No space left on device")

        state.write_tensors = full  # type: ignore[assignment]
        config = grpo_config(steps=4, checkpoint_every=1, save_in_background=True)
        train_grpo(**here.fresh(), config=config, out_dir=tmp_path / "run", ranks=ranks)

    first, second = together(2, work, tmp_path / "results", seconds=40)
    assert isinstance(first, UserError) and "No space left" in str(first) and "--resume" in str(first)
    assert isinstance(second, RankLost) and "No space left" in str(second)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_rank_that_cannot_write_its_part_leaves_no_checkpoint(here: World, tmp_path: Path, hasty: None) -> None:
    def work(ranks: Ranks) -> None:
        if ranks.rank == 1:  # files of this process may grow no further
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        config = grpo_config(steps=2, checkpoint_every=1, trainable="full")
        try:
            train_grpo(**here.fresh(), config=config, out_dir=tmp_path / "run", ranks=ranks)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    results = together(2, work, tmp_path / "results", seconds=40)
    assert sorted(isinstance(result, RankLost) for result in results) == [False, True], "one of them tells"
    for result in results:
        assert isinstance(result, UserError) and "cannot be written" in str(result) and "large" in str(result)
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


# --- one process -----------------------------------------------------------------------------------------------------


def test_saving_beside_the_steps_changes_nothing_and_fails_loudly(
    here: World, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIGS["few"], checkpoint_every=1, save_in_background=True)
    write = state.write_tensors

    def slow(path: Path, tensors: Any) -> str:
        time.sleep(0.2)  # the next step is over before this is
        return write(path, tensors)

    monkeypatch.setattr(state, "write_tensors", slow)
    train_grpo(**here.fresh(), config=config, out_dir=tmp_path / "run")
    for step in (1, 2):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:06d}"
        if step == 2:
            wanted = state.read_safetensors(alone / "few" / "checkpoints" / folder.name / "tensors.safetensors")
            found = state.read_safetensors(folder / "tensors.safetensors")
            assert all(torch.equal(found[name], wanted[name]) for name in wanted if not name.startswith("rng"))
        assert json.loads((folder / "state.json").read_text())["step"] == step
    saver, done = Saver(background=True), []

    def fail() -> None:
        raise UserError("no room")

    saver.run(fail)
    with pytest.raises(UserError, match="no room"):
        saver.run(lambda: done.append(1))
    saver.run(lambda: done.append(2))
    saver.wait()
    saver.check()
    assert done == [2], "what came after a failure was not begun"


def test_shares_cover_all_rows_once() -> None:
    for count in (1, 2, 3, 8):
        for rows in (0, 1, 5, 9, 16):
            shares = []
            for rank in range(count):
                ranks = Ranks()
                ranks.rank, ranks.world = rank, count
                shares.append(ranks.share(rows))
            assert [row for share in shares for row in share] == list(range(rows))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_ranks_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="RANK, MASTER_ADDR, MASTER_PORT is not set: start ranks with torchrun"):
        Ranks.open("cpu")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE=two: must be a whole number"):
        Ranks.open("cpu")
    with pytest.raises(UserError, match="--concepts starts its own processes: run it without torchrun"):
        train(root=Path("data"), name=None, concepts="all")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Ranks.open("cpu").world == 1
    with pytest.raises(UserError, match="no other ranks"):
        Ranks().mesh()


# --- the pipeline ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_pipeline_over_ranks(here: World, tmp_path: Path) -> None:
    """Rank 0 does stages and evaluations, all reinforce; a stop ahead of that ends all ranks."""
    from tests.soak import chaos
    from tests.train.test_survival import after_calls

    config = chaos.settings(steps=2, sample_every=0)
    chaos.run(here, config, tmp_path / "alone")

    def work(ranks: Ranks) -> str:
        try:
            chaos.run(here, config, tmp_path / "run", after_calls(2) if ranks.first else None, ranks=ranks)
        except Stopped as stopped:
            told = str(stopped)
        chaos.run(here, config, tmp_path / "run", ranks=ranks)
        return told

    first, second = together(2, work, tmp_path / "results")
    assert first == second and "stopped" in first
    one, two = chaos.contents(tmp_path / "alone"), chaos.contents(tmp_path / "run")
    for line, true in zip(two["stages.jsonl"], one["stages.jsonl"], strict=True):  # sums over ranks round differently
        assert (line["step"], line["stage"]) == (true["step"], true["stage"])
        assert line["loss"] == pytest.approx(true["loss"], rel=1e-4)
    assert len(two["before"]["records"]) == len(one["before"]["records"])
    for line, true in zip(two["metrics.jsonl"], one["metrics.jsonl"], strict=True):
        assert line["loss"] == pytest.approx(true["loss"], abs=1e-5) and line["answer"] == true["answer"]
    assert len(two["after"]["records"]) == len(one["after"]["records"])
