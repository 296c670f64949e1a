"""Runs of steps without a GPU: when they end, which way is chosen and why, buckets, and what leaves the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyunictokens.ops.backends import cpu as _native
from pyunictokens.rollout.cuda_graphs import capture
from pyunictokens.rollout.cuda_graphs.capture import CaptureCache, CapturedSteps, best_mode, bucket, signature
from pyunictokens.utils.errors import UserError


class Counter:
    """A step that counts to `limit` and then stops; while it is stopped it changes nothing."""

    def __init__(self, limit: int):
        self.limit, self.value = limit, torch.zeros(1, dtype=torch.int64)
        self.keep_going = torch.ones(1, dtype=torch.int32)

    def __call__(self) -> None:
        self.value += self.keep_going
        self.keep_going.copy_(self.keep_going * (self.value < self.limit))


@given(limit=st.integers(1, 9), most=st.integers(0, 12))
def test_a_run_ends_when_the_step_says_so_or_at_the_limit(limit, most):
    counter = Counter(limit)
    steps = CapturedSteps(counter, counter.keep_going)
    assert steps.run(most) == min(limit, most) == int(counter.value)
    assert steps.run(3) == min(3, limit - min(limit, most)), "the rest"
    counter.keep_going.zero_()
    assert steps.run(5) == 0
    assert steps.mode == "eager" and "nothing to capture" in steps.why
    assert (steps.runs, steps.steps) == (3, int(counter.value))
    assert steps.report() == f"eager ({steps.why}), {int(counter.value)} steps in 3 runs"


def test_what_cannot_run():
    counter = Counter(3)
    for mode in ("loop", "replay"):
        with pytest.raises(UserError, match=f"mode='{mode}': cannot run here .*nothing to capture"):
            CapturedSteps(counter, counter.keep_going, mode=mode)
    with pytest.raises(UserError, match="mode='fast'"):
        CapturedSteps(counter, counter.keep_going, mode="fast")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="must be one int32"):
        CapturedSteps(counter, torch.ones(1))
    with pytest.raises(UserError, match="must be one int32"):
        CapturedSteps(counter, torch.ones(2, dtype=torch.int32))
    with pytest.raises(UserError, match="warmup=1"):
        CapturedSteps(counter, counter.keep_going, warmup=1)
    steps = CapturedSteps(counter, counter.keep_going, mode="eager")
    assert steps.why == "asked for"
    with pytest.raises(UserError, match="max_steps=-1"):
        steps.run(-1)
    steps.launch(2)
    with pytest.raises(UserError, match="under way"):
        steps.launch(1)
    assert steps.wait() == 2
    steps.close()
    with pytest.raises(UserError, match="closed"):
        steps.run(1)


def test_steps_that_the_host_counts_are_not_read_from_the_device(monkeypatch):
    """The device's own count may not have arrived yet on the stream that waits; and the wait is for an event."""
    counter, log = Counter(3), []

    class Event:
        def synchronize(self) -> None:
            log.append("waited")

    monkeypatch.setattr(capture, "_event", lambda device: log.append(f"event on {device.type}") or Event())
    steps = CapturedSteps(counter, counter.keep_going)
    steps.launch(5)
    assert log == ["event on cpu"]
    steps._left.fill_(12345)  # what another stream would still see
    assert steps.wait() == 3 and log == ["event on cpu", "waited"]
    assert steps.wait() == 0 and steps.steps == 3
    steps.run(0)
    assert log.count("waited") == 2, "each run has an event of its own"


def test_a_step_that_fails_leaves_the_runner_usable():
    counter = Counter(4)

    def step() -> None:
        if int(counter.value) == 2:
            counter.value += 1
            raise KeyboardInterrupt
        counter()

    steps = CapturedSteps(step, counter.keep_going)
    with pytest.raises(KeyboardInterrupt):
        steps.run(9)
    assert steps.run(9) == 1


@pytest.mark.parametrize(
    ("core", "mode", "reason"),
    [
        (None, "replay", "no CUDA part"),
        (object(), "replay", "no CUDA part"),
        ("the driver serves CUDA 12.2; a loop in a graph needs 12.4", "replay", "12.2"),
        ("", "loop", "one launch a run"),
    ],
)
def test_the_mode_of_a_gpu_and_its_reason(monkeypatch, core: Any, mode: str, reason: str) -> None:
    if isinstance(core, str):
        words = core

        class Core:
            def graph_loop_objection(self) -> str:
                return words

        core = Core()
    monkeypatch.setattr(_native, "core", lambda: core)
    found, why = best_mode(torch.device("cuda"))
    assert found == mode and reason in why


def test_the_core_of_this_machine_answers():
    core = _native.core()
    if core is None or not hasattr(core, "graph_loop_objection"):
        pytest.skip("built without nvcc")
    objection = core.graph_loop_objection()
    assert (objection == "") == (torch.cuda.is_available() and _native.build_info()["cuda"]["driver_version"] >= 12040)


@given(st.integers(1, 200))
def test_buckets_waste_little(rows):
    size = bucket(rows)
    assert size >= rows and bucket(size) == size
    assert size == rows if rows <= 16 else size - rows <= size / 5
    with pytest.raises(UserError, match="rows=0"):
        bucket(0)


class Capture:
    def __init__(self, name: str, log: list[str]):
        self.name, self.log = name, log
        log.append(f"made {name}")

    def close(self) -> None:
        self.log.append(f"closed {self.name}")


def test_the_cache_drops_the_oldest_and_what_has_moved():
    log: list[str] = []
    cache: CaptureCache[Capture] = CaptureCache(limit=2)
    weight, cpu = torch.randn(3, 4), torch.device("cpu")

    def get(key: str) -> Capture:
        return cache.get(key, [weight], cpu, lambda pool: Capture(key, log))

    first = get("a")
    assert get("a") is first and cache.pool(cpu) is None
    weight.mul_(2)
    assert get("a") is first, "written in place: the same capture reads it"
    get("b"), get("a"), get("c")
    assert log == ["made a", "made b", "closed b", "made c"]
    weight.data = weight.data.clone()
    again = get("a")
    assert again is not first and log[-2:] == ["closed a", "made a"] and cache.moved == 1
    assert (cache.made, cache.reused, len(cache)) == (4, 3, 2)
    cache.close()
    assert len(cache) == 0 and log[-2:] == ["closed c", "closed a"]
    with pytest.raises(UserError, match="limit=0"):
        CaptureCache(limit=0)


def test_a_signature_knows_place_and_layout():
    weight = torch.randn(4, 4)
    assert signature([weight]) == signature([weight.view(4, 4)])
    assert signature([weight]) != signature([weight.t()])
    assert signature([weight]) != signature([weight.clone()])
    assert signature([weight]) != signature([weight[:2]])


def test_all_modes_are_named():
    assert capture.MODES == ("auto", "loop", "replay", "eager")
