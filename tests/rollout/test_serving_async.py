"""The engine in its thread: coroutines that wait, leave early or are cancelled, and an end that finishes what runs."""

import asyncio
import contextlib
import gc
import threading

import pytest
import torch

from pyunictokens.rollout.serving import (
    AnswerRequest,
    AsyncEngine,
    Drawn,
    Ended,
    ImageRequest,
    Preview,
    ServingEngine,
    Taken,
)
from pyunictokens.rollout.serving.asynchronous import Closing
from pyunictokens.utils.errors import UserError

from .test_serving import ENGINE, IMAGE, alone, check


def asyncs(main):
    return asyncio.run(asyncio.wait_for(main(), 300))


async def all_of(serving, request, **options):
    taken, *events = [event async for event in serving.stream(ENGINE, request, **options)]
    assert isinstance(taken, Taken) and {event.ticket for event in events} == {taken.ticket}
    return events


def test_many_coroutines_each_get_their_own():
    requests = [ImageRequest("a red ball .", steps=3, seed=seed, previews=1) for seed in range(4)]
    requests += [AnswerRequest(IMAGE, "What is it?", max_new_tokens=4, seed=seed) for seed in range(4)]

    async def main():
        async with AsyncEngine(ServingEngine(max_rows=3)) as serving:
            return await asyncio.gather(*(all_of(serving, request) for request in requests))

    for request, events in zip(requests, asyncs(main), strict=True):
        events = [event for event in events if not isinstance(event, Preview)]  # one that was late is left out
        if isinstance(request, ImageRequest):
            assert torch.equal(events[0].codes, alone(request)[0])
        else:
            check(request, events)


def test_what_cannot_be_used_is_raised_where_it_was_asked():
    async def main():
        async with AsyncEngine(ServingEngine()) as serving:
            with pytest.raises(UserError, match="steps=0"):
                await all_of(serving, ImageRequest("a red ball .", steps=0))
            with pytest.raises(UserError, match="no such model"):
                async for _ in serving.stream(no_model, ImageRequest("a red ball .")):
                    pass
            return await all_of(serving, ImageRequest("a red ball .", steps=1))

    def no_model():
        raise UserError("no such model")

    assert isinstance(asyncs(main)[0], Drawn)


@pytest.mark.parametrize("way", ["cancel", "leave"])
def test_who_leaves_gives_the_rows_back(way):
    async def main():
        async with AsyncEngine(ServingEngine(max_rows=1)) as serving:
            long = ImageRequest("a red ball .", steps=60000, previews=3)

            async def reader():
                stream = serving.stream(ENGINE, long)
                async with contextlib.aclosing(stream):
                    async for _ in stream:
                        pass

            task = asyncio.create_task(reader())
            while not serving.serving.running:
                await asyncio.sleep(0.01)
            other = asyncio.create_task(all_of(serving, ImageRequest("a red ball .", steps=2)))
            await asyncio.sleep(0.05)
            assert not other.done()
            if way == "cancel":
                task.cancel()
            else:
                await serving.call(lambda: [serving.serving.abort(0), serving._tell([Ended(0, UserError("out"))])])
            with pytest.raises((asyncio.CancelledError, UserError)):
                await task
            events = await other
            assert not serving._boxes and serving.serving.running == 0
            return events

    assert isinstance(asyncs(main)[-1], Ended)


def test_a_slow_reader_keeps_the_newest_preview_alone():
    async def main():
        async with AsyncEngine(ServingEngine()) as serving:
            stream = serving.stream(ENGINE, ImageRequest("a red ball .", steps=9, previews=8))
            first = [await anext(stream), await anext(stream)]
            while serving.serving.busy:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            return first + [event async for event in stream]

    kinds = [type(event) for event in asyncs(main)]
    assert kinds.count(Preview) <= 2 and kinds[-2:] == [Drawn, Ended]


def test_closing_finishes_what_runs_and_takes_nothing_more():
    async def main():
        serving = AsyncEngine(ServingEngine(max_rows=1))
        serving.start()
        tasks = [asyncio.create_task(all_of(serving, ImageRequest("a red ball .", steps=5, seed=i))) for i in range(3)]
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(serving.close())
        await asyncio.sleep(0)
        with pytest.raises(Closing):
            await all_of(serving, ImageRequest("a red ball ."))
        await closing
        return [await task for task in tasks]

    assert [events[-1].error for events in asyncs(main)] == [None] * 3


def test_closing_without_patience_tells_those_who_wait():
    async def main():
        serving = AsyncEngine(ServingEngine())
        serving.start()
        task = asyncio.create_task(all_of(serving, ImageRequest("a red ball .", steps=60000)))
        while not serving.serving.running:
            await asyncio.sleep(0.01)
        await serving.close(0.05)
        with pytest.raises(Closing, match="ended before it was done"):
            await task

    asyncs(main)


@pytest.mark.slow
def test_nothing_is_left_of_a_thousand_requests():
    async def main():
        async with AsyncEngine(ServingEngine(max_rows=8, max_waiting=2000)) as serving:

            async def one(number):
                stream = serving.stream(ENGINE, ImageRequest("a red ball .", steps=1 + number % 2, seed=number))
                async with contextlib.aclosing(stream):
                    async for _ in stream:
                        if number % 20 == 0:
                            return 0
                return 1

            done = await asyncio.gather(*(one(number) for number in range(1000)))
            return sum(done), dict(serving._boxes), serving.serving._jobs

    before = threading.active_count()
    done, boxes, jobs = asyncs(main)
    gc.collect()
    assert (done, boxes, jobs) == (950, {}, {}) and threading.active_count() <= before + 1
