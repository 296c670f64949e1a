"""Experts served by another process: the same values as at home, and every way in which the two can lose each other."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from pyunictokens.models.bundle import Sources
from pyunictokens.rewards import Ensemble, EnsembleScore, RewardBatch
from pyunictokens.rewards.served.client import RemoteRewards, parse_addresses
from pyunictokens.rewards.served.messages import (
    KEY,
    KEY_FILE,
    Exchange,
    decode,
    encode,
    pack_batch,
    read_key,
    unpack_batch,
)
from pyunictokens.rewards.served.server import RewardServer
from pyunictokens.runs.bundle import load_scorers
from pyunictokens.toy.rewards import load_toy_rewards
from pyunictokens.utils.errors import UserError
from tests.toy.test_rewards import human_batch

SECRET = b"a key of more than sixteen letters"
Score = Callable[[RewardBatch], Tensor]


class Does:
    """An expert that does what it was told to."""

    def __init__(self, score: Score):
        self.score = score


def brightness(batch: RewardBatch) -> Tensor:
    return batch.images.mean(dim=(1, 2, 3))


def batch(rows: int = 5, seed: int = 0, kind: str = "human", size: int = 64) -> RewardBatch:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.rand(rows + 3, 3, size, size, generator=draw) * 2 - 1
    return RewardBatch(
        pixels[:rows],
        [f"a red circle, number {row}" for row in range(rows)],
        ["the toy is a ball", "", "ö“ \n", "a hat", "sand"][:rows],
        ["its toy is a red ball", "it lives on sand"],
        1,
        pixels[rows:],
        kind,
    )


@contextmanager
def running(server: RewardServer) -> Iterator[RewardServer]:
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join(10)


def served(score: Score = brightness, port: int = 0, **more: Any) -> AbstractContextManager[RewardServer]:
    return running(RewardServer(Ensemble({"it": Does(score)}, {"it": 1.0}), SECRET, port=port, **more))


def ask(*servers: RewardServer, timeout: float = 20.0, key: bytes = SECRET) -> RemoteRewards:
    return RemoteRewards([server.address for server in servers], key, timeout, backoff=0.05)


def toy_server(port: int = 0, limit_files: int | None = None) -> tuple[subprocess.Popen[str], str]:
    """The command, and the address it says it listens at."""
    command = [sys.executable, "-m", "pyunictokens", "experts", "serve", "--device", "cpu", "--port", str(port)]
    if limit_files is not None:
        command = ["sh", "-c", f'ulimit -n {limit_files}; exec "$@"', "sh", *command]
    environment = {**os.environ, KEY: SECRET.decode(), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.readline()
    assert said.startswith("http://127.0.0.1:") and "ber, der, fer, tier on cpu" in said, said
    return process, said.partition(": ")[0]


def test_the_command_serves_the_toy_and_outlives_kill_and_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values as at home; kill -9 is an error that names the address; a server that is back is used again."""
    monkeypatch.setenv(KEY, SECRET.decode())
    home = load_toy_rewards()
    process, address = toy_server()
    try:
        found = load_scorers(Sources(), "cpu", address, trust=True)
        assert found is not None and found.reader is not None and found.image_text is not None
        remote, torch_threads = found.ensemble, torch.get_num_threads()
        torch.set_num_threads(1)
        for given in (human_batch(1), batch(seed=2, kind="animal"), human_batch(3)):
            here, there = home.ensemble.score(given), remote.score(given)
            torch.testing.assert_close(there.total, here.total, rtol=0, atol=1e-6)
            assert list(there.parts) == list(here.parts) and there.no_face == here.no_face
            for name, value in here.parts.items():
                torch.testing.assert_close(there.parts[name], value, rtol=0, atol=1e-6)
        prompts, index = ["a red circle", "a blue star"], torch.tensor([1, 0, 1, 1, 0])
        pixels = batch().images * 1.2  # decoders overshoot
        judged = found.preview_scorer(prompts)(pixels, index)
        torch.testing.assert_close(judged, home.preview_scorer(prompts)(pixels, index), rtol=0, atol=1e-6)
        assert found.face_embedding is not None
        faces = found.face_embedding(given.references)
        torch.testing.assert_close(faces, home.nets.face(given.references)[1], rtol=0, atol=1e-5)
        assert set(remote.throughput()) == {"tier", "ber", "der", "fer"}
        with pytest.raises(UserError) as error:
            remote.score(RewardBatch(given.images, given.prompts, kind="human"))
        with pytest.raises(UserError) as at_home:
            home.ensemble.score(RewardBatch(given.images, given.prompts, kind="human"))
        assert str(error.value) == str(at_home.value)
        torch.set_num_threads(torch_threads)

        process.kill()
        process.wait(10)
        remote.backoff = 0.05
        with pytest.raises(UserError, match=f"reward models at {address} .* are lost.*--resume"):
            remote.score(given)
        assert remote.throughput() == {}
        process, again = toy_server(int(address.rpartition(":")[2]))
        assert again == address
        torch.testing.assert_close(remote.score(given).total, there.total, rtol=0, atol=1e-6)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0, "a scheduler's SIGTERM is a good end"
    finally:
        process.kill()
        process.wait(10)


