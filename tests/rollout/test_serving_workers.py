"""Images drawn by several workers: each by one at a time, at once, and as one worker draws them."""

import threading
import time

import pytest
import torch

from pyunictokens import RolloutEngine
from pyunictokens.rollout.serving import AsyncEngine, DeadlinePassed, Drawn, Ended, ImageRequest, ServingEngine
from pyunictokens.rollout.serving.workers import MOST, SMALL, Workers, fitting
from pyunictokens.toy.model import load_toy
from pyunictokens.utils.errors import NotFinite, UserError

from .test_resident_concepts import resident_engine, worded_model, words
from .test_serving import IMAGE, AnswerRequest, run

TWO = 2


def red(seed=0, steps=3, **more):
    return ImageRequest("a red ball .", steps=steps, seed=seed, **more)


class Gate:
    """A model whose steps wait at a door, and tell who is there."""

    def __init__(self, pass_by=frozenset()):
        self.model = worded_model()
        self.engine = resident_engine(self.model, tokenizer=words())
        self.inside, self.most, self.threads = 0, 0, set()
        self._lock, self._plain = threading.Lock(), self.model.image_hidden
        self.both = threading.Barrier(TWO, timeout=30)
        self.meet = True
        self.model.image_hidden = self._hidden

    def _hidden(self, codes, *rest):
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.threads.add((threading.current_thread().name.rsplit("_", 1)[0], torch.get_num_threads()))
        try:
            if self.meet:
                self.both.wait()
            return self._plain(codes, *rest)
        finally:
            with self._lock:
                self.inside -= 1


