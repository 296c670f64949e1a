"""Several processes behind one server: the same pictures whichever draws, errors and ends as with one."""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import httpx
import openai
import pytest
import torch

from pyunictokens.rollout.serving import Drawn, ImageRequest, ServingEngine
from pyunictokens.serve.catalog import CatalogSettings
from pyunictokens.serve.server import ServerSettings
from pyunictokens.serve.workers import Child, EngineSettings, OwnProcess, Workers, shared_out
from pyunictokens.utils.errors import UserError

from .test_bad_input import DRAW, told, wait_until
from .test_server import PROMPT, picture
from .world import concept_run, running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    concept_run(folder / "bo", "bo", 1)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    settings = ServerSettings(port=0, workers=2, max_rows=4, max_waiting=4)
    with running(folder, settings=settings) as server:
        wait_until(lambda: server.workers.ready == 2, 120)
        yield server


@pytest.fixture
def child(server):
    """The second process alone: what the first would draw waits."""
    own, child = server.workers._workers
    own.rows += 1000
    yield child
    own.rows -= 1000


def drawn(server, seed, **more):
    body = {
        "model": "bo",
        "prompt": "a photo of <bo>.",
        "seed": seed,
        "steps": 2,
        "response_format": "b64_json",
        **more,
    }
    answer = httpx.post(server.address + DRAW, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return [each["b64_json"] for each in answer.json()["data"]]


def test_a_seed_draws_the_same_in_every_process(server, child):
    there = [drawn(server, seed, n=2) for seed in range(3)]
    child.rows += 2000
    here = [drawn(server, seed, n=2) for seed in range(3)]
    child.rows -= 2000
    assert there == here and there[0] != there[1]


def test_requests_are_shared_out(server):
    seen = set()

    def look(end):
        while not end.is_set():
            seen.add(tuple(worker.rows for worker in server.workers._workers))
            time.sleep(0.005)

    end = threading.Event()
    thread = threading.Thread(target=look, args=(end,))
    thread.start()
    with ThreadPoolExecutor(4) as pool:
        pictures = list(pool.map(lambda seed: drawn(server, seed, steps=12)[0], range(4)))
    end.set()
    thread.join()
    assert (2, 2) in seen and max(max(each) for each in seen) == 2
    assert len(set(pictures)) == 4 and all(worker.rows == 0 for worker in server.workers._workers)
    text = httpx.get(f"{server.address}/metrics").text
    assert "pyunictokens_workers 2.0" in text


def test_pictures_are_shown_while_another_process_draws_them(server, child):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        events = list(
            client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={"steps": 6, "seed": 3})
        )
    assert [event.type.rsplit(".", 1)[1] for event in events][-1] == "completed" and len(events) >= 2
    assert picture(events[-1].b64_json).size == (64, 64)


def test_errors_of_another_process_keep_status_and_words(server, child):
    """What the engine refuses, an over-long prompt, a full queue, a deadline."""
    post = lambda **body: httpx.post(server.address + DRAW, json=body, timeout=60)  # noqa: E731
    told(post(prompt="a red cat " * 200), 400, "tokens")
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(post, prompt=PROMPT, n=4, steps=1000, deadline=3.0)
        wait_until(lambda: child.state.running == 2 and child.state.waiting == 2)
        refused = post(prompt=PROMPT, n=3)
    told(refused, 429, "wait", "rate_limit_error", code="rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) >= 1
    told(slow.result(), 408, "deadline", code="deadline_passed")
    told(post(prompt=PROMPT, size="100x64"), 400, "size=100x64")
    told(post(prompt=PROMPT, model="nobody"), 404, "nobody", code="model_not_found")


def test_a_client_that_goes_away_frees_its_rows_in_another_process(server, child):
    body = '{"prompt": "a photo of a red cat.", "steps": 1000, "n": 2}'
    head = f"POST {DRAW} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(f"{head}\r\n\r\n{body}".encode())
        wait_until(lambda: child.state.running == 2)
    wait_until(lambda: not child.state.running and not child.rows)


def test_a_process_that_dies_is_started_again(server, child, caplog):
    answers = []
    ask = lambda: answers.append(httpx.post(server.address + DRAW, json={"prompt": PROMPT, "steps": 1000}, timeout=60))  # noqa: E731
    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: child.state.running)
    with caplog.at_level(logging.ERROR, "pyunictokens.serve.workers"):
        os.kill(child._process.pid, signal.SIGKILL)
        thread.join(60)
        assert not child.ready
    told(answers[0], 503, "ask again", "server_error", code="worker_ended")
    assert answers[0].headers["retry-after"] == "1"
    assert "worker 1 ended (exit code -9) with 1 requests: it is started again" in caplog.text
    assert drawn(server, 5), "the other one draws meanwhile"
    wait_until(lambda: child.ready, 120)
    assert child.rows == 0 and drawn(server, 5)


