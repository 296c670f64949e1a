"""The queue of the serving engine without a model: bounds, order and fairness under random arrivals and drops."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyunictokens.rollout.serving.queue import FairQueue, QueueFull, Ticket


def ticket(number, user="ann", rows=1, cost=1.0, priority=0, deadline=math.inf):
    return Ticket(number, user, rows, cost, priority, deadline)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), most=st.integers(1, 20))
def test_every_row_is_given_out_once_or_dropped_once(seed, most):
    dice, queue, live, given_rows, dropped = random.Random(seed), FairQueue(most), [], {}, {}
    for number in range(60):
        what = dice.random()
        if what < 0.4:
            new = ticket(number, dice.choice("abc"), dice.randint(1, 6), dice.choice([1.0, 5.0]), dice.randint(0, 1))
            if queue.waiting + new.rows > most:
                with pytest.raises(QueueFull, match=f"limit of {most}"):
                    queue.add(new)
            else:
                queue.add(new)
                live.append(new)
        elif what < 0.9:
            here = [each for each in live if each.waiting and each.number not in dropped]
            best = max((each.priority for each in here), default=None)
            got = queue.take()
            assert (got is None) == (best is None)
            if got is not None:
                assert got.priority == best
                given_rows[got.number] = given_rows.get(got.number, 0) + 1
        elif live:
            gone = dice.choice(live)
            dropped.setdefault(gone.number, gone.waiting)
            queue.drop(gone)
        waiting = sum(each.waiting for each in live if each.number not in dropped)
        assert queue.waiting == waiting <= most
        assert queue.cost == sum(each.waiting * each.cost for each in live if each.number not in dropped)
    for each in live:
        left = 0 if each.number in dropped else each.waiting
        assert given_rows.get(each.number, 0) + dropped.get(each.number, 0) + left == each.rows


@settings(max_examples=100, deadline=None)
@given(
    costs=st.lists(st.integers(1, 50), min_size=2, max_size=4),
    rows=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    turns=st.integers(1, 200),
    seed=st.integers(0, 10**6),
)
def test_users_who_always_wait_are_given_alike(costs, rows, turns, seed):
    """Whatever they ask for: one user's many large requests do not take another's turns."""
    dice, queue, got, number = random.Random(seed), FairQueue(10**6), [0.0] * len(costs), 0
    for _ in range(turns):
        for user, cost in enumerate(costs):
            while sum(t.waiting for t in queue._tickets if t.user == str(user)) < 3:
                queue.add(ticket(number, str(user), rows[user] * dice.randint(1, 4), cost))
                number += 1
        taken = queue.take()
        got[int(taken.user)] += taken.cost
        assert max(got) - min(got) <= max(costs)


def test_a_user_who_comes_back_has_no_credit_and_no_debt():
    queue = FairQueue(100)
    queue.add(ticket(0, "busy", 50))
    for _ in range(20):
        queue.take()
    queue.add(ticket(1, "late", 50))
    order = [queue.take().user for _ in range(10)]
    assert abs(order.count("late") - order.count("busy")) <= 1
    while queue.take() is not None:
        pass
    assert queue._given == {} and queue.waiting == 0  # nobody is remembered for ever


def test_many_users_who_came_once_are_forgotten_while_others_wait():
    queue = FairQueue(1000)
    queue.add(ticket(0, "busy", 900))
    for number in range(1, 200):
        queue.add(ticket(number, f"user {number}"))
        queue.take()
        queue.take()
    assert len(queue._given) < 10


def test_priority_then_share_then_deadline_then_arrival():
    queue = FairQueue(100)
    queue.add(ticket(0, "ann", deadline=9.0))
    queue.add(ticket(1, "ann", deadline=3.0))
    queue.add(ticket(2, "ben"))
    queue.add(ticket(3, "cat", priority=1))
    queue.add(ticket(4, "ann", deadline=9.0))
    assert [queue.take().number for _ in range(5)] == [3, 1, 2, 0, 4]


def test_tickets_in_turn_hold_up_nobody_else():
    queue = FairQueue(100)
    for number, in_turn in enumerate((True, False, True)):
        queue.add(Ticket(number, "ann", 2, 1.0, in_turn=in_turn))
    assert queue.waiting_in_turn == 4
    assert [queue.take(in_turn=False).number for _ in range(2)] == [1, 1] and queue.take(in_turn=False) is None
    assert [queue.take().number for _ in range(4)] == [0, 0, 2, 2] and queue.waiting_in_turn == queue.waiting == 0
