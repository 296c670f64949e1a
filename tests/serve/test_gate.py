"""Who stands before the server without a key, and what stands between it and its clients."""

import asyncio
import contextlib
import gc
import socket
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from PIL import Image

from pyunictokens.rewards.served.connections import Connections
from pyunictokens.serve import pictures
from pyunictokens.serve.app import _events
from pyunictokens.serve.catalog import Catalog
from pyunictokens.serve.gate import Gate, GateLimits
from pyunictokens.serve.keys import Keys
from pyunictokens.serve.metrics import Metrics
from pyunictokens.serve.server import ServerSettings
from pyunictokens.serve.workers import Workers

from .test_bad_input import ANN, DRAW, keys, told, wait_until
from .test_server import PROMPT, file_of
from .world import running

HEAD = {"authorization": f"Bearer {ANN}"}
PATIENCE = 0.3


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(
        tmp_path_factory.mktemp("runs"), keys(), ServerSettings(port=0, batch_from=1, patience=PATIENCE)
    ) as server:
        yield server


def is_open(sock):
    """Whether the server has not closed a connection."""
    sock.settimeout(0.2)
    with contextlib.suppress(TimeoutError):
        try:
            while sock.recv(1 << 16):
                pass
        except ConnectionError:
            pass
        return False
    return True


def test_a_proxy_that_names_its_client_does_not_cut_long_requests(server):
    """As nginx does on the same machine: the connection that has shown its key is the proxy's."""
    begun = time.monotonic()
    body, head = {"prompt": PROMPT, "steps": 40}, {**HEAD, "x-forwarded-for": "203.0.113.9"}
    assert httpx.post(server.address + DRAW, json=body, headers=head, timeout=100).status_code == 200
    assert time.monotonic() - begun > PATIENCE, "too quick to say anything"


def test_who_has_no_key_cannot_keep_others_from_sending(server):
    with contextlib.ExitStack() as held:
        for _ in range(16):
            sock = held.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            sock.sendall(b"POST /health HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{")
        body = {"prompt": PROMPT, "steps": 1}
        assert httpx.post(server.address + DRAW, json=body, headers=HEAD, timeout=20).status_code == 200


def test_asking_whether_it_is_there_proves_nothing(server):
    """Else whoever has no key could hold as many connections as there may be."""
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\nGET /health")
        assert is_open(sock)
        time.sleep(PATIENCE)
        assert not is_open(sock)


def test_few_pictures_are_decoded_at_once_however_many_are_sent(server, monkeypatch):
    """A file of a few kilobytes may hold a picture of a hundred megabytes: it is decoded when its model is at hand."""
    decoded, opened, alive, counts = pictures.read_image_bytes, Catalog.opened, [], []

    def counted(*given):
        image = decoded(*given)
        alive.append(weakref.ref(image))
        counts.append(sum(each() is not None for each in alive))
        return image

    async def slow(catalog, name):
        await asyncio.sleep(1.0)
        return await opened(catalog, name)

    monkeypatch.setattr(pictures, "read_image_bytes", counted)
    monkeypatch.setattr(Catalog, "opened", slow)
    image = Image.new("RGBA", (64, 64), "red")
    image.paste((0, 0, 0, 0), (0, 0, 64, 32))

    def edit(_):
        data, files = {"prompt": PROMPT, "steps": "1"}, {"image": file_of(image)}
        return httpx.post(server.address + "/v1/images/edits", data=data, files=files, headers=HEAD, timeout=100)

    with ThreadPoolExecutor(12) as threads:
        assert [answer.status_code for answer in threads.map(edit, range(12))] == [200] * 12
    assert len(counts) == 12 and max(counts) <= 4


def test_a_stream_that_is_not_taken_ends_at_once():
    """Not when Python next looks for garbage: until then its images would be drawn on."""
    ended = []

    async def numbers():
        try:
            while True:
                yield "x"
        finally:
            ended.append(True)

    async def handler(scope, receive, send):
        await (await _events(numbers()))(scope, receive, send)

    async def main():
        sent, bodies = [], [{"type": "http.request", "body": b""}]

        async def send(message):
            sent.append(message)
            await asyncio.sleep(60 if len(sent) > 3 else 0)

        async def receive():
            if not bodies:
                await asyncio.sleep(60)
            return bodies.pop()

        gate = Gate(handler, Keys([]), Metrics(Workers([])), Connections(1.0, 9), GateLimits(slow=0.2))
        await gate({"type": "http", "method": "POST", "path": "/v1/x", "headers": [], "client": None}, receive, send)
        assert ended

    gc.disable()
    try:
        asyncio.run(main())
    finally:
        gc.enable()


def test_bodies_of_requests_under_way_have_a_limit_together(tmp_path):
    gate = GateLimits(body=1000, bodies=1500)
    with running(tmp_path, settings=ServerSettings(port=0, gate=gate)) as server, ThreadPoolExecutor(1) as thread:
        ask = lambda **more: httpx.post(server.address + DRAW, json={"prompt": PROMPT, **more}, timeout=100)  # noqa: E731
        assert ask(steps=1).status_code == 200  # the model is open
        long = thread.submit(ask, steps=100, user="x" * 800)
        wait_until(lambda: server.workers.running)
        told(ask(user="x" * 800), 429, "the limit is 1500", "rate_limit_error", code="rate_limit_exceeded")
        assert ask(steps=1).status_code == 200 == long.result().status_code == ask(steps=1, user="x" * 800).status_code
