"""The scheduler without a model: any pass rate, group, cap and number of slots, against the rule in plainest form."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyunictokens.rollout.scheduler import ATTEMPT_SHIFT, Judging, Scheduler


def scores_of(seed, rate, worst=False):
    """A score for each (row, attempt), drawn once for ever; the threshold is 0.5."""

    def score(row, attempt):
        dice = random.Random(hash((seed, row, attempt)))
        if dice.random() < rate:
            return dice.uniform(0.51, 1.0)
        return float("nan") if dice.random() < 0.1 else round(dice.uniform(0.0, 0.5), 1)  # with ties

    return score


def plain_rule(kinds, cap, by_row, score):
    """Rounds: every row tries once, then all that failed again, until the cap; then the best rejected fill."""
    accepted, rejected, tried, attempt = {}, [], 0, 0
    while len(accepted) < len(kinds) and (attempt < cap if by_row else tried < cap):
        for row in range(len(kinds)):
            if row in accepted or (not by_row and tried == cap):
                continue
            tried += 1
            value = score(row, attempt)
            if value > 0.5:
                accepted[row] = (row, attempt)
            else:
                rejected.append((value if value == value else float("-inf"), -attempt, -row))
        attempt += 1
    outcome, free = dict(accepted), sorted(rejected, reverse=True)
    for row in range(len(kinds)):
        if row not in outcome:
            entry = next(e for e in free if (-e[2] == row if by_row else kinds[-e[2]] == kinds[row]))
            free.remove(entry)
            outcome[row] = (-entry[2], -entry[1])
    return outcome, len(accepted), tried


class Run:
    """Plays the scheduler, with every property checked on the way."""

    def __init__(self, kinds, slots, steps, judging, score, late=False, dice=None):
        ids = [100 + 7 * row for row in range(len(kinds))]
        scheduler = Scheduler(ids, kinds, slots, steps, judging)
        begun, self.outcome, held = {}, {}, {}
        self.busy = self.room = 0
        pending = []
        while not scheduler.finished:
            for candidate in scheduler.admit():
                assert candidate.slot not in held, "two candidates in one slot"
                held[candidate.slot] = candidate
                if candidate.step == 0:
                    key = (candidate.row, candidate.attempt)
                    assert key not in begun, "a candidate ran twice"
                    assert candidate.sample_id == ids[candidate.row] + (candidate.attempt << ATTEMPT_SHIFT)
                    begun[key] = 0
                else:
                    assert candidate.state == (candidate.sample_id, candidate.step)
            assert len(held) <= slots
            if scheduler._waiting and not pending:
                self.busy += len(scheduler.running)
                self.room += slots
            assert scheduler.running or pending or scheduler._complete, "nothing moves"
            if scheduler.running:
                steps_now = 1 if pending else (dice or random).randint(1, scheduler.stretch())
                for candidate in scheduler.running:
                    assert held[candidate.slot] is candidate
                    begun[self._key(candidate, ids)] += steps_now
                scheduler.advance(steps_now)
            due = pending
            pending = scheduler.due()
            if not (late and scheduler.running):
                due, pending = due + pending, []
            for candidate in due:
                assert candidate.step == judging.at
                slot = candidate.slot
                origin, attempt = self._key(candidate, ids)
                scheduler.judge(candidate, score(origin, attempt), lambda c: (c.sample_id, c.step))
                if not candidate.settled:
                    del held[slot]
            for candidate in scheduler.done():
                assert candidate.row not in self.outcome
                self.outcome[candidate.row] = self._key(candidate, ids)
                if candidate.slot >= 0:
                    del held[candidate.slot]
        assert not held
        assert sorted(self.outcome) == list(range(len(kinds))), "a row was lost"
        assert len(set(self.outcome.values())) == len(kinds), "two rows have one candidate"
        for key, done in begun.items():
            assert done == (steps if key in self.outcome.values() else judging.at)
        assert scheduler.row_steps == sum(begun.values())
        self.scheduler, self.begun = scheduler, begun

    def _key(self, candidate, ids):
        attempt = candidate.sample_id >> ATTEMPT_SHIFT
        return ids.index(candidate.sample_id - (attempt << ATTEMPT_SHIFT)), attempt


@settings(max_examples=300, deadline=None)
@given(
    kinds=st.lists(st.integers(0, 2), min_size=1, max_size=9),
    slots=st.integers(1, 12),
    steps=st.integers(1, 8),
    cap=st.integers(1, 6),
    by_row=st.booleans(),
    rate=st.floats(0, 1),
    late=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_outcome_is_that_of_the_plain_rule_whatever_the_slots(kinds, slots, steps, cap, by_row, rate, late, seed):
    dice = random.Random(seed)
    judging = Judging(dice.randint(1, steps), 0.5, cap if by_row else cap * len(kinds), by_row)
    score = scores_of(seed, rate)
    run = Run(kinds, slots, steps, judging, score, late, dice)
    outcome, accepted, tried = plain_rule(kinds, judging.cap, by_row, score)
    assert run.outcome == outcome
    assert (run.scheduler.accepted, run.scheduler.previewed) == (accepted, tried)
    assert len(run.begun) == tried <= cap * len(kinds)
    assert run.scheduler.filled == len(kinds) - accepted


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 30), slots=st.integers(1, 12), steps=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_without_previews_every_row_has_its_steps(rows, slots, steps, seed):
    scheduler, seen, dice = Scheduler(list(range(rows)), [0] * rows, slots, steps), {}, random.Random(seed)
    while not scheduler.finished:
        scheduler.admit()
        assert len(scheduler.running) == min(slots, rows - len(seen))
        scheduler.advance(dice.randint(1, scheduler.stretch()))
        assert scheduler.due() == []
        seen.update({candidate.row: candidate.step for candidate in scheduler.done()})
    assert seen == dict.fromkeys(range(rows), steps) and scheduler.row_steps == rows * steps


@settings(max_examples=60, deadline=None)
@given(
    rate=st.floats(0, 1),
    group=st.integers(2, 12),
    groups=st.integers(3, 6),
    seed=st.integers(0, 10**6),
    by=st.booleans(),
)
def test_slots_are_busy_while_anybody_waits(rate, group, groups, seed, by):
    """At least 95 % of the slot-steps, from the first step to the one at which nobody waits any more."""
    rows = group * groups
    slots = random.Random(seed).randint(1, max(1, rows // 3))
    judging = Judging(2, 0.5, 8 if by else 8 * rows, by)
    run = Run([0] * rows, slots, 10, judging, scores_of(seed, rate))
    assert run.busy >= 0.95 * run.room


def test_a_group_of_nine_at_the_papers_numbers_needs_the_least_row_steps():
    """T = 50, preview at 10, pass rate 0.25: 50 + 10·(1/0.25 − 1) row-steps for each image, within 3 %."""
    work = images = 0
    for seed in range(300):
        run = Run([0] * 9, 64, 50, Judging(10, 0.5, 72), scores_of(seed, 0.25))
        work, images = work + run.scheduler.row_steps, images + run.scheduler.accepted
    assert work / images == pytest.approx(50 + 10 * (1 / 0.25 - 1), rel=0.03)


@settings(max_examples=50, deadline=None)
@given(rate=st.floats(0, 1), rows=st.integers(1, 9), spare=st.integers(0, 3), seed=st.integers(0, 10**6))
def test_with_a_slot_for_every_row_each_row_stays_in_its_slot(rate, rows, spare, seed):
    """So a slot keeps its prompt for a whole call, and with it a captured step."""
    scheduler = Scheduler(list(range(rows)), list(range(rows)), rows + spare, 6, Judging(2, 0.5, 4 * rows))
    score, slot_of = scores_of(seed, rate), {}
    while not scheduler.finished:
        for candidate in scheduler.admit():
            assert slot_of.setdefault(candidate.row, candidate.slot) == candidate.slot
        if scheduler.running:
            scheduler.advance(scheduler.stretch())
        for candidate in scheduler.due():
            scheduler.judge(candidate, score(candidate.row, candidate.attempt), lambda c: None)
        scheduler.done()
    assert len(set(slot_of.values())) == rows


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="cap=2"):
        Scheduler([0, 1, 2], [0, 0, 0], 1, 4, Judging(1, 0.5, 2))
    scheduler = Scheduler([0], [0], 1, 4)
    scheduler.admit()
    with pytest.raises(ValueError, match="ran past 4"):
        scheduler.advance(5)
