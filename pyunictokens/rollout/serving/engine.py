"""The serving engine: requests of many users over one or several models, stepped together.

    number = serving.add_request(engine, ImageRequest("A photo of <bo>.", concept="bo"), user="ann")
    while serving.busy:
        for event in serving.step():
            ...

`step` lets waiting rows take free slots (queue.py says whose), draws one timestep of every image and one token of every
answer that is under way, and returns what happened. Rows join and leave between any two steps. A request draws what
`RolloutEngine.generate_images` and `generate_text` draw with its seed, whatever else is running: noise is keyed by the
request's seed and sample, and a row's step does not look at other rows. All of it is called from one thread;
threads and HTTP are in asynchronous.py and serve/.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

from ...models import Prefix, answering
from ...utils.errors import NotFinite, UserError
from .. import checks
from ..answers import NO_NUMBERS
from ..engine import RolloutEngine
from ..scheduler import Candidate
from .answers import Answer, AnswerLane
from .images import MixedSlots
from .jobs import Job, WantedMasks, answer_job, image_job
from .queue import DeadlinePassed, FairQueue, Ticket
from .requests import AnswerRequest, Drawn, Ended, Event, ImageRequest, Preview, Request, Written

log = logging.getLogger(__name__)

MOST_SAMPLES = 256
"""Most images or answers of one request."""

BATCH_FROM = 16
"""On a CPU: images, running and waiting, from which they are drawn side by side."""

AT_ONCE = 2
"""On a CPU: images drawn at once while there are fewer. What order gives which latency: docs/serving.md."""


@dataclass(eq=False)
class _Running:
    """One image row in its slot."""

    job: Job
    sample: int
    candidate: Candidate
    shows: list[int]
    """Steps after which it is shown, in order."""


@dataclass(eq=False)
class _Lane:
    """Images of one number of codes of one model."""

    slots: MixedSlots
    running: list[_Running] = field(default_factory=list)


@dataclass(eq=False)
class _Bench:
    """What runs of one model."""

    engine: RolloutEngine
    lanes: dict[int, _Lane] = field(default_factory=dict)
    answers: AnswerLane | None = None

    @property
    def busy(self) -> bool:
        return any(lane.running for lane in self.lanes.values()) or bool(self.answers and self.answers.rows)


class ServingEngine:
    """Runs requests over models that are already open.

    max_rows: images and answers under way at once, over all models. max_waiting: rows that may wait; `add_request`
    raises QueueFull beyond. clock: seconds, for deadlines. batch_from: on a CPU an image in a batch of few costs
    nearly what one alone costs, so side by side all are done late; with fewer images than this, running and waiting,
    two at a time are drawn. 1: always side by side, as on a GPU and as answers are everywhere.
    """

    def __init__(
        self,
        max_rows: int = 64,
        max_waiting: int = 256,
        clock: Callable[[], float] = time.monotonic,
        batch_from: int = BATCH_FROM,
    ):
        self.max_rows = checks.count("max_rows", max_rows)
        self.batch_from = checks.count("batch_from", batch_from)
        self.queue = FairQueue(checks.count("max_waiting", max_waiting))
        self._clock = clock
        self._jobs: dict[int, Job] = {}
        self._benches: dict[int, _Bench] = {}
        self._empty: WeakKeyDictionary[RolloutEngine, Prefix] = WeakKeyDictionary()
        """Unconditional prompts. They stay for as long as a model does: what is served does not learn."""
        self._free = list(range(self.max_rows))
        self._numbers = 0
        self._wanted = WantedMasks()
        self._rate = 0.0
        """Row-steps a second, lately."""
        self.row_steps = 0

    # --- what callers do ---------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._jobs)

    @property
    def running(self) -> int:
        """Rows that hold a slot."""
        return self.max_rows - len(self._free)

    @property
    def retry_after(self) -> float:
        """Seconds in which what waits now is likely to be done."""
        return min(60.0, max(1.0, self.queue.cost / self._rate)) if self._rate else 1.0

    @torch.no_grad()
    def add_request(
        self,
        engine: RolloutEngine,
        request: Request,
        *,
        user: str = "",
        priority: int = 0,
        deadline: float | None = None,
    ) -> int:
        """Check a request and let it wait; returns its number, which its events carry.

        user: whom it counts for when slots are shared out. priority: higher goes first. deadline: seconds from now.

        Raises:
            UserError: something in it cannot be used.
            QueueFull: too much waits already.
        """
        checks.count("n", request.samples, 1, min(MOST_SAMPLES, self.queue.most_waiting))
        checks.count("seed", request.seed, 0, checks.MAX_SAMPLE_ID)
        if deadline is not None and not (math.isfinite(deadline) and deadline > 0):
            raise UserError(f"deadline={deadline}: must be a number of seconds > 0")
        ends = math.inf if deadline is None else self._clock() + deadline
        self.queue.check_room(request.samples, self.retry_after)
        ticket = Ticket(self._numbers, user, request.samples, 0.0, priority, ends)
        if isinstance(request, ImageRequest):
            job = image_job(ticket, engine, request, self._wanted)
        else:
            job = answer_job(ticket, engine, request)
        self.queue.add(ticket)
        self._numbers += 1
        self._jobs[ticket.number] = job
        return ticket.number

    def abort(self, number: int) -> bool:
        """Forget a request: its rows are free at once, and no event of it comes any more. False: it has ended."""
        job = self._jobs.get(number)
        if job is None:
            return False
        self._forget(job)
        return True

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Go on by one timestep of every image and one token of every answer under way."""
        events: list[Event] = []
        begun, before = self._clock(), self.row_steps
        self._expire(events)
        self._admit(events)
        for bench in list(self._benches.values()):
            for count, lane in list(bench.lanes.items()):
                self._run_lane(bench, count, lane, events)
            if bench.answers is not None and bench.answers.rows:
                self._run_answers(bench, bench.answers, events)
            if not bench.busy:
                self._benches.pop(id(bench.engine), None)
        took = self._clock() - begun
        if took > 0 and self.row_steps > before:
            now = (self.row_steps - before) / took
            self._rate = now if not self._rate else 0.9 * self._rate + 0.1 * now
        return events

    # --- one step ----------------------------------------------------------------------------------------------------

    def _expire(self, events: list[Event]) -> None:
        now = self._clock()
        for job in [job for job in self._jobs.values() if job.ticket.deadline <= now]:
            self._fail(job, DeadlinePassed(), events)

    def _admit(self, events: list[Event]) -> None:
        """Free slots go to those whose turn it is."""
        admitted: list[tuple[Job, int]] = []
        in_turn = sum(row.job.ticket.in_turn for row in self._images())
        most = self.max_rows if in_turn + self.queue.waiting_in_turn >= self.batch_from else AT_ONCE
        while len(self._free) > len(admitted):
            ticket = self.queue.take(in_turn < most)
            if ticket is None:
                break
            in_turn += ticket.in_turn
            admitted.append((self._jobs[ticket.number], ticket.begun - 1))
        by_engine: dict[int, list[Job]] = {}
        for job, _ in admitted:
            if job.prefix is None and job not in by_engine.setdefault(id(job.engine), []):
                by_engine[id(job.engine)].append(job)
        for jobs in by_engine.values():
            try:
                self._prefill(jobs)
            except Exception as error:
                self._fail_all(jobs, error, events)
        answers: dict[int, list[int]] = {}
        for job, sample in admitted:
            if job.ticket.number not in self._jobs:
                continue  # its prefill failed
            if isinstance(job.request, ImageRequest):
                try:
                    self._seat(job, job.request, sample)
                except Exception as error:
                    self._fail_all([job], error, events)
            else:
                answers.setdefault(job.ticket.number, []).append(sample)
        for number, samples in answers.items():
            self._join(self._jobs[number], samples)

    def _prefill(self, jobs: list[Job]) -> None:
        """Prompts of images that begin now, those of one model together."""
        names = [job.request.concept for job in jobs]
        total, of_job = jobs[0].engine.prefixes([job.ids for job in jobs], names, guided=False)
        parts: dict[int, Prefix] = {}
        for job, place in zip(jobs, of_job, strict=True):
            job.prefix = parts.setdefault(place, total.select([place]))

    def _images(self) -> Iterator[_Running]:
        """Image rows that hold a slot."""
        return (row for bench in self._benches.values() for lane in bench.lanes.values() for row in lane.running)

    def _bench(self, engine: RolloutEngine) -> _Bench:
        return self._benches.setdefault(id(engine), _Bench(engine))

    def _seat(self, job: Job, request: ImageRequest, sample: int) -> None:
        bench, engine = self._bench(job.engine), job.engine
        if engine not in self._empty:
            self._empty[engine] = engine.prefixes([[]], [None], guided=False)[0]
        assert job.known is not None and job.prefix is not None and job.numbers is not None
        count, steps = len(job.known), job.numbers.steps
        lane = bench.lanes.get(count)
        if lane is None:
            slots = MixedSlots(
                engine.model,
                self._empty[engine],
                self.max_rows,
                count,
                engine.schedule,
                limit=engine.limit,
                backend=engine.ops_backend,
                head=engine.head,
            )
            lane = bench.lanes[count] = _Lane(slots)
        candidate = Candidate(-1, request.first_sample + sample, slot=self._free[-1])
        shows = [max(1, steps * (k + 1) // (request.previews + 1)) for k in range(request.previews)]
        lane.slots.seat(candidate, job.known, job.prefix, job.look, job.numbers)
        self._free.pop()
        lane.running.append(_Running(job, sample, candidate, shows))

    def _join(self, job: Job, samples: list[int]) -> None:
        request, bench = job.request, self._bench(job.engine)
        assert isinstance(request, AnswerRequest) and job.prefix is not None and job.last_hidden is not None
        if bench.answers is None:
            bench.answers = AnswerLane(answering(job.engine.model), job.engine.ops_backend)
        concept = job.engine.residents.rows(request.concept)
        settings = (request.max_new_tokens, request.temperature, request.top_k, request.seed)
        answers = [Answer(job.ticket.number, its, its, *settings, concept, self._free.pop()) for its in samples]
        bench.answers.join(answers, job.prefix, job.last_hidden)

    def _run_lane(self, bench: _Bench, count: int, lane: _Lane, events: list[Event]) -> None:
        jobs = [row.job for row in lane.running]
        try:
            if jobs:  # none where all were aborted
                events += self._draw(bench, lane)
        except Exception as error:  # of this batch: the others go on
            self._free += [row.candidate.slot for row in lane.running]
            lane.running = []
            self._fail_all(jobs, error, events)
        if not lane.running:
            del bench.lanes[count]

    def _run_answers(self, bench: _Bench, lane: AnswerLane, events: list[Event]) -> None:
        rows = list(lane.rows)
        try:
            lane.step()
        except Exception as error:
            bench.answers = None
            self._free += [row.slot for row in rows]
            self._fail_all([self._jobs[row.ticket] for row in rows], error, events)
            return
        self.row_steps += len(rows)
        self._write(lane, rows, events)

    def _draw(self, bench: _Bench, lane: _Lane) -> list[Event]:
        """One timestep of all images of a lane."""
        lane.slots.run([row.candidate for row in lane.running])
        self.row_steps += len(lane.running)
        shown: list[_Running] = []
        done: list[_Running] = []
        for row in lane.running:
            row.candidate.step += 1
            assert row.job.numbers is not None
            if row.candidate.step == row.job.numbers.steps:
                done.append(row)
            elif row.shows and row.candidate.step >= row.shows[0]:
                shown.append(row)
        if not (shown or done):
            return []
        if done and not lane.slots.finite:
            raise NotFinite(NO_NUMBERS)
        events: list[Event] = []
        for row in (
            done + shown
        ):  # each alone: a decoder rounds otherwise in other batches, and the picture would differ
            codes, request = lane.slots.look([row.candidate]), row.job.request
            pixels = bench.engine.pixels(codes, row.job.grid, of="decode").float().cpu()[0]
            number = row.job.ticket.number
            if row in done:
                events.append(Drawn(number, row.sample, codes.cpu()[0], pixels))
            else:
                assert isinstance(request, ImageRequest)
                row.shows.pop(0)
                events.append(Preview(number, row.sample, request.previews - len(row.shows) - 1, pixels))
        self._leave(lane, done)
        for row in done:
            self._row_ended(row.job, events)
        return events

    def _write(self, lane: AnswerLane, rows: list[Answer], events: list[Event]) -> None:
        """What one token of all answers of a model, `rows`, did."""
        for row in rows:
            if row.done:
                self._free.append(row.slot)
            job = self._jobs.get(row.ticket)
            if job is None:
                continue  # another of its answers failed
            request = job.request
            assert isinstance(request, AnswerRequest)
            if not row.finite:
                self._fail(job, NotFinite(NO_NUMBERS), events)
            elif row.done or request.streamed:
                tokenizer = job.engine.residents.tokenizer(request.concept)
                text = "" if tokenizer is None else tokenizer.decode(row.tokens)
                cut = row.done and row.tokens[-1] != lane.model.end_id
                assert job.prefix is not None
                tokens, context = tuple(row.tokens), job.prefix.lengths[0]
                events.append(Written(row.ticket, row.sample, text, tokens, row.done, cut, context))
            if row.done and row.ticket in self._jobs:
                self._row_ended(job, events)

    # --- ends --------------------------------------------------------------------------------------------------------

    def _leave(self, lane: _Lane, rows: Iterable[_Running]) -> None:
        gone = list(rows)
        lane.slots.leave([row.candidate.slot for row in gone])
        self._free += [row.candidate.slot for row in gone]
        lane.running = [row for row in lane.running if row not in gone]

    def _row_ended(self, job: Job, events: list[Event]) -> None:
        job.left -= 1
        if not job.left:
            del self._jobs[job.ticket.number]
            events.append(Ended(job.ticket.number))

    def _fail_all(self, jobs: Iterable[Job], error: Exception, events: list[Event]) -> None:
        if not isinstance(error, UserError):
            log.error("a batch failed", exc_info=error)
        for job in jobs:
            if job.ticket.number in self._jobs:
                self._fail(job, error, events)

    def _fail(self, job: Job, error: Exception, events: list[Event]) -> None:
        self._forget(job)
        events.append(Ended(job.ticket.number, error))

    def _forget(self, job: Job) -> None:
        """Take all rows of a request out, wherever they are."""
        number = job.ticket.number
        del self._jobs[number]
        self.queue.drop(job.ticket)
        bench = self._benches.get(id(job.engine))
        if bench is None:
            return
        for lane in bench.lanes.values():
            mine = [row for row in lane.running if row.job is job]
            if mine:
                self._leave(lane, mine)
        if bench.answers is not None:
            own = [row for row in bench.answers.rows if row.ticket == number]
            if own:
                bench.answers.leave(own)
                self._free += [row.slot for row in own]
        if not bench.busy:
            self._benches.pop(id(job.engine), None)

    def concepts_in_use(self, engine: RolloutEngine) -> set[str]:
        """Resident concepts of `engine` that a request under way, or waiting, is read with: they must stay."""
        names = (job.request.concept for job in self._jobs.values() if job.engine is engine)
        return {name for name in names if name is not None}
