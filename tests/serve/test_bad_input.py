"""What goes wrong is told in OpenAI's form, costs nothing, and leaves the server as it was."""

import asyncio
import json
import logging
import socket
import struct
import threading
import time
import zlib

import httpx
import openai
import pytest
from PIL import Image

from pyunictokens.rewards.served.connections import Connections
from pyunictokens.rollout.serving import ServingEngine
from pyunictokens.serve.catalog import Catalog, CatalogSettings, Limits
from pyunictokens.serve.errors import Refused
from pyunictokens.serve.gate import Gate, GateLimits
from pyunictokens.serve.keys import Client, Keys, KeySettings
from pyunictokens.serve.metrics import Metrics
from pyunictokens.serve.server import Server, ServerSettings
from pyunictokens.serve.workers import Workers
from pyunictokens.utils.errors import UserError

from .test_server import PROMPT, data_url, file_of
from .world import concept_run, running

ANN, BEN = "ann-ann-ann-ann-ann", "ben-ben-ben-ben-ben"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("bo", "mug", "cup")):
        concept_run(folder / name, name, seed)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    gate = GateLimits(2 << 20, 2.0)
    settings = ServerSettings(port=0, max_rows=2, max_waiting=8, batch_from=1, most_pixels=1_000_000, gate=gate)
    with running(folder, settings=settings, limits=Limits(concepts=2)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        yield client


def told(response, status, message, kind="invalid_request_error", param=None, code=None):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert response.status_code == status and message in error["message"], (response.status_code, error)
    assert error["type"] == kind and response.headers["x-request-id"]
    if param:
        assert error["param"] == param, error
    if code:
        assert error["code"] == code, error


def chat(content):
    return {"model": "base", "messages": [{"role": "user", "content": content}]}


def image_part(url):
    return [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]


def bomb():
    """A PNG of a few hundred bytes that claims 40,000 × 40,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


DRAW, CHAT = "/v1/images/generations", "/v1/chat/completions"


@pytest.mark.parametrize(
    ("path", "body", "status", "message", "param", "code"),
    [
        (DRAW, {"prompt": PROMPT, "model": "cat"}, 404, "there are bo, cup, mug, base", "model", "model_not_found"),
        (DRAW, {"prompt": PROMPT, "model": "../bo"}, 404, "no model '../bo'", "model", "model_not_found"),
        (DRAW, {"prompt": "a red cat " * 99}, 400, "tokens: this model reads", None, None),
        (DRAW, {"prompt": "x" * 30_000}, 400, "at most 20000 characters", "prompt", None),
        (DRAW, {"prompt": "a photo of <bo>."}, 400, "<bo> is not a token of this model", None, None),
        (DRAW, {"prompt": PROMPT, "n": 1000}, 400, "less than or equal to 16", "n", None),
        (DRAW, {"prompt": PROMPT, "n": 9}, 400, "n=9: must be an integer in 1…8", None, None),
        (DRAW, {"prompt": PROMPT, "n": "two"}, 400, "valid integer", "n", None),
        (DRAW, {"prompt": PROMPT, "size": "big"}, 400, "must be auto or WIDTHxHEIGHT", "size", None),
        (DRAW, {"prompt": PROMPT, "size": "33x33"}, 400, "multiples of", None, None),
        (DRAW, {"prompt": PROMPT, "size": "9600x9600"}, 400, "", None, None),
        (DRAW, {"prompt": PROMPT, "response_format": "url"}, 400, "b64_json", "response_format", None),
        (DRAW, {"prompt": PROMPT, "style": "vivid"}, 400, "knows no such field", "style", "unknown_parameter"),
        (DRAW, {"prompt": PROMPT, "guidance_scale": -1}, 400, "greater than or equal to 0", "guidance_scale", None),
        (DRAW, {"prompt": "\ud800"}, 400, "unicode", "prompt", None),
        (DRAW, {"model": "base"}, 400, "Field required", "prompt", "missing_parameter"),
        (DRAW, [], 400, "", None, None),
        (CHAT, chat(""), 400, "no text of the user", "messages", None),
        (CHAT, chat("x" * 30_000), 400, "at most 20000 characters", "messages.0.content.0.text.text", None),
        (
            CHAT,
            {"messages": [chat("x" * 9_000)["messages"][0] | {"role": "system"}] * 3 + chat("?")["messages"]},
            400,
            "27004 characters are asked: must be at most 20000",
            "messages",
            None,
        ),
        (CHAT, chat([{"type": "audio"}]), 400, "'text', 'input_text', 'image_url'", "messages.0.content.0", None),
        (CHAT, chat([{"type": "text"}]), 400, "required", "messages.0.content.0.text.text", "missing_parameter"),
        (
            CHAT,
            chat([{"type": "text", "text": "?", "a": 1}]),
            400,
            "no such field",
            "messages.0.content.0.text.a",
            None,
        ),
        (CHAT, chat(5), 400, "valid list", "messages.0.content", None),
        (CHAT, {**chat("What?"), "max_tokens": 4000}, 400, "position", None, None),
        (CHAT, {**chat("What?"), "tools": []}, 400, "knows no such field", "tools", None),
        (CHAT, {**chat("What?"), "top_p": 0.5}, 400, "greater than or equal to 1", "top_p", None),
        (CHAT, {"messages": []}, 400, "at least 1 item", "messages", None),
        (
            CHAT,
            chat(image_part("https://example.com/a.png")),
            400,
            "other addresses are not fetched",
            "image_url",
            None,
        ),
        (CHAT, chat(image_part("file:///etc/passwd")), 400, "other addresses are not fetched", "image_url", None),
        (CHAT, chat(image_part("data:image/png;base64,%%%")), 400, "base64", "image_url", "invalid_image"),
        (CHAT, chat(image_part("data:image/png;base64,aGVsbG8=")), 400, "not an image", "image_url", "invalid_image"),
        (CHAT, chat(image_part(data_url(Image.new("RGB", (2000, 600))))), 400, "megapixels", "image_url", None),
        (CHAT, chat(image_part(data_url(Image.new("RGB", (9, 9)))) * 2), 400, "looks at one", "messages", None),
    ],
)
def test_what_cannot_be_used_is_named(server, path, body, status, message, param, code):
    response = httpx.post(
        server.address + path, content=json.dumps(body), headers={"content-type": "application/json"}, timeout=30
    )
    told(response, status, message, param=param, code=code)


def test_bodies_that_are_no_json_and_addresses_that_are_not_there(server):
    head = {"content-type": "application/json"}
    told(httpx.post(server.address + DRAW, content=b"{", headers=head), 400, "not JSON", code="invalid_json")
    told(httpx.post(server.address + DRAW, content=b"[" * 100_000, headers=head), 400, "")
    told(httpx.post(server.address + DRAW, content=b'{"prompt": NaN}', headers=head), 400, "")
    told(httpx.get(server.address + DRAW), 405, "asked in another way")
    told(httpx.get(server.address + "/v1/cats"), 404, "no such address")
    told(httpx.get(server.address + "/docs"), 404, "no such address")


def test_a_decompression_bomb_and_broken_forms(server):
    url, image = server.address + "/v1/images/edits", file_of(Image.new("RGB", (32, 32)))
    post = lambda **options: httpx.post(url, timeout=30, **options)  # noqa: E731
    mask = file_of(Image.new("L", (32, 32), 255))
    told(post(files={"image": ("a.png", bomb(), "image/png")}, data={"prompt": PROMPT}), 400, "megapixels")
    told(
        post(files={"image": image}, data={"prompt": PROMPT}), 400, "nothing in the image is transparent", param="mask"
    )
    told(post(files={"image": image, "mask": mask}, data={"prompt": PROMPT}), 400, "white all over")
    small = file_of(Image.new("L", (16, 16), 255))
    told(post(files={"image": image, "mask": small}, data={"prompt": PROMPT}), 400, "must be of one size")
    told(post(files={"mask": mask}, data={"prompt": PROMPT}), 400, "a file is needed", param="image")
    told(post(files={"image": image}), 400, "Field required", param="prompt")
    told(post(files=[("image", image), ("image", image)], data={"prompt": PROMPT}), 400, "given twice")
    told(post(files=[("image", image)] * 9, data={"prompt": PROMPT}), 400, "")
    told(post(files={"image": image, "other": image}, data={"prompt": PROMPT}), 400, "no such file")
    told(post(json={"prompt": PROMPT}), 400, "multipart form")
    huge = {"prompt": PROMPT, "size": "96000x96000"}  # 28 GB, were the picture brought to that size
    told(post(files={"image": file_of(Image.new("RGBA", (32, 32)))}, data=huge), 400, "smaller grid")
    told(post(content=b"x", headers={"content-type": "multipart/form-data; boundary=a"}), 400, "")


def test_a_body_that_is_too_long_is_refused_unread(server):
    response = httpx.post(server.address + DRAW, content=b" " * (3 << 20), headers={"content-type": "application/json"})
    told(response, 413, "must have at most 2097152")

    def parts():
        for _ in range(50):
            yield b" " * (1 << 16)

    told(httpx.post(server.address + DRAW, content=parts()), 413, "2097152 bytes: that is the limit")


def test_a_body_that_does_not_come_ends_its_connection(server):
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
        sock.settimeout(10)
        assert b"408" in sock.recv(1 << 16).splitlines()[0]


def wait_until(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_goes_away_gives_its_rows_back_at_once(server, streamed):
    work = server.workers
    body = json.dumps({"prompt": PROMPT, "steps": 1000, "n": 2, "stream": streamed, "partial_images": 3})
    head = f"POST {DRAW} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall((head + body).encode())
        wait_until(lambda: work.running == 2)
    wait_until(lambda: not (work.running or work.waiting))


def test_too_many_wait_and_a_deadline(server, client):
    slow = {"prompt": PROMPT, "steps": 1000, "n": 8}
    results = []

    def ask():
        try:
            results.append(httpx.post(server.address + DRAW, json={**slow, "deadline": 3.0}, timeout=60))
        except httpx.HTTPError as error:
            results.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: server.workers.running == 2)
    refused = httpx.post(server.address + DRAW, json={**slow, "n": 3})
    told(refused, 429, "wait already", "rate_limit_error", code="rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) >= 1
    with pytest.raises(openai.RateLimitError):
        client.images.generate(prompt=PROMPT, n=4)
    for path, body in ((DRAW, {"prompt": PROMPT}), (CHAT, chat("What?"))):  # a stream that has not begun has a status
        told(httpx.post(server.address + path, json={**body, "n": 4, "stream": True}), 429, "wait", "rate_limit_error")
    thread.join()
    told(results[0], 408, "deadline", code="deadline_passed")
    with pytest.raises(openai.APIError, match="deadline"):
        list(client.images.generate(prompt=PROMPT, stream=True, extra_body={"deadline": 0.2, "steps": 1000}))


def test_a_deadline_that_passed_is_not_asked_again(server, client):
    """OpenAI's client sends a 408 again by itself, unless it is told not to."""

    def late():
        text = httpx.get(server.address + "/metrics").text.splitlines()
        return sum(
            float(line.split()[1]) for line in text if line.startswith("pyunictokens_requests_total") and "408" in line
        )

    before = late()
    with pytest.raises(openai.APIStatusError, match="deadline"):
        client.with_options(max_retries=2).images.generate(prompt=PROMPT, extra_body={"deadline": 0.1, "steps": 1000})
    assert late() == before + 1


def test_concepts_beyond_the_limit_are_read_again(server, client):
    options = {"extra_body": {"steps": 1, "seed": 1}}
    first = {n: client.images.generate(model=n, prompt=f"<{n}>", **options) for n in ("bo", "mug", "cup")}
    for name in ("bo", "mug", "cup", "bo"):
        again = client.images.generate(model=name, prompt=f"<{name}>", **options)
        assert again.data[0].b64_json == first[name].data[0].b64_json
        assert server.catalog.resident <= 2


def test_a_client_that_does_not_take_its_answer_is_left():
    """The application around any other: its handler is cancelled, its part of the answer is not waited for."""
    cancelled = []

    async def handler(scope, receive, send):
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
        except BaseException as error:
            cancelled.append(type(error).__name__)
            raise

    async def main():
        metrics = Metrics(Workers([]))
        gate = Gate(handler, Keys([]), metrics, Connections(1.0, 9), GateLimits(slow=0.2))
        sent = []

        async def send(message):
            sent.append(message)
            if len(sent) > 3:
                await asyncio.sleep(60)

        bodies = [{"type": "http.request", "body": b""}]

        async def receive():
            if bodies:
                return bodies.pop()
            await asyncio.sleep(60)

        scope = {"type": "http", "method": "POST", "path": "/v1/x", "headers": [], "client": None}
        await asyncio.wait_for(gate(scope, receive, send), 5)
        return metrics.text()[0].decode()

    assert "pyunictokens_aborted_total 1.0" in asyncio.run(main()) and cancelled == ["SlowReader"]


# --- keys ------------------------------------------------------------------------------------------------------------


def keys(**ben):
    return Keys([KeySettings("ann", ANN), KeySettings("ben", BEN, models=("bo",), **ben)])


def test_keys_say_who_may_ask_for_what(folder):
    with running(folder, keys()) as server:
        ann, ben, none = ({"authorization": f"Bearer {key}"} for key in (ANN, BEN, "wrong"))
        models = server.address + "/v1/models"
        for headers in ({}, none, {"authorization": f"Basic {ANN}"}, {"authorization": ANN}):
            told(httpx.get(models, headers=headers), 401, "API key", "authentication_error", code="invalid_api_key")
        told(httpx.get(server.address + "/metrics"), 401, "API key", "authentication_error")
        assert httpx.get(server.address + "/health").status_code == 200
        assert len(httpx.get(models, headers=ann).json()["data"]) == 4
        assert [each["id"] for each in httpx.get(models, headers=ben).json()["data"]] == ["bo"]
        told(httpx.get(models + "/mug", headers=ben), 404, "for this key: there are bo", code="model_not_found")
        body = {"prompt": PROMPT, "model": "mug", "steps": 1}
        told(httpx.post(server.address + DRAW, json=body, headers=ben), 404, "for this key", code="model_not_found")
        assert httpx.post(server.address + DRAW, json=body, headers=ann).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.address}/v1", api_key="wrong", max_retries=0).models.list()


