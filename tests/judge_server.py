"""A small OpenAI-compatible server on localhost that behaves as told: well, slowly, with garbage, 429, 500, not at all.

For tests of whatever talks to a remote judge or model. It speaks real HTTP and knows no client:

    with JudgeServer() as server:                     # answers every question with {"reason": ..., "score": 7}
        server.script("garbage", "429", "ok")         # what the next requests get, in order; then `ok` again
        Judge(JudgeConfig(model="m", base_url=server.url, ...))
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Answer = Callable[[dict[str, Any]], str]
"""From the request's JSON to the text of the answer."""

BEHAVIOURS = ("ok", "slow", "garbage", "empty", "429", "500", "401", "hang_up", "not_json", "no_choices", "raw", "drip")
"""What a request can meet."""


def question_of(request: dict[str, Any]) -> str:
    """The text parts of a request's last message, joined."""
    content = request["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def images_of(request: dict[str, Any]) -> list[str]:
    """The data URLs of a request's last message."""
    content = request["messages"][-1]["content"]
    return [] if isinstance(content, str) else [p["image_url"]["url"] for p in content if p["type"] == "image_url"]


class JudgeServer:
    """Serves POST /v1/chat/completions. `ok` says `answer`, a text or a function of the request.

    `requests` keeps every request's JSON, `keys` the Authorization headers, `most_at_once` counts parallel requests.
    """

    def __init__(self, answer: Answer | str = '{"reason": "as asked", "score": 7}', delay: float = 2.0):
        self.answer = answer
        self.delay = delay
        """Seconds that `slow` waits before it answers."""
        self.retry_after: str | None = "0"
        """The Retry-After header of a 429."""
        self.raw: Callable[[str], bytes] | bytes = b""
        """What `raw` answers with HTTP 200, or a function of the Authorization header that says it."""
        self.raw_headers: dict[str, str] = {}
        self.always: str | None = None
        """A behaviour for every request that the script does not cover."""
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        """Authorization headers as they came."""
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        self._script: deque[str] = deque()
        self._closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        """The base URL a client is given."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def say(self, request: dict[str, Any]) -> str:
        """The text `ok` answers with."""
        return self.answer(request) if callable(self.answer) else self.answer

    def script(self, *behaviours: str) -> None:
        """What the next requests meet, in order; after that `always`, or `ok`."""
        unknown = [name for name in behaviours if name not in BEHAVIOURS]
        if unknown:
            raise ValueError(f"{unknown}: must be of {', '.join(BEHAVIOURS)}")
        with self._lock:
            self._script.extend(behaviours)

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def _enter(self, request: dict[str, Any], key: str) -> str:
        with self._lock:
            self.requests.append(request)
            self.keys.append(key)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            return self._script.popleft() if self._script else (self.always or "ok")

    def _leave(self) -> None:
        with self._lock:
            self._now -= 1


def _completion(text: str, request: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": "chatcmpl-test",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.get("model", ""),
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
    }


def refused(path: str, key: str, kind: str, request: Any) -> tuple[int, str] | None:
    """(status, why) where a real endpoint would not take a request."""
    if path not in {"/v1/chat/completions", "/v1/images/generations"}:
        return 404, f"unknown path {path}"
    if not key.startswith("Bearer ") or len(key) < 8:
        return 401, "no API key"
    if not kind.startswith("application/json"):
        return 415, f"Content-Type {kind!r}: must be application/json"
    if not isinstance(request, dict) or not isinstance(request.get("model"), str) or not request["model"].strip():
        return 400, "model is missing"
    if path.endswith("generations"):
        known = {"model", "prompt", "n", "response_format", "size", "quality", "seed"}
        wrong = not isinstance(request.get("prompt"), str) or not 1 <= request.get("n", 1) <= 10
        return (400, "prompt, n or an unknown field") if wrong or set(request) - known else None
    known = {
        "model",
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "stream",
    }
    if set(request) - known:
        return 400, f"unknown fields {sorted(set(request) - known)}"
    if {"max_tokens", "max_completion_tokens"} <= set(request):
        return 400, "max_tokens and max_completion_tokens: give one of the two"
    for name in ("max_tokens", "max_completion_tokens"):
        if name in request and (not isinstance(request[name], int) or request[name] < 1):
            return 400, f"{name} must be a whole number above 0"
    if not 0 <= request.get("temperature", 1) <= 2:
        return 400, "temperature must be from 0 to 2"
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        return 400, "messages must be a list of turns"
    for turn in messages:
        if not isinstance(turn, dict) or turn.get("role") not in {"system", "user", "assistant"}:
            return 400, "a turn's role must be system, user or assistant"
        content = turn.get("content")
        if isinstance(content, str) and content:
            continue
        if not isinstance(content, list) or not content or turn["role"] == "assistant":
            return 400, "a turn's content must be a text, or of a user a list of parts"
        for part in content:
            text, image = part.get("text"), part.get("image_url")
            if part.get("type") == "text" and isinstance(text, str) and text and set(part) == {"type", "text"}:
                continue
            url = image.get("url") if isinstance(image, dict) else None
            if (
                part.get("type") != "image_url"
                or not isinstance(url, str)
                or not url.startswith("data:image/png;base64,")
            ):
                return 400, "a part must be a text or an image_url"
            base64.b64decode(url.partition(",")[2], validate=True)
    return None


def _handler(judge: JudgeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            key = self.headers.get("Authorization", "")
            try:
                request = json.loads(body)
            except ValueError:
                return self._send(400, {"error": {"message": "the body is no JSON"}})
            refusal = refused(self.path, key, self.headers.get("Content-Type", ""), request)
            if refusal is not None:
                return self._send(refusal[0], {"error": {"message": refusal[1], "type": "invalid_request_error"}})
            behaviour = judge._enter(request, key)
            try:
                self._behave(behaviour, request, key)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client did not wait
            finally:
                judge._leave()

        def _behave(self, behaviour: str, request: dict[str, Any], key: str) -> None:
            if behaviour == "hang_up":
                self.close_connection = True
                self.connection.close()
            elif behaviour == "slow":
                judge._closing.wait(judge.delay)
                self._send(200, _completion(judge.say(request), request))
            elif behaviour == "garbage":
                self._send(200, _completion("A lovely picture, full of light.", request))
            elif behaviour == "empty":
                self._send(200, _completion("", request))
            elif behaviour == "no_choices":
                self._send(200, {**_completion("", request), "choices": []})
            elif behaviour == "not_json":
                self._send(200, "<html>a proxy's page</html>", kind="text/html")
            elif behaviour == "raw":
                data = judge.raw(key) if callable(judge.raw) else judge.raw
                self.send_response(200)
                for name, text in {"Content-Type": "application/json", **judge.raw_headers}.items():
                    self.send_header(name, text)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            elif behaviour == "drip":  # a byte now and then, for ever: no single read ever waits long
                self.send_response(200)
                self.send_header("Content-Length", "1000000")
                self.end_headers()
                while not judge._closing.wait(0.05):
                    self.wfile.write(b" ")
                    self.wfile.flush()
            elif behaviour == "429":
                more = {} if judge.retry_after is None else {"Retry-After": judge.retry_after}
                self._send(429, {"error": {"message": "too many requests"}}, more)
            elif behaviour in {"500", "401"}:  # echoes the key, as careless servers do
                self._send(int(behaviour), {"error": {"message": f"failed for {key}"}})
            else:
                self._send(200, _completion(judge.say(request), request))

        def _send(
            self, status: int, value: Any, more: dict[str, str] | None = None, kind: str = "application/json"
        ) -> None:
            data = (value if isinstance(value, str) else json.dumps(value)).encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            for name, text in (more or {}).items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(data)

    return Handler
