"""Captured steps and the captured loop: the same numbers as the eager step, whatever changes around the capture.

On the CPU the same bodies run with the eager step in place of the graph.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyunictokens import MASK
from pyunictokens.models import Showo
from pyunictokens.ops.backends import cpu as _native
from pyunictokens.rollout.cuda_graphs.capture import CaptureCache, CapturedSteps, GraphPool, best_mode
from pyunictokens.rollout.cuda_graphs.device_step import DeviceLoop, GuidedHidden, StepState, image_head, read_by
from pyunictokens.rollout.sampler import LoopSettings
from pyunictokens.utils.errors import UserError
from tests.rollout.test_device_step import prefixes
from tests.rollout.tiny import tiny_model

MODES = ("loop", "replay", "eager")
STEPS, COUNT = 6, 9
TEXTS = [[1, 2, 3], [4], [5, 6, 7]]


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest, device: str) -> str:
    """Each way to run, where it can; the CPU has one."""
    best, why = best_mode(torch.device(device))
    if MODES.index(request.param) < MODES.index(best):
        pytest.skip(f"{request.param}: {why}")
    return request.param


class Walk:
    """x ← w·x + 1 until x reaches `limit`: a step whose weight, start and end lie on the device."""

    def __init__(self, device: str, limit: float = 30.0):
        self.x = torch.zeros(5, device=device)
        self.weight = torch.full((5,), 1.5, device=device)
        self.limit = torch.tensor(limit, device=device)
        self.keep_going = torch.ones(1, dtype=torch.int32, device=device)

    def __call__(self) -> None:
        on = self.keep_going != 0
        new = self.weight * self.x + 1  # memory of the capture's own pool
        self.x.copy_(torch.where(on, new, self.x))
        self.keep_going.copy_((on & (self.x[0] < self.limit)).to(torch.int32))

    def restart(self) -> None:
        self.x.zero_()
        self.keep_going.fill_(1)

    def expected(self, most: int) -> tuple[int, float]:
        x, taken = 0.0, 0
        while taken < most and x < float(self.limit):
            x, taken = float(self.weight[0]) * x + 1, taken + 1
        return taken, x


def holds(walk: Walk, steps: CapturedSteps, most: int = 50) -> None:
    walk.restart()
    taken, value = walk.expected(most)
    assert steps.run(most) == taken
    assert walk.x.tolist() == pytest.approx([value] * 5)


def test_a_run_ends_by_itself_or_at_the_limit(device: str, mode: str) -> None:
    walk = Walk(device)
    steps = CapturedSteps(walk, walk.keep_going, mode=mode)  # type: ignore[arg-type]
    assert steps.mode == mode and walk.x.tolist() == [0.0] * 5 and int(walk.keep_going) == 1, "warm-up left no trace"
    for most in (50, 1, 3, 0, 50):
        holds(walk, steps, most)
    walk.keep_going.zero_()
    assert steps.run(9) == 0
    walk.limit.fill_(3.0)
    holds(walk, steps)
    assert (steps.capture_seconds > 0) == (mode != "eager") and mode in steps.report()
    steps.close()


def test_auto_takes_the_best_there_is(device: str) -> None:
    walk = Walk(device)
    steps = CapturedSteps(walk, walk.keep_going)
    assert (steps.mode, steps.why) == best_mode(torch.device(device))
    holds(walk, steps)


def test_weights_written_in_place_are_seen(device: str, mode: str) -> None:
    walk = Walk(device)
    steps = CapturedSteps(walk, walk.keep_going, mode=mode)  # type: ignore[arg-type]
    holds(walk, steps)
    walk.weight.fill_(1.1)
    holds(walk, steps)


def test_captures_that_share_memory_take_turns_on_several_streams(device: str, mode: str) -> None:
    pool = GraphPool(torch.device("cuda", torch.cuda.current_device())) if device == "cuda" else None
    walks = [Walk(device, limit) for limit in (30.0, 90.0, 5.0)]
    steps = [CapturedSteps(w, w.keep_going, mode=mode, pool=pool) for w in walks]  # type: ignore[arg-type]
    for turn in range(4):
        for walk, run in zip(walks[turn % 2 :], steps[turn % 2 :], strict=True):
            holds(walk, run)
    if device == "cuda":
        streams = [torch.cuda.Stream() for _ in walks]
        for walk in walks:
            walk.restart()
        torch.cuda.synchronize()
        for run, stream in zip(steps, streams, strict=True):
            with torch.cuda.stream(stream):
                run.launch(50)
        for walk, run in zip(walks, steps, strict=True):
            taken, value = walk.expected(50)
            assert run.wait() == taken
            torch.cuda.synchronize()
            assert walk.x.tolist() == pytest.approx([value] * 5)
    for run in steps:
        run.close()


def test_a_step_that_waits_for_the_device_runs_eagerly_and_says_so(device: str) -> None:
    walk = Walk(device)

    def step() -> None:
        assert float(walk.x.sum()) >= 0  # read by the host: no capture
        walk()

    steps = CapturedSteps(step, walk.keep_going)
    assert steps.mode == "eager"
    assert ("cannot be captured" in steps.why) == (device == "cuda")
    holds(walk, steps)
    if device == "cuda":
        with pytest.raises(UserError, match="cannot be captured"):
            CapturedSteps(step, walk.keep_going, mode="replay")
        fine = CapturedSteps(walk, walk.keep_going)  # the failure spoiled nothing
        holds(walk, fine)


def test_an_older_driver_means_replays(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        def graph_loop_objection(self) -> str:
            return "the driver serves CUDA 12.2; a loop in a graph needs 12.4"

    walk, old = Walk(device), Old()
    monkeypatch.setattr(_native, "core", lambda: old)
    steps = CapturedSteps(walk, walk.keep_going)
    assert steps.mode == ("replay" if device == "cuda" else "eager")
    holds(walk, steps)


# --- the real step -------------------------------------------------------------------------------------------------


def model_on(device: str) -> Showo:
    return tiny_model(dtype=torch.float32).to(device)


def loop_on(model: Showo, rows: int, mode: str, pool: GraphPool | None = None) -> DeviceLoop:
    n = LoopSettings(STEPS, 2.0, 1.3, "cosine", 3, True, 64)
    of_row = [row % 3 for row in range(rows)]
    hidden = GuidedHidden(model, prefixes(model, TEXTS, True), of_row, 2.0, COUNT)
    state = StepState.make(model, rows, COUNT, n)
    return DeviceLoop(hidden, image_head(model), state, n.seed, mode=mode, pool=pool)  # type: ignore[arg-type]


def drawn(loop: DeviceLoop, looks: Callable[[StepState], None] | None = None) -> tuple[Tensor, Tensor]:
    rows = len(loop.state.codes)
    known = torch.full((rows, COUNT), MASK, device=loop.state.codes.device)
    loop.state.start(range(rows), known, list(range(10, 10 + rows)), 2 if looks else STEPS, looks is not None)
    assert loop.run() == (2 if looks else STEPS)
    if looks:
        looks(loop.state)
        assert loop.run() == STEPS - 2
    assert loop.state.picked is not None and loop.state.logp is not None and not bool(loop.state.broken)
    return loop.state.picked.clone(), loop.state.logp.clone()


def test_images_are_those_of_the_eager_step(device: str, mode: str) -> None:
    model = model_on(device)
    with torch.no_grad():
        wanted = drawn(loop_on(model, 4, "eager"))
        loop = loop_on(model, 4, mode)
        for _ in range(2):
            found = drawn(loop)
            assert torch.equal(found[0], wanted[0]) and torch.allclose(found[1], wanted[1], atol=1e-4)
        found = drawn(loop, lambda state: state.let_go(range(4), STEPS))
        assert torch.equal(found[0], wanted[0])


def test_buckets_share_memory_and_follow_weights_that_move(device: str, mode: str) -> None:
    model = model_on(device)
    cache: CaptureCache[DeviceLoop] = CaptureCache(limit=2)

    def get(rows: int) -> DeviceLoop:
        return cache.get(rows, read_by(model), model.device, lambda pool: loop_on(model, rows, mode, pool))

    def holds_for(rows: int) -> None:
        loop = get(rows)
        assert isinstance(loop.hidden_of, GuidedHidden)
        loop.hidden_of.load(prefixes(model, TEXTS, True))  # the prompts' keys and values are of the weights as they are
        wanted, found = drawn(loop_on(model, rows, "eager")), drawn(loop)
        assert torch.equal(found[0], wanted[0]) and torch.allclose(found[1], wanted[1], atol=1e-4)

    with torch.no_grad():
        for rows in (2, 5, 2, 3, 5):
            holds_for(rows)
        assert (cache.made, cache.reused) == (4, 1)
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.05  # elsewhere now
        holds_for(5)
        assert cache.moved == 1
        for parameter in model.parameters():
            parameter.mul_(0.97)  # in place
        holds_for(5)
        assert cache.moved == 1
    cache.close()
