"""The engine over captured slots: code for code what it draws over slots that the host runs."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyunictokens import MASK
from pyunictokens.models import Showo
from pyunictokens.rollout import Dsog, DsogThreshold
from pyunictokens.rollout.cuda_graphs import slots as captured
from pyunictokens.rollout.cuda_graphs.device_step import DeviceLoop as Plain
from pyunictokens.rollout.previews import Previews
from pyunictokens.rollout.types import ImageRollout
from pyunictokens.utils.errors import UserError

from .tiny import CONFIG, tiny_engine, tiny_model


def score(pixels: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return pixels.flatten(1).mean(1) / CONFIG.codebook_size


def same(found: ImageRollout, wanted: ImageRollout) -> None:
    assert torch.equal(found.codes, wanted.codes) and torch.equal(found.sample_ids, wanted.sample_ids)
    for name in ("inputs", "chosen"):
        mine, other = getattr(found, name), getattr(wanted, name)
        assert (mine is None and other is None) or torch.equal(mine, other)
    if wanted.logp is not None:
        assert (found.logp - wanted.logp).abs().max() < 1e-6


@settings(max_examples=15, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 49), max_size=6), min_size=1, max_size=3),
    samples=st.integers(1, 3),
    slots=st.integers(1, 6),
    guidance=st.sampled_from([0.0, 2.0]),
    steps=st.integers(1, 6),
    judged=st.booleans(),
    record=st.booleans(),
    holes=st.sampled_from([1.0, 0.5]),
    seed=st.integers(0, 2**31),
)
def test_equals_slots_that_the_host_runs(prompts, samples, slots, guidance, steps, judged, record, holes, seed):
    model, generator = tiny_model(), torch.Generator().manual_seed(seed)
    codes = torch.randint(0, CONFIG.codebook_size, (len(prompts), 9), generator=generator)
    known = torch.where(torch.rand(codes.shape, generator=generator) < holes, MASK, codes)
    options: dict[str, Any] = dict(
        samples=samples, steps=steps, guidance_scale=guidance, known_codes=known, record=record, seed=seed
    )

    def draw(capture: str) -> ImageRollout:
        dsog = Dsog(DsogThreshold(0.5), score, max_candidates=3) if judged else None
        return tiny_engine(model, max_rows=slots, capture=capture).generate_images(prompts, dsog=dsog, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a group may be filled, or not
        same(draw("eager"), draw("off"))


def test_what_was_captured_serves_later_calls_and_new_weights():
    model = tiny_model()
    engine, host = tiny_engine(model, capture="eager", max_rows=3), tiny_engine(model, capture="off", max_rows=3)
    for turn, prompts in enumerate(([[1, 2], [3]], [[4, 5], [6]], [[1, 2], [3]], [[7], [8, 9]])):
        if turn == 2:
            for parameter in model.parameters():
                parameter.mul_(1.03)
        options = dict(samples=2, steps=4, guidance_scale=2.0, seed=3, sample_ids=[turn * 10 + i for i in range(4)])
        same(engine.generate_images(prompts, **options), host.generate_images(prompts, **options))
    assert (engine._captures.made, engine._captures.reused, engine._captures.moved) == (1, 3, 0)
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.98
    same(
        engine.generate_images([[1]], steps=4, seed=3, samples=3),
        host.generate_images([[1]], steps=4, seed=3, samples=3),
    )
    assert engine._captures.moved == 0 and engine._captures.made == 2, "another guidance scale is another bucket"
    engine.generate_images([[1, 2], [3]], samples=2, steps=4, guidance_scale=2.0, seed=3)
    assert engine._captures.moved == 1


@pytest.mark.parametrize(("limit", "kept", "made"), [(4, 2, 2), (1, 1, 3)])
def test_prompts_of_all_lengths_share_two_structures(monkeypatch, limit, kept, made):
    monkeypatch.setattr(captured, "STRUCTURES", limit)
    loops: list[int] = []
    make = captured.DeviceLoop
    monkeypatch.setattr(captured, "DeviceLoop", lambda *args, **more: loops.append(1) or make(*args, **more))
    engine, host = tiny_engine(capture="eager"), tiny_engine(capture="off")
    for prompts, samples in (([[1]], 2), ([[1], [2, 3]], 1), ([list(range(9)), []], 1), ([[4, 5]], 2)):
        options = dict(steps=3, samples=samples, guidance_scale=2.0)
        same(engine.generate_images(prompts, **options), host.generate_images(prompts, **options))
    (bucket,) = (entry[1] for entry in engine._captures._entries.values())
    assert len(bucket._loops) == kept and len(loops) == made
    engine._captures.close()
    assert len(bucket._loops) == 0


def test_without_memory_for_a_capture_the_host_runs_the_steps(monkeypatch, caplog):
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    wanted = tiny_engine(capture="off").generate_images([[1], [2, 3]], steps=4, samples=2)
    monkeypatch.setattr(captured, "GuidedHidden", full)
    same(tiny_engine(capture="eager").generate_images([[1], [2, 3]], steps=4, samples=2), wanted)
    assert caplog.text.count("no memory for captured steps") == 1


@pytest.mark.parametrize("repeats", [False, True])
def test_by_itself_a_capture_waits_for_the_second_time(monkeypatch, repeats):
    engine, host = tiny_engine(capture="off"), tiny_engine(capture="off")
    runs: list[int] = []
    run = Plain.run
    monkeypatch.setattr(captured.DeviceLoop, "run", lambda loop: runs.append(1) or run(loop))

    def by_itself(*fixed: Any) -> captured.CapturedSlots:
        *rest, _ = fixed
        return captured.CapturedSlots(engine.model, *rest, engine._captures, "auto", repeats=repeats)

    monkeypatch.setattr(engine, "_slots", by_itself)
    first = int(repeats)  # in training, at first sight
    for prompts, captures in (([[1, 2]], first), ([[3]], 1), ([[4, 5, 6]], 1), ([[1], [2]], first), ([[3, 4], [5]], 1)):
        runs.clear()
        steps: list[int] = []
        found = engine.generate_images(prompts, steps=3, progress=lambda done, _, steps=steps: steps.append(done))
        same(found, host.generate_images(prompts, steps=3))
        rows = len(prompts)
        assert len(runs) == captures and steps == ([3 * rows] if captures else [rows, 2 * rows, 3 * rows])


def test_nothing_is_captured_while_previews_are_judged(monkeypatch):
    """A capture looks for calls that wait in the whole process: the judge in its thread would be the one that fails."""
    pending: list[int] = []
    captures: list[tuple[str, bool]] = []
    begin, make = Previews.begin, captured.Bucket.loop

    def begun(previews, codes, rows):
        verdict = begin(previews, codes, rows)
        pending.append(1)

        def settled():
            pending.pop()
            return verdict()

        return settled

    def loop(bucket, prompts, of_slot, may_capture=True):
        before = len(bucket._loops)
        found = make(bucket, prompts, of_slot, may_capture)
        if len(bucket._loops) > before or found is None:
            captures.append(("host" if found is None else "capture", bool(pending)))
        return found

    monkeypatch.setattr(Showo, "padded", lambda _, prefix: prefix)  # as of a model that does not pad
    monkeypatch.setattr(Previews, "begin", begun)
    monkeypatch.setattr(captured.Bucket, "loop", loop)
    dsog = dict(threshold=DsogThreshold(0.5), scorer=score, max_candidates=4, overlap=True)
    options: dict[str, Any] = dict(samples=3, steps=6, seed=5)
    prompts = [[1, 2], [3], [4, 5, 6]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = tiny_engine(capture="eager", max_rows=4).generate_images(prompts, dsog=Dsog(**dsog), **options)
        dsog["threshold"] = DsogThreshold(0.5)
        same(found, tiny_engine(capture="off", max_rows=4).generate_images(prompts, dsog=Dsog(**dsog), **options))
    assert ("capture", False) in captures and ("capture", True) not in captures
    assert ("host", True) in captures, "slots changed hands while a verdict was pending"


def test_bad_modes():
    with pytest.raises(UserError, match="capture='fast'"):
        tiny_engine(capture="fast")
    with pytest.raises(UserError, match="mode='loop': cannot run here"):
        tiny_engine(capture="loop").generate_images([[1]], steps=2)


def test_the_share_of_captured_row_steps_is_counted() -> None:
    """Prompts of a length that was not met before are left to the host, and the report says how much that was."""
    from pyunictokens.utils.profiling import Recorder

    engine = tiny_engine(capture="auto")
    with Recorder() as recorder:
        for _ in range(2):
            engine.generate_images([[1, 2]], samples=2, steps=4, guidance_scale=1.0)
    assert "row-steps that ran captured" not in recorder.report(torch.float32).shares  # on a CPU nothing is wanted
    named = tiny_engine(capture="eager")
    with Recorder() as recorder:
        named.generate_images([[1, 2]], samples=2, steps=4, guidance_scale=1.0)
    assert recorder.report(torch.float32).shares == {"row-steps that ran captured": 1.0}
