"""Where experts run: moved in and out in lean mode, on streams of their own on a GPU, timed everywhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pyunictokens.rewards import Ensemble, RewardBatch
from pyunictokens.rewards.load import load_rewards
from pyunictokens.rewards.placement import Placement, Throughput, fits
from pyunictokens.toy.rewards import load_toy_rewards
from pyunictokens.utils.errors import UserError

from .checkpoints import SENTENCES, Folders
from .fakes import flat

CPU, META = torch.device("cpu"), torch.device("meta")


class Movable:
    """An expert that notes where it is when it is asked."""

    def __init__(self, log: list[str], name: str, weigh: int = 0, seconds: float = 0.0):
        self.log, self.name, self.bytes, self.seconds = log, name, weigh, seconds

    def to(self, device: torch.device) -> None:
        self.log.append(f"{self.name} to {device}")

    def score(self, batch: RewardBatch) -> torch.Tensor:
        self.log.append(f"{self.name} asked")
        time.sleep(self.seconds)
        return torch.full((len(batch),), 0.5)


def run(placement: Placement, log: list[str], fail: bool = False) -> dict[str, int]:
    experts = {name: Movable(log, name) for name in ("a", "b")}

    def ask(name: str) -> int:
        log.append(f"{name} asked")
        if fail:
            raise RuntimeError(name)
        return len(log)

    return placement.run(experts, ask, 3, CPU)


def test_lean_holds_one_network_at_a_time() -> None:
    log: list[str] = []
    run(Placement("lean", home=META), log)
    assert log == ["a to cpu", "a asked", "a to meta", "b to cpu", "b asked", "b to meta"]


def test_lean_takes_a_network_off_also_when_it_fails() -> None:
    log: list[str] = []
    with pytest.raises(RuntimeError, match="a"):
        run(Placement("lean", home=META), log, fail=True)
    assert log == ["a to cpu", "a asked", "a to meta"]


def test_together_leaves_networks_where_they_are() -> None:
    for memory in ("together", "auto"):
        log: list[str] = []
        run(Placement(memory), log)
        assert log == ["a to cpu", "b to cpu", "a asked", "b asked"]


def test_lean_gives_the_same_scores(saved: Folders) -> None:
    pixels = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = RewardBatch(pixels, SENTENCES[:3], SENTENCES[1:4], SENTENCES[:3], 0, pixels[:2], "animal")
    experts = saved.settings("tier", "ber", "der")
    scores = [load_rewards({"experts": experts, "memory": m}).score(batch) for m in ("lean", "together")]
    assert torch.equal(scores[0].total, scores[1].total)
    toy = load_toy_rewards().ensemble
    lean = Ensemble(toy.experts, memory="lean")
    assert torch.equal(lean.score(batch).total, toy.score(batch).total)


def test_real_networks_can_be_moved_and_weighed(saved: Folders) -> None:
    ensemble = load_rewards({"experts": saved.settings()})
    for expert in ensemble.experts.values():
        assert expert.bytes > 1000  # type: ignore[attr-defined]
        expert.to("meta")  # type: ignore[attr-defined]
        net = expert._encoder  # type: ignore[attr-defined]
        assert net.device == META and all(p.device == META for module in net.load() for p in module.parameters())
    toy = load_toy_rewards().ensemble.experts["der"]
    assert toy.bytes > 1000  # type: ignore[attr-defined]


def test_auto_chooses_by_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fits(10 << 30, 13 << 30) and not fits(10 << 30, 11 << 30)
    gpu = torch.device("cuda", 0)
    for free, mode in ((80 << 30, "together"), (3 << 30, "lean")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80 << 30))
        log: list[str] = []
        experts = {"a": Movable(log, "a", 2 << 30), "b": object()}
        placement = Placement()
        assert placement.mode(experts, gpu) == mode
        assert log == ["a to cpu"]  # weighed where it rests
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
        assert placement.mode(experts, gpu) == mode  # chosen once
    with pytest.raises(UserError, match="memory='all'"):
        Placement("all")


def test_streams_wait_for_the_pictures_and_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of waits around each expert, with CUDA's calls replaced by notes; tests/gpu runs the real ones."""
    log: list[str] = []

    class Stream:
        made = 0

        def __init__(self, device: Any = None, name: str = ""):
            if not name:
                Stream.made += 1
            self.name = name or f"s{Stream.made}"

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self, stream: Stream) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            log.append("synchronize")

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) * 1000

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        log.append(f"on {stream.name}")
        yield

    current = Stream(name="current")
    for name, value in (("Stream", Stream), ("Event", Event), ("stream", on)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    placement = Placement("together")
    gpu = torch.device("cuda", 0)
    experts = {"a": object(), "b": object()}
    placement.run(experts, log.append, 4, gpu)
    around = ["s1 waits for current", "on s1", "a", "s2 waits for current", "on s2", "b"]
    assert log == [*around, "current waits for s1", "current waits for s2"]
    log.clear()
    placement.run(experts, log.append, 4, gpu)
    assert "on s1" in log and "s3" not in str(log)  # an expert keeps its stream
    assert "synchronize" not in log  # nothing waits for a clock
    assert set(placement.throughput.per_second()) == {"a", "b"} and "synchronize" in log

    def fail(name: str) -> None:
        raise RuntimeError(name)

    log.clear()
    with pytest.raises(RuntimeError):
        placement.run(experts, fail, 4, gpu)
    assert log[-1] == "current waits for s1"


def test_throughput_is_rows_by_seconds() -> None:
    clock = Throughput()
    clock.add("a", 9, 3.0)
    clock.add("a", 1, 2.0)
    clock.add("b", 5, 0.0)
    assert clock.per_second() == {"a": 2.0}
    clock.clear()
    assert clock.per_second() == {}


def test_an_ensemble_reports_its_throughput() -> None:
    slow, fast = Movable([], "slow", seconds=0.05), Movable([], "fast")
    ensemble = Ensemble({"slow": slow, "fast": fast}, weights={"slow": 1, "fast": 1})
    assert ensemble.throughput() == {}
    for _ in range(2):
        ensemble.score(RewardBatch(flat(*[(0, 0, 0)] * 4), ["p"] * 4))
    found = ensemble.throughput()
    assert 4 / 0.1 < found["slow"] <= 4 / 0.05 and found["fast"] > found["slow"]
