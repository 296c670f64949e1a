"""DSOG: the threshold rule, and real trajectories through previews and refills (test_scheduler.py has the rules)."""

import math
import random
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import rollout_cases
from pyunictokens import MASK, DsogThreshold
from pyunictokens.rollout import Dsog
from pyunictokens.rollout.previews import Previews
from pyunictokens.rollout.sampler import EagerSlots
from pyunictokens.utils.errors import UserError

from .tiny import tiny_engine, tiny_model

# --- the threshold --------------------------------------------------------------------------------


def test_threshold_follows_equations_9_and_10():
    threshold = DsogThreshold()
    wanted = [0.493800431, 0.491714226, 0.506949778, 0.534536878, 0.56130048, 0.563248756, 0.556715182, 0.556715182]
    rates = [0.1, 0.2, 0.6, 0.9, 0.9, 0.3, 0.05, 0.25]
    got = [threshold.update(rate) for rate in rates]
    assert got == pytest.approx(wanted, abs=1e-8)
    assert threshold.value == got[-1]


@given(st.lists(st.floats(0, 1), max_size=60), st.floats(0.01, 0.99), st.floats(0, 1))
def test_threshold_stays_inside_and_moves_the_right_way(rates, initial, target):
    threshold = DsogThreshold(initial, target)
    for rate in rates:
        before, trend = threshold.value, threshold.trend
        after = threshold.update(rate)
        assert 0.01 <= after <= 0.99 and math.isfinite(threshold.trend)
        if abs(trend) < 0.05:  # the trend's brake is at most 2·0.05, less than μ
            assert (after - before) * (rate - target) >= 0


@given(st.lists(st.floats(0, 1), max_size=10), st.lists(st.floats(0, 1), max_size=10))
def test_threshold_continues_from_its_state(first, then):
    one = DsogThreshold()
    for rate in first:
        one.update(rate)
    two = DsogThreshold()
    two.load_state_dict(one.state_dict())
    assert [one.update(rate) for rate in then] == [two.update(rate) for rate in then]


def test_threshold_refuses_what_is_no_rate():
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(UserError, match="pass_rate"):
            DsogThreshold().update(bad)
    for options in ({"initial": 0.0}, {"target_pass_rate": 2.0}, {"eta": 1.0}, {"mu": -1.0}, {"epsilon0": math.nan}):
        with pytest.raises(UserError, match=next(iter(options))):
            DsogThreshold(**options)
    with pytest.raises(UserError, match=r"value=2\.0"):
        DsogThreshold().load_state_dict({"value": 2.0, "trend": 0.0})


# --- through the engine ---------------------------------------------------------------------------


class Scorer:
    """Passes a share `rate` of previews, whichever they are, and remembers what it saw."""

    def __init__(self, rate, seed=0):
        self.rate, self.dice, self.seen, self.index = rate, random.Random(seed), [], []

    def __call__(self, pixels, prompt_index):
        self.seen += [picture[0].flatten().long() for picture in pixels]
        self.index += prompt_index.tolist()
        return torch.tensor([0.9 if self.dice.random() < self.rate else self.dice.random() / 2 for _ in pixels])


def generate(prompts, scorer, engine=None, *, threshold=None, max_candidates=8, preview_step=None, **options):
    threshold = threshold or DsogThreshold()
    dsog = Dsog(threshold, scorer, preview_step, max_candidates)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (engine or tiny_engine()).generate_images(prompts, dsog=dsog, **options)