def test_two_clients_and_one_device() -> None:
    """Answers go to those who asked, and never two requests are at work at once."""
    at_work: list[int] = []
    most = [0]

    def slow(given: RewardBatch) -> Tensor:
        at_work.append(1)
        most[0] = max(most[0], len(at_work))
        time.sleep(0.01)
        at_work.pop()
        return brightness(given)

    with served(slow) as server:
        clients = [ask(server), ask(server)]
        asked = [(batch(3, seed, size=4), clients[seed % 2]) for seed in range(12)]
        futures = [client.submit(given) for given, client in asked]
        for (given, _), future in zip(asked, futures, strict=True):
            torch.testing.assert_close(future.result(10).total, brightness(given), rtol=0, atol=0)
        assert most == [1]


def test_submit_returns_at_once_and_two_servers_work_side_by_side() -> None:
    both = threading.Barrier(2)

    def meets(given: RewardBatch) -> Tensor:
        both.wait(10)  # passes only while the other server is at work too
        return brightness(given)

    with served(meets) as one, served(meets) as two:
        experts = ask(one, two)
        first = experts.submit(batch(seed=1, size=4))
        assert not first.done(), "nobody has come to the barrier yet: the caller is free to draw on"
        second = experts.submit(batch(seed=2, size=4))
        assert not wait([first, second], timeout=10).not_done
        torch.testing.assert_close(second.result().total, brightness(batch(seed=2, size=4)), rtol=0, atol=0)
        torch.testing.assert_close(first.result().parts["it"], brightness(batch(seed=1, size=4)), rtol=0, atol=0)


def test_requests_are_spread_fairly() -> None:
    counts = [0, 0]

    def counting(which: int) -> Score:
        def score(given: RewardBatch) -> Tensor:
            counts[which] += 1
            return brightness(given)

        return score

    with served(counting(0)) as one, served(counting(1)) as two:
        experts = ask(one, two)
        for seed in range(8):
            experts.score(batch(2, seed, size=4))
        assert counts == [4, 4]
        one.close()  # mid-run: the other goes on alone
        for seed in range(4):
            experts.score(batch(2, seed, size=4))
        assert counts == [4, 8]


def test_a_server_that_goes_in_the_middle_of_a_request(caplog: pytest.LogCaptureFixture) -> None:
    begun = threading.Event()

    def never(given: RewardBatch) -> Tensor:
        begun.set()
        time.sleep(0.5)
        return brightness(given)

    with served(never) as server:
        future = ask(server).submit(batch(size=4))
        assert begun.wait(10)
        server.close()
        with pytest.raises(UserError, match=f"reward models at {server.address} .* are lost, and no other answers"):
            future.result(10)
    with pytest.raises(UserError, match=f"reward models at {server.address} cannot be reached .*rewards serve"):
        ask(server)


def test_a_server_that_is_silent() -> None:
    asked = []

    def hangs(given: RewardBatch) -> Tensor:
        asked.append(1)
        time.sleep(0.8)
        return brightness(given)

    with served(hangs) as server:
        begin = time.monotonic()
        with pytest.raises(UserError, match=rf"{server.address} gave no answer in 0\.25 s.*\?timeout=0\.5"):
            ask(server, timeout=0.25).score(batch(size=4))
        assert 0.2 < time.monotonic() - begin < 0.75 and asked == [1], "not asked twice"


