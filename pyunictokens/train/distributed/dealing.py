"""How the rows of a step are dealt over ranks: contiguous, by what they are expected to cost; and how many questions a
step takes, so that no rank stands idle.

Who draws a row changes nothing of it, so any dealing gives the same results; all ranks compute the same one.
"""

from __future__ import annotations

from collections.abc import Sequence

IDLE = 1 / 8
"""The largest part of the ranks' time that may be idle where the number of questions is left open."""


def questions_a_step(group_size: int, world: int, idle: float = IDLE) -> int:
    """The fewest groups of `group_size` rows with which at most `idle` of the time of `world` ranks is idle: one on a
    single rank, four of nine rows on eight."""
    groups = 1
    while 1 - groups * group_size / (world * -(-groups * group_size // world)) > idle:
        groups += 1
    return groups


def deal(costs: Sequence[float], world: int) -> list[range]:
    """The rows of each rank, contiguous and in rank order, such that the rank with most to do has as little as can be;
    the others have about equally much. Some may have none."""
    most = _least_largest(costs, world)
    dealt, start, left = [], 0, float(sum(costs))
    for rank in range(world):
        wanted, own, stop = left / (world - rank), 0.0, start
        while stop < len(costs):
            over = own + costs[stop] > most * (1 + 1e-9)
            enough = own + costs[stop] / 2 > wanted * (1 + 1e-9) and _ranks_for(costs[stop:], most) < world - rank
            if over or enough:
                break
            own += costs[stop]
            stop += 1
        dealt.append(range(start, stop))
        start, left = stop, left - own
    return dealt


def _ranks_for(costs: Sequence[float], most: float) -> int:
    """How many ranks rows need, none of which does more than `most`."""
    ranks, own = 0, float("inf")
    for cost in costs:
        if own + cost > most * (1 + 1e-9):
            ranks, own = ranks + 1, 0.0
        own += cost
    return ranks


def _least_largest(costs: Sequence[float], world: int) -> float:
    """The smallest cost of the rank with most to do, over all ways to cut the rows into `world` runs."""
    low, high = max([*costs, sum(costs) / world]), float(sum(costs))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _ranks_for(costs, middle) <= world else (middle, high)
    return high