@settings(max_examples=40, deadline=None)
@given(
    rate=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    prompts=st.lists(st.sampled_from([(1, 2), (3,), (4, 5, 6)]), min_size=1, max_size=3),
    samples=st.integers(1, 3),
    steps=st.integers(1, 7),
    max_candidates=st.integers(1, 4),
    max_rows=st.integers(1, 9),
    preview=st.integers(1, 7) | st.none(),
    holes=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_every_sample_has_exactly_its_steps_and_is_the_one_its_id_draws(
    rate, prompts, samples, steps, max_candidates, max_rows, preview, holes, seed
):
    preview = None if preview is None else min(preview, steps)
    known = torch.tensor([5, MASK, MASK, 7, MASK, MASK, 1, MASK, MASK]) if holes else None
    scorer, model, seen = Scorer(rate, seed), tiny_model(), []
    engine = tiny_engine(model, max_rows=max_rows)
    options = dict(samples=samples, steps=steps, guidance_scale=1.5, seed=seed, known_codes=known)
    ids = torch.arange(len(prompts) * samples) * 3 + 1
    rollout = generate(
        list(prompts),
        scorer,
        engine,
        max_candidates=max_candidates,
        preview_step=preview,
        sample_ids=ids,
        progress=lambda *at: seen.append(at),
        **options,
    )
    rows, report = len(prompts) * samples, rollout.dsog
    assert report.accepted + report.filled == rows
    assert rows <= report.previewed <= max_candidates * rows
    assert report.previewed == len(scorer.seen) == len(scorer.index)
    assert report.pass_rate == report.accepted / report.previewed
    assert seen[-1] == (rows * steps, rows * steps) and seen == sorted(seen)
    if rate == 1.0:
        assert report.previewed == rows
        assert torch.equal(rollout.sample_ids, ids)
    if rate == 0.0:
        assert (report.accepted, report.previewed) == (0, max_candidates * rows)
    # Nothing lost, nothing run twice: every row is the trajectory that its own id draws without any DSOG.
    assert len(set(rollout.sample_ids.tolist())) == rows
    texts = [prompts[index] for index in rollout.prompt_index]
    alone = tiny_engine(model).generate_images(
        texts, **{**options, "samples": 1}, sample_ids=rollout.sample_ids, record=True
    )
    assert torch.equal(rollout.codes, alone.codes)
    assert torch.equal(rollout.inputs, alone.inputs)
    assert torch.equal(rollout.chosen, alone.chosen)
    assert (rollout.logp - alone.logp).abs().max() < 1e-6
    at = (max(1, steps // 5) if preview is None else preview) - 1
    assert torch.equal(report.preview_codes.long(), rollout.chosen[:, at].long())


def test_the_work_done_is_what_the_report_says(monkeypatch):
    stepped = []
    run = EagerSlots.run
    monkeypatch.setattr(EagerSlots, "run", lambda self, rows, n: (run(self, rows, n), stepped.append(n * len(rows))))
    for rate in (0.0, 0.3, 1.0):
        stepped.clear()
        report = generate([[1, 2], [3]], Scorer(rate), samples=3, steps=10, max_candidates=3).dsog
        thrown_away = report.previewed - report.accepted - report.filled
        assert report.row_steps == sum(stepped) == 6 * 10 + thrown_away * 2  # the preview is at step 10 // 5


class ById:
    """Scores a picture by its codes alone, so that a candidate has one score wherever it is drawn."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, pixels, prompt_index):
        dice = [random.Random(hash(tuple(p[0].flatten().long().tolist()))) for p in pixels]
        return torch.tensor([one.uniform(0.5, 1) if one.random() < self.rate else one.uniform(0, 0.5) for one in dice])


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    rate=st.sampled_from([0.0, 0.2, 0.5, 0.9]),
    max_rows=st.integers(1, 9),
    overlap=st.booleans(),
    by_row=st.booleans(),
    max_candidates=st.integers(1, 4),
    preview=st.integers(1, 6),
)
def test_who_stays_depends_on_neither_slots_nor_batches_nor_threads(
    rate, max_rows, overlap, by_row, max_candidates, preview
):
    rollouts = []
    for rows, beside in ((9, False), (max_rows, overlap)):
        dsog = Dsog(DsogThreshold(), ById(rate), preview, max_candidates, cap_by_row=by_row, overlap=beside)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine = tiny_engine(max_rows=rows)
            rollouts.append(engine.generate_images([[1, 2], [3], [4, 5]], samples=3, steps=6, seed=5, dsog=dsog))
    whole, other = rollouts
    assert torch.equal(whole.sample_ids, other.sample_ids)
    assert torch.equal(whole.codes, other.codes) and torch.equal(whole.inputs, other.inputs)
    assert torch.equal(whole.dsog.preview_codes, other.dsog.preview_codes)
    assert torch.equal(whole.dsog.scores, other.dsog.scores)
    assert (whole.dsog.accepted, whole.dsog.previewed, whole.dsog.row_steps, whole.dsog.next_threshold) == (
        other.dsog.accepted,
        other.dsog.previewed,
        other.dsog.row_steps,
        other.dsog.next_threshold,
    )


def test_with_a_cap_for_each_row_a_group_may_be_spread_over_processes():
    prompts, ids = [[1, 2], [3], [3], [4, 5], [1, 2]], [3, 9, 4, 1, 7]

    def draw(which):
        dsog = Dsog(DsogThreshold(), ById(0.3), max_candidates=3, cap_by_row=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            chosen, own = [prompts[i] for i in which], [ids[i] for i in which]
            return tiny_engine().generate_images(chosen, sample_ids=own, steps=5, seed=2, dsog=dsog)

    whole, parts = draw(range(5)), [draw([0, 3]), draw([1]), draw([2, 4])]
    assert 0 < whole.dsog.filled < 5
    for part, rows in zip(parts, ([0, 3], [1], [2, 4]), strict=True):
        assert torch.equal(whole.codes[rows], part.codes) and torch.equal(whole.sample_ids[rows], part.sample_ids)
    assert whole.dsog.previewed == sum(part.dsog.previewed for part in parts)


def test_other_rows_step_while_an_overlapping_scorer_thinks(monkeypatch):
    """The second call of the scorer returns only after a step of the others that began after it was asked."""
    taken, asked_at, threads, calls = [], [], set(), []
    run, begin = EagerSlots.run, Previews.begin
    monkeypatch.setattr(EagerSlots, "run", lambda self, rows, n: (run(self, rows, n), taken.append(len(rows))))
    monkeypatch.setattr(Previews, "begin", lambda self, *a: (asked_at.append(len(taken)), begin(self, *a))[1])

    def scorer(pixels, index):
        threads.add(threading.current_thread().name)
        calls.append(len(pixels))
        if len(calls) == 1:
            return torch.tensor([0.9, 0.1])  # from here on the two slots are at different steps
        deadline = time.monotonic() + 10
        while len(calls) == 2 and len(taken) == asked_at[-1]:
            assert time.monotonic() < deadline, "no step was taken meanwhile"
        return torch.ones(len(pixels))

    dsog = Dsog(DsogThreshold(), scorer, overlap=True)
    tiny_engine(max_rows=2).generate_images([[1]], samples=2, steps=10, dsog=dsog)
    assert calls == [2, 1] and all(name.startswith("previews") for name in threads)
    assert not any(thread.name.startswith("previews") for thread in threading.enumerate())


def test_a_scorer_on_another_gpu_than_the_current_one_waits_for_its_codes(monkeypatch):
    """The event is recorded on the stream that made the codes, whichever device is current. No GPU is here: what is
    asked of torch.cuda is noted."""
    recorded = []

    class Event:
        def record(self, stream=None):
            recorded.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: ("stream", str(device)))
    monkeypatch.setattr(Previews, "_apart", lambda self, codes, rows, ready: [1.0])
    codes = SimpleNamespace(is_cuda=True, device=torch.device("cuda:1"))
    with Previews(lambda codes: codes, lambda pixels, index: index, torch.zeros(1), overlap=True) as previews:
        assert previews.begin(codes, [0])() == [1.0]
    assert recorded == [("stream", "cuda:1")]


def test_a_refill_keeps_its_rows_prompt_and_the_others_go_on():
    """Row 1 fails twice; the others pass. Its third candidate is drawn from its own prompt."""
    calls = []

    def scorer(pixels, index):
        calls.append(index.tolist())
        tries = sum(1 in call for call in calls)
        return torch.tensor([0.2 if row == 1 and tries < 3 else 0.8 for row in index.tolist()])

    prompts = [[1, 2, 3], [4], [5, 6]]
    rollout = generate(prompts, scorer, steps=10)
    assert calls == [[0, 1, 2], [1], [1]] or calls == [[1, 2, 0], [1], [1]]
    assert rollout.dsog.attempts.tolist() == [0, 2, 0]
    assert rollout.sample_ids.tolist() == [0, 1 + 2 * 2**32, 2]
    assert (rollout.dsog.previewed, rollout.dsog.accepted, rollout.dsog.filled) == (5, 3, 0)
    assert rollout.dsog.scores.tolist() == pytest.approx([0.8, 0.8, 0.8])
    alone = tiny_engine().generate_images(prompts, steps=10, sample_ids=rollout.sample_ids)
    assert torch.equal(rollout.codes, alone.codes)


def test_previews_are_all_known_and_decoded_once():
    scorer, engine = Scorer(0.4), tiny_engine()
    rollout = generate([[1, 2]], scorer, engine, samples=4, steps=10)
    assert all(int(picture.min()) >= 0 for picture in scorer.seen)
    assert engine.vq.decoded == rollout.dsog.previewed + 4
    shown = {tuple(picture.tolist()) for picture in scorer.seen}
    assert all(tuple(codes.tolist()) in shown for codes in rollout.dsog.preview_codes)


def test_the_best_rejected_previews_fill_the_group_with_a_warning():
    scores = iter([0.1, 0.4, 0.3, 0.2, 0.45, 0.05])

    def scorer(pixels, index):
        return torch.tensor([next(scores) for _ in pixels])

    dsog = Dsog(DsogThreshold(), scorer, max_candidates=3)
    with pytest.warns(UserWarning, match="2 of 2 rows are filled with the best rejected previews: 6 candidates"):
        rollout = tiny_engine().generate_images([[1, 2]], samples=2, steps=5, dsog=dsog)
    assert sorted(rollout.dsog.scores.tolist()) == pytest.approx([0.4, 0.45])
    assert (rollout.dsog.filled, rollout.dsog.pass_rate) == (2, 0.0)


def test_the_threshold_moves_once_a_group_and_a_number_never():
    threshold, twin = DsogThreshold(), DsogThreshold()
    rollout = generate([[1, 2]], Scorer(1.0), threshold=threshold, samples=3, steps=5)
    assert rollout.dsog.threshold == 0.5
    assert threshold.value == rollout.dsog.next_threshold == twin.update(1.0)
    for level in (0.9, 0.1):
        dsog = Dsog(level, Scorer(0.5), max_candidates=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = tiny_engine().generate_images([[1, 2]], samples=3, steps=5, dsog=dsog).dsog
        assert report.threshold == report.next_threshold == dsog.threshold == level
        assert report.accepted == sum(score > level for score in report.scores.tolist())


def test_a_score_equal_to_the_threshold_does_not_pass():
    rollout = generate([[1]], lambda pixels, index: torch.full((len(pixels),), 0.5), steps=5, max_candidates=2)
    assert (rollout.dsog.accepted, rollout.dsog.previewed, rollout.dsog.filled) == (0, 2, 1)


def raising(pixels, index):
    raise RuntimeError("no such expert")


@pytest.mark.parametrize(
    ("scorer", "said"),
    [
        (raising, "RuntimeError: no such expert"),
        (lambda pixels, index: torch.full((len(pixels),), math.nan), "3 of 3 scores are not finite"),
        (lambda pixels, index: torch.ones(len(pixels), 2), r"scores of shape \(3, 2\)"),
    ],
)
def test_a_scorer_that_fails_fails_its_previews_and_is_reported(scorer, said):
    wanted = f"the DSOG scorer failed 2 times, first with {said}"
    with pytest.warns(UserWarning, match=wanted), pytest.warns(UserWarning, match="3 of 3 rows are filled"):
        rollout = tiny_engine().generate_images(
            [[1, 2]], samples=3, steps=5, dsog=Dsog(DsogThreshold(), scorer, max_candidates=2)
        )
    assert (rollout.dsog.accepted, rollout.dsog.previewed, rollout.dsog.filled) == (0, 6, 3)
    assert len(rollout.dsog.errors) == 2
    assert int(rollout.codes.min()) >= 0
    assert rollout.dsog.scores.tolist() == [-math.inf] * 3


def test_one_score_of_nan_fails_one_preview_only():
    calls = []

    def scorer(pixels, index):
        calls.append(len(pixels))
        return torch.tensor([math.nan, 0.9, 0.9][: len(pixels)]) if len(calls) == 1 else torch.full((len(pixels),), 0.8)

    rollout = generate([[1, 2]], scorer, samples=3, steps=5)
    assert calls == [3, 1]
    assert rollout.dsog.attempts.tolist() == [1, 0, 0]
    assert rollout.dsog.errors == ["1 of 3 scores are not finite"]


def test_the_engine_does_the_least_work_for_an_accepted_image():
    """T = 50, preview at 10, group 9, one preview in four passes: 80 row-steps for each image, within 3 %."""
    work = rollout_cases.dsog_work(groups=8)
    assert work["least"] == 80 and abs(work["above_least_percent"]) < 3
    assert work["images"] == 72 and abs(work["previews"] / 288 - 1) < 0.03
