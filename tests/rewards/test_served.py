"""Experts served by another process: the same values as at home, and every way in which the two can lose each other."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from pyunictokens.rewards import Ensemble, EnsembleScore, RewardBatch
from pyunictokens.rewards.served.client import RemoteRewards, parse_addresses
from pyunictokens.rewards.served.server import RewardServer
from pyunictokens.rewards.served.wire import (
    KEY,
    KEY_FILE,
    decode,
    encode,
    pack_batch,
    read_key,
    shake_hands,
    unpack_batch,
)
from pyunictokens.runs.bundle import Sources, load_experts
from pyunictokens.toy.rewards import load_toy_experts
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
def served(score: Score = brightness, port: int = 0) -> Iterator[RewardServer]:
    server = RewardServer(Ensemble({"it": Does(score)}, {"it": 1.0}), SECRET, port=port)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join(10)


def ask(*servers: RewardServer, timeout: float = 20.0, key: bytes = SECRET) -> RemoteRewards:
    return RemoteRewards([(server.host, server.port) for server in servers], key, timeout, backoff=0.05)


def toy_server(port: int = 0) -> tuple[subprocess.Popen[str], str]:
    """The command, and the address it says it listens at."""
    command = [sys.executable, "-m", "pyunictokens", "experts", "serve", "--device", "cpu", "--port", str(port)]
    environment = {**os.environ, KEY: SECRET.decode(), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.readline()
    assert said.startswith("tcp://127.0.0.1:") and "ber, der, fer, tier on cpu" in said, said
    return process, said.partition(": ")[0]


def test_the_command_serves_the_toy_and_outlives_kill_and_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values as at home; kill -9 is an error that names the address; a server that is back is used again."""
    monkeypatch.setenv(KEY, SECRET.decode())
    home = load_toy_experts()
    process, address = toy_server()
    try:
        found = load_experts(Sources(), "cpu", address, trust=True)
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
        with pytest.raises(UserError, match=f"experts at {address} .* are lost.*--resume"):
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
        with pytest.raises(UserError, match=f"experts at {server.address} .* are lost, and no other answers"):
            future.result(10)
    with pytest.raises(UserError, match=f"experts at {server.address} cannot be reached .*experts serve"):
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


def test_wrong_keys_and_strangers(caplog: pytest.LogCaptureFixture) -> None:
    with served() as server:
        with pytest.raises(UserError, match=f"{server.address} have another key: set {KEY}"):
            ask(server, key=b"another key of sixteen letters")
        with socket.create_connection((server.host, server.port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")  # its first four letters are a length beyond 256 bytes
            with contextlib.suppress(ConnectionResetError):
                while stranger.recv(4096):
                    pass  # the challenge, then the end
        assert "turned away" in caplog.text and SECRET.decode() not in caplog.text
        torch.testing.assert_close(ask(server).score(batch(size=4)).total, brightness(batch(size=4)))


def test_frames_that_are_huge_or_garbage() -> None:
    with served() as server:
        server._limit = 1 << 16
        raw = socket.create_connection((server.host, server.port))
        spy = raw.dup()
        connection = shake_hands(raw, SECRET, serving=False, silence=10)
        for garbage in (b"", b"\0\0\0", b"\xff" * 40, struct.pack("!I", 2) + b"[]" + b"x" * 9, encode({"do": "exec"})):
            connection.send_bytes(garbage)
            message, _ = decode(connection.recv_bytes())
            assert "message" in message["error"] or "must be of hello" in message["error"]
        words, tensors = pack_batch(batch(size=4))
        for field, value in (("prompts", "p"), ("facts", [1]), ("correct", True), ("kind", "ghost"), ("answers", None)):
            connection.send_bytes(encode({"do": "score", **words, field: value}, tensors))
            assert field in decode(connection.recv_bytes())[0]["error"]
        for name, tensor in (("images", torch.zeros(5, 3, 4, 4, dtype=torch.uint8)), ("references", torch.ones(2))):
            connection.send_bytes(encode({"do": "score", **words}, {**tensors, name: tensor}))
            assert name in decode(connection.recv_bytes())[0]["error"]
        spy.sendall(struct.pack("!iQ", -1, 1 << 40))  # a terabyte is on its way, says the header
        with pytest.raises((EOFError, OSError)):
            connection.recv_bytes()
        spy.close()
        connection.close()
        torch.testing.assert_close(ask(server).score(batch(size=4)).total, brightness(batch(size=4)))


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
    assert experts.experts == () and experts.throughput() == {}
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
        assert experts.preview_scorer is None and experts.face_embedding is None and experts.experts == ("it",)
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
    assert parse_addresses("tcp://a:1, tcp://[::1]:20?timeout=3") == ([("a", 1), ("::1", 20)], 3.0)
    for wrong in ("tcp://a", "tcp://:1", "http://a:1", "tcp://a:1/x", "tcp://a:x", "tcp://k@a:1", "tcp://a:1?wait=2"):
        with pytest.raises(UserError, match="must be tcp://HOST:PORT"):
            parse_addresses(wrong)
    with pytest.raises(UserError, match=r"timeout=0\.0"):
        RemoteRewards([("127.0.0.1", 1)], SECRET, 0.0)
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setenv(KEY_FILE, str(tmp_path / "key"))
    with pytest.raises(UserError, match="cannot be read"):
        read_key()
    (tmp_path / "key").write_text("short\n")
    with pytest.raises(UserError, match="has 5 characters, must have at least 16"):
        read_key()
    (tmp_path / "key").write_text(SECRET.decode() + "\n")
    assert read_key() == SECRET