def test_a_key_has_its_own_rate(folder):
    with running(folder, keys(requests_per_minute=2, concurrent=1)) as server:
        ask = lambda key, **more: httpx.post(  # noqa: E731
            server.address + DRAW,
            json={"prompt": PROMPT, "model": "bo", "steps": 1, **more},
            headers={"authorization": f"Bearer {key}"},
            timeout=60,
        )
        assert [ask(BEN).status_code for _ in range(2)] == [200, 200]
        refused = ask(BEN)
        told(refused, 429, "more than 2 requests a minute", "rate_limit_error")
        assert 1 <= int(refused.headers["retry-after"]) <= 31
        assert ask(ANN).status_code == 200


def test_the_bucket_of_a_key_fills_evenly():
    now = [0.0]
    client = Client(KeySettings("ann", requests_per_minute=6), lambda: now[0])

    def ask():
        with client.asking():
            pass

    for _ in range(6):
        ask()
    with pytest.raises(Refused, match="more than 6 requests a minute"):
        ask()
    now[0] = 10.0
    ask()
    with pytest.raises(Refused, match="more than 6"):
        ask()
    busy = Client(KeySettings("ben", concurrent=1))
    with busy.asking(), pytest.raises(Refused, match="the limit is 1"), busy.asking():
        pass
    with busy.asking():
        pass