def test_two_images_are_drawn_at_once_each_by_a_worker_with_its_part_of_the_threads():
    door, threads = Gate(), torch.get_num_threads()
    serving = ServingEngine(workers=TWO)
    numbers = [serving.add_request(door.engine, red(seed)) for seed in range(2)]
    events = run(serving)  # each step needs the other one to come to the barrier
    assert [event.ticket for event in events if isinstance(event, Ended)] in (numbers, numbers[::-1])
    each = max(1, threads // TWO)
    assert door.most == TWO and door.threads == {("draws-0", each), ("draws-1", each)}
    assert torch.get_num_threads() == threads, "nobody else's number of threads changes"


def test_a_third_image_waits_and_an_image_does_not_wait_for_anothers_end():
    door = Gate()
    door.meet = False
    serving, held, ended = ServingEngine(workers=TWO), set(), []
    for seed, steps in enumerate((9, 2, 2)):
        serving.add_request(door.engine, red(seed, steps))
    while serving.busy:
        ended += [event.ticket for event in serving.step() if isinstance(event, Ended)]
        held.add(serving.running)
    assert door.most <= TWO and max(held) == TWO and set(ended) == {0, 1, 2}
    assert ended[0] == 1


def test_many_images_are_shared_out_evenly():
    door, sizes = Gate(), []
    door.meet = False
    plain = door.model.image_hidden
    door.model.image_hidden = lambda codes, *rest: sizes.append(len(codes)) or plain(codes, *rest)
    serving = ServingEngine(workers=TWO, batch_from=4)
    for seed in range(8):
        serving.add_request(door.engine, red(seed, steps=2, guidance_scale=0.0))
    events = run(serving)
    assert sum(isinstance(event, Drawn) for event in events) == 8
    assert sizes.count(4) == 2, "the second step of four rows each; the first is one look a prompt"


def test_answers_do_not_wait_for_workers():
    door = Gate()
    serving = ServingEngine(workers=TWO)
    image = serving.add_request(door.engine, red())
    answer = serving.add_request(door.engine, AnswerRequest(IMAGE, "What is it?", max_new_tokens=3))
    ended = []
    while answer not in ended:
        ended += [event.ticket for event in serving.step() if isinstance(event, Ended)]
    assert image not in ended, "it stands at the door"
    door.meet = False
    door.both.abort()
    with pytest.raises(threading.BrokenBarrierError):
        raise next(event.error for event in run(serving) if isinstance(event, Ended))


@pytest.mark.parametrize("way", ["abort", "deadline"])
def test_what_ends_while_its_worker_is_at_it_leaves_nothing(way):
    now, door = [0.0], Gate()
    door.meet = False
    serving = ServingEngine(workers=TWO, clock=lambda: now[0])
    gone = serving.add_request(door.engine, red(0, 50), deadline=5.0)
    stays = serving.add_request(door.engine, red(1, 4))
    events = serving.step(0.0)
    assert serving.running == TWO
    if way == "abort":
        assert serving.abort(gone) and serving.running == 1
    else:
        now[0] = 6.0
    events += run(serving)
    errors = [event.error for event in events if isinstance(event, Ended) and event.ticket == gone]
    assert [type(error) for error in errors] == ([] if way == "abort" else [DeadlinePassed])
    assert [event.ticket for event in events if isinstance(event, Drawn)] == [stays]
    assert not serving._benches and len(serving._free) == serving.max_rows


def test_the_last_request_can_be_aborted_while_its_worker_is_at_it():
    door = Gate()
    door.meet = False
    serving = ServingEngine(workers=TWO)
    number = serving.add_request(door.engine, red(0, 50))
    serving.step(0.0)
    assert serving.abort(number)
    assert not serving.busy and not serving._benches and serving.step() == []


def test_a_worker_that_fails_fails_its_own_images_alone():
    good, bad = resident_engine(worded_model(), tokenizer=words()), resident_engine(worded_model(), tokenizer=words())
    plain = bad.model.image_hidden
    bad.model.image_hidden = lambda *rest: plain(*rest) * float("nan")
    serving = ServingEngine(workers=TWO)
    numbers = {serving.add_request(engine, red(seed)): engine for seed, engine in enumerate((good, bad, good, bad))}
    ended = {event.ticket: event.error for event in run(serving) if isinstance(event, Ended)}
    assert {number: type(error) for number, error in ended.items()} == {
        number: NotFinite if engine is bad else type(None) for number, engine in numbers.items()
    }
    assert not serving._benches and len(serving._free) == serving.max_rows


def test_a_picture_is_the_same_whichever_worker_draws_it_and_whatever_the_other_does():
    engine = RolloutEngine.of(load_toy())
    requests = [ImageRequest("a red star", steps=1, grid=(1, 2), seed=seed) for seed in range(3)]

    def pictures(some, workers=TWO):
        serving = ServingEngine(workers=workers)
        numbers = [serving.add_request(engine, request) for request in some]
        drawn = {event.ticket: event for event in run(serving) if isinstance(event, Drawn)}
        return [drawn[number] for number in numbers]

    together, one = pictures(requests), pictures(requests, workers=1)
    for request, drawn, plain in zip(requests, together, one, strict=True):
        assert torch.equal(drawn.pixels, pictures([request])[0].pixels)
        assert torch.equal(drawn.codes, plain.codes)


def test_a_request_that_comes_while_all_workers_are_at_work_is_heard_at_once():
    import asyncio

    door = Gate()

    async def ask(engine, seed):
        return [event async for event in engine.stream(door.engine, red(seed, steps=2))]

    async def both():
        async with AsyncEngine(ServingEngine(workers=TWO)) as engine:
            first = asyncio.create_task(ask(engine, 0))
            while not door.inside:  # its worker stands at the barrier, which opens for two
                await asyncio.sleep(0.01)
            return await asyncio.wait_for(asyncio.gather(first, ask(engine, 1)), 30)

    assert all(isinstance(events[-1], Ended) for events in asyncio.run(both()))


def test_how_many_workers_suit_a_model():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert fitting(cpu, SMALL, 1) == 1 and fitting(cpu, SMALL, 2) == fitting(cpu, SMALL, 64) == MOST == TWO
    assert fitting(cpu, SMALL + 1, 64) == fitting(gpu, 1, 64) == 1
    engine = resident_engine(worded_model(), tokenizer=words())
    serving = ServingEngine(workers=None)
    serving.add_request(engine, red())
    assert serving.workers == min(MOST, torch.get_num_threads())
    run(serving)


def test_a_wait_for_workers_ends_when_it_is_told_to():
    workers, began = Workers(1, 1), time.monotonic()
    workers.wait(0.01)
    workers.wake()
    workers.wait()
    assert time.monotonic() - began < 5
    door = threading.Event()
    task = workers.submit(0, lambda: door.wait(30) and torch.is_grad_enabled())
    assert not task.done
    door.set()
    task.settle()
    assert task.done and task.result() is False


@pytest.mark.parametrize("workers", [0, -1, 1000, 1.5])
def test_workers_must_be_a_number_of_them(workers):
    with pytest.raises(UserError, match="workers"):
        ServingEngine(workers=workers)
