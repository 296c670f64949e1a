"""A server of reward models and those who have no key: turned away, told what is wrong, and never in the way."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
import time

import httpx
import pytest
import torch

from pyunictokens.rewards import Ensemble
from pyunictokens.rewards.served.client import RemoteRewards
from pyunictokens.rewards.served.messages import (
    KEY,
    Exchange,
    encode,
    pack_batch,
)
from pyunictokens.rewards.served.server import RewardServer
from pyunictokens.utils.errors import UserError
from tests.rewards.serving import (
    SECRET,
    Does,
    ask,
    batch,
    brightness,
    proven,
    raw,
    served,
    told,
    toy_server,
)


def test_wrong_keys_and_strangers(caplog: pytest.LogCaptureFixture) -> None:
    with served() as server:
        with pytest.raises(UserError, match=f"{server.address} have another key: set {KEY}"):
            ask(server, key=b"another key of sixteen letters")
        for head in ("", "Authorization: Bearer " + SECRET.decode(), f"Authorization: Bearer {'0' * 32}.{'0' * 64}"):
            sent = (
                f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: {1 << 40}\r\n{head}".rstrip("\r\n") + "\r\n\r\n"
            )
            assert b"401" in raw(server, sent.encode()).splitlines()[0], "before a byte of the terabyte is read"
        assert "turned away" in caplog.text and SECRET.decode() not in caplog.text
        torch.testing.assert_close(ask(server).score(batch(size=4)).total, brightness(batch(size=4)))
    with pytest.raises(UserError, match="must have at least 16"):
        RewardServer(Ensemble({"it": Does(brightness)}, {"it": 1.0}), b"short")


def test_a_key_never_travels_and_a_proof_fits_one_request() -> None:
    body = encode(*pack_batch(batch(size=4)))
    headers = Exchange.begin(SECRET, "POST", "/v1/score").headers(body)
    assert SECRET.decode() not in json.dumps(headers)
    raw_headers = {name.encode(): value.encode() for name, value in headers.items()}
    assert Exchange.of(SECRET, "POST", "/v1/score", raw_headers, len(body)) is not None
    for key, method, path, length in (
        (SECRET[:-1] + b"?", "POST", "/v1/score", len(body)),
        (SECRET, "GET", "/v1/score", len(body)),
        (SECRET, "POST", "/v1/faces", len(body)),
        (SECRET, "POST", "/v1/score", len(body) + 1),
    ):
        assert Exchange.of(key, method, path, raw_headers, length) is None
    with served() as server:
        changed = bytearray(body)
        changed[-3] ^= 1
        answer = httpx.post(server.address + "/v1/score", content=bytes(changed), headers=headers)
        assert answer.status_code == 400 and "changed on its way" in answer.text


def test_messages_that_are_huge_or_garbage() -> None:
    with served() as server:
        server._limit = 1 << 16
        for garbage in (
            b"",
            b"\0" * 7,
            b"\xff" * 40,
            b"\2" + b"\0" * 7 + b"[]",
            encode({})[:-1],
            b"\5" + b"\0" * 7 + b"[" * 5,
        ):
            status, error = told(server, "/v1/score", garbage)
            assert status == 400 and "message" in error, (garbage, status, error)
        words, tensors = pack_batch(batch(size=4))
        for field, value in (("prompts", "p"), ("facts", [1]), ("correct", True), ("kind", "ghost"), ("answers", None)):
            assert field in told(server, "/v1/score", encode({**words, field: value}, tensors))[1]
        for field in ("columns",):
            assert field in told(server, "/v1/score", encode({**words, field: {"x": 1}}, tensors))[1]
        for name, tensor in (("images", torch.zeros(5, 3, 4, 4, dtype=torch.uint8)), ("references", torch.ones(2))):
            assert name in told(server, "/v1/score", encode(words, {**tensors, name: tensor}))[1]
        assert told(server, "/v1/nothing", b"")[0] == 404
        assert told(server, "/v1/about", b"")[0] == 405
        assert told(server, "/v1/score", bytes(1 << 17))[0] == 413
        for line in (
            b"\x16\x03\x01\x02\x00\x01\x00",
            b"GET / HTTP/9.9",
            b"POST /v1/\xff\xfe HTTP/1.1\r\nHost: x",
            b"POST /v1/score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked",
            b"A" * (1 << 16),
        ):
            answer = raw(server, line + b"\r\n\r\n")
            assert not answer or answer.split()[1].startswith(b"4"), answer
        torch.testing.assert_close(ask(server).score(batch(size=4)).total, brightness(batch(size=4)))


def test_random_bytes_give_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    draw = random.Random(0)
    good = encode(*pack_batch(batch(2, size=2)))
    with served() as server, httpx.Client() as client:
        for _ in range(150):
            body = bytearray(good)
            for _ in range(draw.randint(1, 6)):
                body[draw.randrange(len(body))] = draw.randrange(256)
            headers = proven(server, "/v1/score", bytes(body))
            answer = client.post(server.address + "/v1/score", content=bytes(body), headers=headers)
            assert answer.status_code in {200, 400, 422}, answer.text
        for _ in range(50):
            raw(server, draw.randbytes(draw.randint(1, 300)) + b"\r\n\r\n")
        assert ask(server).score(batch(size=4)).total.isfinite().all()
    assert "Traceback" not in caplog.text


def test_silent_connections_and_slow_ones_do_not_hold_a_server() -> None:
    with served(patience=0.6) as server:
        server.connections.most = 40
        silent = [socket.create_connection((server.host, server.port)) for _ in range(60)]
        dripping = silent[-1]
        dripping.sendall(b"POST /v1/score HTTP/1.1\r\n")
        torch.testing.assert_close(ask(server).score(batch(size=4)).total, brightness(batch(size=4)))
        assert len(server.connections.all) <= 41
        end = time.monotonic() + 10
        while len(server.connections.all) > 1 and time.monotonic() < end:  # the client's own stays
            with contextlib.suppress(OSError):
                dripping.sendall(b"a")
            time.sleep(0.1)
        assert len(server.connections.all) == 1 and not server.connections.unproven
        for one in silent:
            one.close()


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with served(slow=0.3) as server:
        body = encode(*pack_batch(batch(size=4)))
        head = "".join(f"{name}: {value}\r\n" for name, value in proven(server, "/v1/score", body).items())
        answer = raw(server, f"POST /v1/score HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode() + body[:10])
        assert b"408" in answer.splitlines()[0]


@pytest.mark.slow
def test_strangers_do_not_end_the_command_at_a_low_limit_of_files() -> None:
    """Six hundred silent connections against 128 file descriptors; then SIGTERM, with a client that reads nothing."""
    process, address = toy_server(limit_files=128)
    host, port = address.removeprefix("http://").split(":")
    silent = []
    try:
        remote = RemoteRewards([address], SECRET, 60.0, backoff=1.5)
        for number in range(600):
            with contextlib.suppress(OSError):
                silent.append(socket.create_connection((host, int(port)), 2))
            if number % 200 == 150:
                assert remote.score(batch(seed=number, kind="animal")).total.isfinite().all()
        assert process.poll() is None
        assert remote.score(batch(kind="animal")).total.isfinite().all()
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        deaf.connect((host, int(port)))
        request = "".join(
            f"{name}: {value}\r\n" for name, value in Exchange.begin(SECRET, "GET", "/v1/about").headers(b"").items()
        )
        deaf.settimeout(0.5)
        with contextlib.suppress(OSError):
            for _ in range(3000):
                deaf.sendall(f"GET /v1/about HTTP/1.1\r\nHost: x\r\n{request}\r\n".encode())
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait(10)
        for one in silent:
            one.close()