def test_a_process_that_cannot_start_is_not_tried_for_ever(folder, caplog):
    async def main():
        child = Child(7, EngineSettings(CatalogSettings(folder=folder / "gone"), 4, 4, 1))
        child.start()
        while child._process.is_alive():
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        assert not child.ready and not child._process.is_alive()
        await child.close(1.0)

    with caplog.at_level(logging.ERROR, "pyunictokens.serve.workers"):
        asyncio.run(main())
    assert "worker 7 ended (exit code 1) with 0 requests before it was ready: the others go on" in caplog.text


def test_processes_end_with_the_server(folder, tmp_path):
    """Also where it is killed: nothing is left that holds a device."""
    code = """
import pathlib, sys, time
from pyunictokens.serve.server import ServerSettings
from tests.serve.world import running

if __name__ == "__main__":
    with running(pathlib.Path(sys.argv[1]), settings=ServerSettings(port=0, workers=2)) as server:
        while server.workers.ready < 2:
            time.sleep(0.05)
        print(server.workers._workers[1]._process.pid, flush=True)
        time.sleep(600)
"""
    script = tmp_path / "server.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
        parent.wait()

        def gone():
            try:
                os.kill(child, 0)
            except ProcessLookupError:
                return True
            with open(f"/proc/{child}/stat") as file:
                return file.read().split(")")[1].split()[0] == "Z"

        wait_until(gone, 60)


def test_what_runs_is_finished_at_the_end(folder):
    """The child is given time; nothing more is taken."""

    async def main():
        settings = EngineSettings(CatalogSettings(folder=folder, device="cpu"), 4, 4, 1, threads=1)
        serving = ServingEngine(4, 4)
        catalog = settings.catalog.open(serving)
        child = Child(1, settings)
        workers = Workers([OwnProcess(catalog, serving), child])
        workers.start()
        while workers.ready < 2:
            await asyncio.sleep(0.05)
        workers._workers[0].rows += 100
        served = catalog.open("base")
        request = ImageRequest(PROMPT, steps=60, seed=1)
        stream = workers.stream(served, request, user="", priority=0, deadline=None)
        async with aclosing(stream) as events:
            await anext(events)
            closing = asyncio.create_task(child.close(60.0))
            found = [event async for event in events if isinstance(event, Drawn)]
        await closing
        assert len(found) == 1 and child._process.exitcode == 0

    asyncio.run(main())


def test_of_two_that_are_idle_the_child_draws():
    class Named(OwnProcess):
        def __init__(self, name):
            self.name, self.rows = name, 0

        async def stream(self, *_, **__):
            yield self.name

    async def first(workers):
        stream = workers.stream(None, ImageRequest(PROMPT), user="", priority=0, deadline=None)
        async with aclosing(stream) as events:
            return await anext(events)

    own, child = Named("own"), Named("child")
    assert asyncio.run(first(Workers([own, child]))) == "child"
    child.rows = 1
    assert asyncio.run(first(Workers([own, child]))) == "own"


def test_workers_are_given_devices(monkeypatch, folder):
    settings = EngineSettings(CatalogSettings(folder=folder, device="cpu"), 4, 4, 1)
    monkeypatch.setattr("pyunictokens.serve.workers.usable_cores", lambda: 8)
    assert shared_out(settings, 1) == [settings]
    assert [each.threads for each in shared_out(settings, 3)] == [2, 2, 2]
    assert [each.threads for each in shared_out(settings, 9)] == [1] * 9
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def on(device):
        return EngineSettings(CatalogSettings(folder=folder, device=device), 4, 4, 1)

    for device in ("auto", "cuda"):
        assert [each.catalog.device for each in shared_out(on(device), 2)] == ["cuda:0", "cuda:1"]
    with pytest.raises(UserError, match=r"--workers 3: torch sees 2 GPUs here, and each worker needs one"):
        shared_out(on("auto"), 3)
    with pytest.raises(UserError, match=r"--workers 2 with --device cuda:1: leave out the number"):
        shared_out(on("cuda:1"), 2)
