"""Experts served by another process: the same values as at home, and every way in which the two can lose each other."""

from __future__ import annotations

import signal
import sys
import threading
import time
from concurrent.futures import wait
from typing import Any

import pytest
import torch
from torch import Tensor

from pyunictokens.models.bundle import Sources
from pyunictokens.rewards import Ensemble, EnsembleScore, RewardBatch
from pyunictokens.rewards.served.client import RemoteRewards, parse_addresses
from pyunictokens.rewards.served.messages import (
    KEY,
    KEY_FILE,
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
from tests.rewards.serving import (
    SECRET,
    Does,
    Score,
    ask,
    batch,
    brightness,
    running,
    served,
    toy_server,
)
from tests.toy.test_rewards import human_batch


@pytest.mark.slow
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