def test_keys_come_from_the_environment_or_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("PYUNICTOKENS_SERVE_KEY", ANN)
    assert Keys.from_environment().client(f"Bearer {ANN}").settings.name == "default"
    file = tmp_path / "keys.yaml"
    file.write_text(f"- name: ann\n  key: {ANN}\n  priority: 2\n- name: ben\n  key: {BEN}\n  models: [bo]\n")
    monkeypatch.setenv("PYUNICTOKENS_SERVE_KEY_FILE", str(file))
    found = Keys.from_environment()
    assert found.client(f"bearer {ANN}").settings.priority == 2 and found.client(f"Bearer {BEN}").may_ask("bo")
    assert ANN not in repr(vars(found)) and "key=''" in repr(found.client(f"Bearer {ANN}").settings)
    for text, message in (
        ("- name: ann\n  key: short\n", "has 5 characters"),
        ("- name: ann\n  key: schlüssel-schlüssel\n", "beyond ASCII"),
        (f"- name: a\n  key: {ANN}\n- name: b\n  key: {ANN}\n", "same key"),
        (f"- name: a\n  key: {ANN}\n  limit: 3\n", "limit"),
        ("a: 1\n", "must be a list"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            Keys.from_environment()


def test_other_machines_need_a_key(folder):
    make = CatalogSettings(folder=folder)
    for host in ("0.0.0.0", "::", "192.168.1.1", "example.com"):
        with pytest.raises(UserError, match=f"--host {host} can be reached by other machines: set PYUNICTOKENS_SERVE"):
            Server(make, Keys([]), ServerSettings(host, 0))
    for host in ("127.0.0.1", "localhost"):
        Server(make, Keys([]), ServerSettings(host, 0))._socket.close()
    with pytest.raises(UserError, match="cannot listen there"):
        Server(make, keys(), ServerSettings("203.0.113.1", 0))


def test_no_page_of_another_site_may_ask(server):
    head = {"origin": "https://example.com", "access-control-request-method": "POST"}
    response = httpx.options(server.address + DRAW, headers=head)
    assert response.status_code == 405
    rebound = httpx.get(server.address + "/v1/models", headers={"host": f"example.com:{server.port}"})
    told(rebound, 403, "only names of this machine")
    for host in ("127.0.0.1", f"localhost:{server.port}", f"[::1]:{server.port}"):
        assert httpx.get(server.address + "/v1/models", headers={"host": host}).status_code == 200
    assert not [
        name for name in httpx.get(server.address + "/health", headers=head).headers if "access-control" in name
    ]


# --- log and end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told_so", [False, True])
def test_the_log_has_a_line_a_request_and_prompts_only_where_asked(folder, told_so, caplog, capfd):
    secret = "a photo of a secret cat."
    with caplog.at_level(logging.INFO), running(folder, settings=ServerSettings(port=0, log_prompts=told_so)) as server:
        body = {"prompt": secret, "model": "bo", "steps": 1}
        request = httpx.post(server.address + DRAW, json=body).headers["x-request-id"]
        httpx.post(server.address + DRAW, json={**body, "prompt": f"{secret} <dog>"})
        httpx.post(server.address + DRAW, json={**body, "prompt": f"{secret} bo"})
    lines = [json.loads(record.message) for record in caplog.records if record.name == "pyunictokens.serve"]
    (line,) = [line for line in lines if line["request"] == request]
    assert (line["status"], line["model"], line["n"], line["key"]) == (200, "bo", 1, "nobody") and line["seconds"] > 0
    assert line.get("prompt") == (secret if told_so else None)
    assert told_so or ("secret" not in caplog.text and "secret" not in "".join(capfd.readouterr()))


def test_an_end_finishes_what_runs(folder):
    with running(folder, settings=ServerSettings(port=0)) as server:
        found = []
        ask = lambda: found.append(httpx.post(server.address + DRAW, json={"prompt": PROMPT, "steps": 60}, timeout=60))  # noqa: E731
        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: server.workers.running)
    thread.join()
    assert found[0].status_code == 200 and found[0].json()["data"][0]["b64_json"]
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.address + "/health")


def test_two_runs_of_one_name_and_folders_that_are_not_there(folder, tmp_path):
    with pytest.raises(UserError, match="holds a run called bo, which is named as well"):
        Catalog([str(folder / "bo")], folder)
    other = concept_run(tmp_path / "bo")
    with pytest.raises(UserError, match="two runs are called bo"):
        Catalog([str(folder / "bo"), str(other)])
    with pytest.raises(UserError, match="no such folder"):
        Catalog(folder=tmp_path / "nowhere")
    assert ServingEngine().busy is False
