"""Who gets a slot next: priority, then the user who has had least, then the nearest deadline. Plain Python, no tensors.

A request is a *ticket* of some rows; each row takes one slot when its turn comes, so a large request never waits for
many slots at once and never keeps a small one out. A row costs its steps. Among users who wait, the one who was given
the least goes first (start-time fair queueing, Goyal et al., 1996): a user who comes back after a pause begins level
with the others and has no credit, so nobody can save up turns, and one who asks for much delays nobody but himself.
Rows that take turns (`in_turn`) hold up no others.

Invariants, held by tests/rollout/test_serving_queue.py: at most `most_waiting` rows wait; every row is given out once
or dropped once; of two users of one priority who both wait and may begin, neither was given more than the other by over
one row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...utils.errors import UserError


class QueueFull(UserError):
    """Too many rows wait. `retry_after` is the number of seconds after which there is likely to be room."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class DeadlinePassed(UserError):
    """A request was not finished by its deadline; its rows are free."""

    def __init__(self) -> None:
        super().__init__("the deadline of this request passed before it was done")


@dataclass(eq=False)
class Ticket:
    """One request as the queue sees it."""

    number: int
    """In the order of arrival."""
    user: str
    rows: int
    cost: float
    """Of one row, in steps."""
    priority: int = 0
    """Higher goes first."""
    deadline: float = math.inf
    """On the engine's clock."""
    in_turn: bool = False
    """Whether its rows gain little from a small batch, and take turns where few are asked for."""
    begun: int = 0
    """Rows that have got a slot."""

    @property
    def waiting(self) -> int:
        """Rows that have not."""
        return self.rows - self.begun


class FairQueue:
    """Tickets with rows that wait for a slot."""

    def __init__(self, most_waiting: int):
        self.most_waiting = most_waiting
        self.waiting = 0
        """Rows."""
        self._tickets: list[Ticket] = []
        self._given: dict[str, float] = {}
        """Cost of what each user was given, level with the others where they began."""
        self._level = 0.0

    def __len__(self) -> int:
        return len(self._tickets)

    @property
    def cost(self) -> float:
        """Steps of all rows that wait."""
        return sum(ticket.waiting * ticket.cost for ticket in self._tickets)

    @property
    def waiting_in_turn(self) -> int:
        """Rows of `in_turn` tickets that wait."""
        return sum(ticket.waiting for ticket in self._tickets if ticket.in_turn)

    def check_room(self, rows: int, retry_after: float = 1.0) -> None:
        """Raises QueueFull where `rows` more would be too many."""
        if self.waiting + rows > self.most_waiting:
            raise QueueFull(
                f"{self.waiting} images and answers wait already and {rows} more would be over the limit of "
                f"{self.most_waiting}: ask again in about {retry_after:.0f} s",
                retry_after,
            )

    def add(self, ticket: Ticket) -> None:
        """Let a ticket wait. Raises QueueFull where its rows would be too many."""
        self.check_room(ticket.rows)
        if not any(other.user == ticket.user for other in self._tickets):
            self._given[ticket.user] = max(self._given.get(ticket.user, 0.0), self._level)
        self.waiting += ticket.rows
        self._tickets.append(ticket)

    def take(self, in_turn: bool = True) -> Ticket | None:
        """The ticket whose next row gets a slot now, None where there is none; `in_turn` ones are left out if False."""
        able = [ticket for ticket in self._tickets if in_turn or not ticket.in_turn]
        ticket = min(able, key=self._rank, default=None)
        if ticket is None:
            return None
        self._level = max(self._level, self._given[ticket.user])
        self._given[ticket.user] += ticket.cost
        ticket.begun += 1
        self.waiting -= 1
        if not ticket.waiting:
            self._tickets.remove(ticket)
        self._forget()
        return ticket

    def drop(self, ticket: Ticket) -> None:
        """The rows of a ticket that still wait do so no more."""
        if ticket in self._tickets:
            self._tickets.remove(ticket)
            self.waiting -= ticket.waiting
            self._forget()

    def _rank(self, ticket: Ticket) -> tuple[float, float, float, int]:
        return -ticket.priority, self._given[ticket.user], ticket.deadline, ticket.number

    def _forget(self) -> None:
        """Users who wait no more and had no more than others are forgotten; with nobody waiting, all are."""
        here = {ticket.user for ticket in self._tickets}
        if not here:
            self._given, self._level = {}, 0.0
            return
        self._given = {user: given for user, given in self._given.items() if user in here or given > self._level}