def proven(server: RewardServer, path: str, body: bytes, method: str = "POST", key: bytes = SECRET) -> dict[str, str]:
    return Exchange.begin(key, method, path).headers(body)


def told(server: RewardServer, path: str, body: bytes, **headers: str) -> tuple[int, str]:
    """(status, error) of a request that proves the key."""
    answer = httpx.post(server.address + path, content=body, headers={**proven(server, path, body), **headers})
    return answer.status_code, str(answer.json().get("error", "")) if answer.status_code != 200 else ""


def raw(server: RewardServer, data: bytes) -> bytes:
    """What comes back for these bytes, until the server hangs up."""
    with socket.create_connection((server.host, server.port), 10) as stranger:
        stranger.sendall(data)
        parts = []
        with contextlib.suppress(ConnectionResetError):
            while part := stranger.recv(4096):
                parts.append(part)
        return b"".join(parts)


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


def test_answers_of_another_server_are_refused() -> None:
    """Without the key, with scores that cannot be, with a total that is not the sum of its parts."""
    with served() as server:
        rewards = ask(server)
        good = server._work
        for change, message in (
            (lambda words, tensors: tensors.update(total=torch.full((5,), 3e8)), "beyond ±1e"),
            (lambda words, tensors: tensors.update(total=tensors["total"] + 1), "not the sum of its parts"),
            (lambda words, tensors: tensors.update(total=torch.zeros(4)), r"total is \(4,\) for 5 images"),
            (lambda words, tensors: tensors.pop("total"), "tensor total: absent"),
            (lambda words, tensors: words.update(parts="it"), "parts"),
        ):

            def lies(path: str, body: bytes, change: Any = change) -> tuple[int, bytes]:
                status, answer = good(path, body)
                words, tensors = decode(answer)
                change(words, tensors)
                return status, encode(words, tensors)

            server._work = lies  # type: ignore[method-assign]
            with pytest.raises(UserError, match=message):
                rewards.score(batch(size=4))
        server._work = good  # type: ignore[method-assign]
        server._key = b"a key that is not the same"
        with pytest.raises(UserError, match="another key"):
            rewards.score(batch(size=4))

    import http.server

    class Plain(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = encode({"models": ["it"], "weights": {}, "previews": False, "faces": False})
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Plain) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match="does not prove the key"):
            RemoteRewards([f"http://127.0.0.1:{other.server_port}"], SECRET)
        other.shutdown()


def test_a_reward_model_that_ends_the_process_is_told_and_the_server_goes_on() -> None:
    class Own:
        def __init__(self) -> None:
            self.leave = True

        def score(self, given: RewardBatch) -> EnsembleScore:
            if self.leave:
                self.leave = False
                sys.exit(3)
            return EnsembleScore(brightness(given))

    with running(RewardServer(Own(), SECRET)) as server:
        rewards = ask(server)
        with pytest.raises(UserError, match="SystemExit: 3"):
            rewards.score(batch(size=4))
        assert rewards.score(batch(size=4)).total.isfinite().all()


def test_columns_go_along() -> None:
    def wanted(prompts: list[str], images: Tensor, wanted: list[float]) -> list[float]:
        return wanted

    with running(RewardServer({"it": wanted}, SECRET)) as server:
        given = RewardBatch(torch.zeros(2, 3, 4, 4), ["a", "b"], columns={"wanted": [0.25, 2]})
        assert ask(server).score(given).total.tolist() == [0.25, 2.0]
        given.columns = {"wanted": [object(), 2]}
        with pytest.raises(UserError, match="columns for served reward models must be"):
            ask(server).score(given)


