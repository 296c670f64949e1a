"""Models that are opened while others are asked for."""

import asyncio
import threading
import time

import pytest

from pyunictokens.serve.catalog import Catalog
from pyunictokens.serve.drawing import Drawing
from pyunictokens.serve.forms import ImageForm
from pyunictokens.serve.gate import About
from pyunictokens.serve.keys import Client, KeySettings
from pyunictokens.serve.metrics import Metrics
from pyunictokens.serve.pictures import Pictures
from pyunictokens.serve.workers import Workers

from .world import concept_run, weights_run


@pytest.fixture
def catalog(tmp_path):
    weights_run(tmp_path / "ann")
    return Catalog(folder=tmp_path, device="cpu")


def test_who_waits_for_a_model_that_is_read_holds_up_nobody_else(catalog, monkeypatch):
    """More of them than asyncio has threads for everybody."""
    catalog.open("base")
    go_on, read = threading.Event(), catalog._with_weights

    def slow(name, run):
        go_on.wait(60)
        return read(name, run)

    monkeypatch.setattr(catalog, "_with_weights", slow)

    async def main():
        waiting = [asyncio.create_task(catalog.opened("ann")) for _ in range(40)]
        await asyncio.sleep(0.1)
        try:
            base = await asyncio.wait_for(catalog.opened("base"), 20)
        finally:
            go_on.set()
        assert base.name == "base" and not any(task.done() for task in waiting)
        assert len({id(served) for served in await asyncio.gather(*waiting)}) == 1

    asyncio.run(main())


def test_a_model_is_read_once_however_many_ask_at_once(catalog, monkeypatch):
    readers, read, lock = [], catalog._with_weights, catalog._lock

    def counted(name, run):
        readers.append(threading.current_thread())
        return read(name, run)

    class Slow:
        """The reader is slow to tell others what it has read."""

        def __enter__(self):
            if threading.current_thread() in readers:
                time.sleep(0.3)
            lock.acquire()

        def __exit__(self, *_):
            lock.release()

    monkeypatch.setattr(catalog, "_with_weights", counted)
    monkeypatch.setattr(catalog, "_lock", Slow())
    threads = [threading.Thread(target=catalog.open, args=("ann",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(readers) == 1


def test_usage_counts_a_concepts_tokens_also_when_it_has_made_room(tmp_path):
    concept_run(tmp_path / "bo", "bo")
    catalog = Catalog(folder=tmp_path, device="cpu")
    parts = Workers([]), Pictures(), Metrics(Workers([])), False
    drawing, about = Drawing(catalog, *parts), About("1", Client(KeySettings()))
    asked = asyncio.run(drawing.ask(ImageForm(model="bo", prompt="a photo of <bo>."), about))
    engine = catalog.seat(asked.served)
    ids = engine.residents.read("prompt", [asked.request.prompt], ["bo"])[0][0]
    assert drawing._usage(asked, 1)["input_tokens"] == len(ids)
    engine.remove_concept("bo")
    assert drawing._usage(asked, 1)["input_tokens"] == len(ids)