def test_an_expert_that_raises_and_one_that_is_no_number() -> None:
    def breaks(given: RewardBatch) -> Tensor:
        if given.prompts[0].endswith("2"):
            raise RuntimeError("no such colour")
        return brightness(given)

    def nan(given: RewardBatch) -> Tensor:
        return torch.where(torch.arange(len(given)) == 2, torch.nan, brightness(given))

    for score in (breaks, nan):
        with served(score) as server:
            experts = ask(server)
            given = batch(size=4) if score is nan else batch(size=4).row(2)
            with pytest.raises(UserError) as here:
                Ensemble({"it": Does(score)}, {"it": 1.0}).score(given).require_finite()
            with pytest.raises(UserError) as there:
                experts.score(given).require_finite()
            assert str(there.value) == str(here.value) and "reward model 'it'" in str(there.value)
            assert experts.score(batch(size=4).row(1)).total.isfinite().all(), "and it goes on"


def test_who_has_asked_is_answered_before_a_server_ends() -> None:
    asked, stop = threading.Event(), threading.Event()

    def slow(given: RewardBatch) -> Tensor:
        asked.set()
        stop.wait(10)
        time.sleep(0.3)  # longer than it takes to notice
        return brightness(given)

    class Own:
        """An ensemble that can score, and nothing else."""

        def score(self, given: RewardBatch) -> EnsembleScore:
            return EnsembleScore(slow(given))

    server = RewardServer(Own(), SECRET)
    thread = threading.Thread(target=server.serve, args=(stop.is_set,), daemon=True)
    thread.start()
    experts = ask(server)
    assert experts.models == () and experts.throughput() == {}
    future = experts.submit(batch(size=4))
    assert asked.wait(10)
    stop.set()
    torch.testing.assert_close(future.result(10).total, brightness(batch(size=4)))
    thread.join(10)
    assert not thread.is_alive() and future.result().parts == {}


def test_servers_must_serve_the_same() -> None:
    other = RewardServer(Ensemble({"it": Does(brightness)}, {"it": 0.5}), SECRET)
    threading.Thread(target=other.serve, daemon=True).start()
    with served() as server, pytest.raises(UserError, match="serve the same everywhere"):
        ask(server, other)
    other.close()
    with served() as server:
        experts = ask(server)
        assert experts.preview_scorer is None and experts.face_embedding is None and experts.models == ("it",)
        with pytest.raises(UserError, match=f"{server.port}: cannot listen there"):
            RewardServer(server.rewards, SECRET, port=server.port)


@pytest.mark.parametrize("kind", ["human", "animal"])
def test_messages_keep_every_bit(kind: str) -> None:
    given = batch(4, kind=kind, size=5)
    given.images = given.images.to(torch.bfloat16, memory_format=torch.channels_last)
    words, tensors = decode(encode(*pack_batch(given)))
    back = unpack_batch(words, tensors, torch.device("cpu"))
    assert torch.equal(back.images, given.images) and back.images.dtype == torch.bfloat16
    assert back.images.stride() == given.images.stride() != given.images.contiguous().stride()
    assert all(value.data_ptr() % 64 == 0 for value in (back.images, back.references)), "kernels mind where it begins"
    assert torch.equal(back.references, given.references)
    for field in ("prompts", "answers", "facts", "correct", "kind"):
        assert getattr(back, field) == getattr(given, field)


def test_addresses_and_keys(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    assert parse_addresses("http://a:1, https://[::1]:20?timeout=3") == (["http://a:1", "https://[::1]:20"], 3.0)
    for wrong in ("http://a", "http://:1", "ftp://a:1", "http://a:1/x", "http://a:x", "http://k@a:1", "http://a:1?w=2"):
        with pytest.raises(UserError, match="must be http://HOST:PORT"):
            parse_addresses(wrong)
    with pytest.warns(UserWarning, match="served over HTTP now: write http://a:1"):
        assert parse_addresses("tcp://a:1") == (["http://a:1"], 300.0)
    with pytest.raises(UserError, match=r"timeout=0\.0"):
        RemoteRewards(["http://127.0.0.1:1"], SECRET, 0.0)
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setenv(KEY_FILE, str(tmp_path / "key"))
    with pytest.raises(UserError, match=f"{KEY_FILE}: .*key: no such file"):
        read_key()
    (tmp_path / "key").write_text("short\n")
    with pytest.raises(UserError, match="has 5 characters, must have at least 16"):
        read_key()
    (tmp_path / "key").write_text(SECRET.decode() + "\n")
    assert read_key() == SECRET
