"""An OpenAI-compatible endpoint: the openai client with its retries, behind a guard for keys and replies.

Sends chat messages and returns text. What comes back is a stranger's: every reply is read whole within a time and a
size, rid of the key, and rebuilt from the few fields that are used (replies.py) before the openai client sees it. A
reply that is no answer reaches the client as HTTP 502, one that does not come in time as 504, so that its own retries
meet them like any other failure. The key is read from the environment when a client is made; it is in no message, no
log and no file.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import importlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from ..config.limits import at_least
from ..utils.errors import UserError, needs
from .background import Background
from .replies import NoAnswer, complaint, completion, images, own_words, without

if TYPE_CHECKING:
    from openai import AsyncOpenAI

T = TypeVar("T")
R = TypeVar("R")

_LONGEST = {"chat": 4 << 20, "images": 64 << 20}
"""Most bytes of a reply, unpacked, by what was asked for."""
_tries: contextvars.ContextVar[list[int]] = contextvars.ContextVar("tries")
"""How often the request of this task was sent."""


_AT_ONCE = 10
"""Images that one request may ask for."""


def gives_base64(model: str) -> bool:
    """Whether an image model is one of those that answer in base64 by themselves, and take images through
    images/edits: gpt-image-1 and its kin."""
    return model.rpartition("/")[2].startswith(("gpt-image", "chatgpt-image"))


class EndpointError(RuntimeError):
    """A request that got no answer. The message says why and how often it was tried; it never holds the key."""


@dataclass(frozen=True)
class EndpointConfig:
    """Where to ask, and how patiently."""

    RETIRED = tuple((name, "the openai client chooses its waits") for name in ("backoff", "backoff_limit"))

    model: str
    """The model's name at the endpoint, e.g. gpt-4o."""
    base_url: str | None = None
    """The endpoint up to /v1. None: what OPENAI_BASE_URL says, else the client's own default."""
    key_env: str | None = "OPENAI_API_KEY"
    """The environment variable that holds the key. None: the endpoint wants none (a local server)."""
    timeout: float = 60.0
    """Seconds one attempt may take, from the connection to the last byte of the reply."""
    attempts: int = 5
    """How often one request is tried before it is given up; the openai client chooses the waits between."""
    concurrency: int = 8
    """Requests under way at once."""
    max_tokens: int | None = 512
    """Longest reply; None leaves it to the endpoint."""
    limit_field: str = "max_tokens"
    """What the endpoint calls that limit: max_tokens, or max_completion_tokens for newer models."""
    temperature: float | None = 0.0
    """Sampling temperature; None where the model does not take one."""
    price_prompt: float = 0.0
    """Price of a million prompt tokens, for the cost counter."""
    price_completion: float = 0.0
    """Price of a million tokens of replies."""

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise UserError("model is empty: name the model the endpoint serves, e.g. gpt-4o")
        if not 0 < self.timeout < math.inf:
            raise UserError(f"timeout={self.timeout}: must be a finite number of seconds > 0")
        at_least(1, attempts=self.attempts, concurrency=self.concurrency)
        if self.limit_field not in {"max_tokens", "max_completion_tokens"}:
            raise UserError(f"limit_field={self.limit_field!r}: must be max_tokens or max_completion_tokens")
        at_least(0, price_prompt=self.price_prompt, price_completion=self.price_completion)


@dataclass
class Counters:
    """What was asked so far, what it took and what it cost. Times are those of answered requests, in seconds."""

    answered: int = 0
    """Requests that got an answer."""
    retried: int = 0
    """Attempts after the first."""
    failed: int = 0
    """Requests given up."""
    cached: int = 0
    """Questions answered from the cache, at no cost."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    """In the unit of the configuration's prices."""
    seconds: list[float] = field(default_factory=list)
    """Latency of every answered request, its failed attempts and waits included."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, *, seconds: Sequence[float] = (), **amounts: float) -> None:
        """Add `amounts` to the counters of these names, and latencies; from any thread."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)
            self.seconds.extend(seconds)

    def latency(self, share: float = 0.5) -> float:
        """The latency that `share` of the answered requests stayed within; 0 before the first one."""
        if not self.seconds:
            return 0.0
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def summary(self) -> dict[str, float | int]:
        """Numbers for a log or a report."""
        counts = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "seconds"}
        return {**counts, "p50_s": self.latency(0.5), "p95_s": self.latency(0.95)}


@dataclass(frozen=True)
class Reply:
    """One answer of the endpoint."""

    text: str
    seconds: float
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Endpoint:
    """Sends chat messages to one model. Safe to use from several threads."""

    def __init__(self, config: EndpointConfig):
        self.config = config
        self.counters = Counters()
        self._lock = threading.Lock()
        self._made: AsyncOpenAI | None = None

    @property
    def address(self) -> str | None:
        """Where it asks; None for the client's own default."""
        return self.config.base_url or os.environ.get("OPENAI_BASE_URL") or None

    def chat(self, messages: Sequence[Mapping[str, object]], **more: object) -> Reply:
        """The reply to `messages` (role and content, as the endpoint wants them). Raises EndpointError, UserError.

        more: further fields of the request, e.g. ``temperature=1.0, seed=3``; they win over the configuration.
        """
        request: Any = self.request(messages, **more)
        begin = time.monotonic()
        made = self._ask(self.config.model, self._client().chat.completions.create(**request))
        seconds, usage = time.monotonic() - begin, made.usage
        sent, got = usage.prompt_tokens, usage.completion_tokens
        cost = (sent * self.config.price_prompt + got * self.config.price_completion) / 1e6
        self.counters.add(answered=1, prompt_tokens=sent, completion_tokens=got, cost=cost, seconds=[seconds])
        return Reply(made.choices[0].message.content, seconds, sent, got)

    def draw(
        self, model: str, prompt: str, n: int, *, images: Sequence[bytes] = (), size: str = "", quality: str = ""
    ) -> list[str]:
        """`n` images that `model` makes for `prompt`, each a base64 text. Raises EndpointError, UserError.

        images: PNG files that the images are made from, through images/edits. size, quality: as the endpoint has them;
        "" leaves them to it. gpt-image-1 and its kin always answer in base64 and refuse to be asked for it.
        """
        fields: dict[str, Any] = {"model": model, "prompt": prompt}
        fields |= {name: value for name, value in (("size", size), ("quality", quality)) if value}
        if not gives_base64(model):
            fields["response_format"] = "b64_json"
        made: list[str] = []
        while len(made) < n:
            count, client = min(n - len(made), _AT_ONCE), self._client().images
            if images:
                shown = [(f"{place}.png", data, "image/png") for place, data in enumerate(images)]
                asked = client.edit(image=shown, n=count, **fields)
            else:
                asked = client.generate(n=count, **fields)
            got = [str(image.b64_json) for image in self._ask(model, asked).data]
            made += got
            if len(got) != count:
                break
        return made

    def request(self, messages: Sequence[Mapping[str, object]], **more: object) -> dict[str, object]:
        """The fields a request is made of; what a cache is keyed by."""
        fields: dict[str, object] = {"model": self.config.model, "messages": [dict(message) for message in messages]}
        if self.config.max_tokens is not None:
            fields[self.config.limit_field] = self.config.max_tokens
        if self.config.temperature is not None:
            fields["temperature"] = self.config.temperature
        return {**fields, **more}

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`function` of every item, in order, as many at once as requests may be under way."""
        if len(items) <= 1 or self.config.concurrency == 1:
            return [function(item) for item in items]
        with ThreadPoolExecutor(min(self.config.concurrency, len(items))) as pool:
            return list(pool.map(function, items))

    def _ask(self, model: str, request: Coroutine[object, object, object]) -> Any:
        """What the client made of a request. Raises EndpointError, whatever went wrong."""
        counted = [0]

        async def asked() -> object:
            _tries.set(counted)
            return await request

        try:
            return _background().run(asked())
        except Exception as error:  # the client's many kinds, and what a reply may do to it
            self.counters.add(failed=1)
            times = f" (given up after {counted[0]} attempts)" if counted[0] > 1 else ""
            raise EndpointError(f"{model}: {without(self._key(), _explain(error))}{times}") from None
        finally:
            self.counters.add(retried=max(0, counted[0] - 1))

    def _client(self) -> AsyncOpenAI:
        with self._lock:
            if self._made is None:
                self._made = _background().run(self._make())
            return self._made

    async def _make(self) -> AsyncOpenAI:
        with needs("judge"):
            import openai
        config, key = self.config, self._key()
        for name in ("httpcore", "httpcore2"):  # at DEBUG they log the headers of replies, which may echo the key
            logging.getLogger(name).setLevel(logging.INFO)
        turns = asyncio.Semaphore(config.concurrency)

        class Guarded(openai.DefaultAsyncHttpxClient):
            """Reads replies whole, in time, and hands on what of them is used."""

            async def send(self, request: Any, **options: Any) -> Any:  # as the client calls it
                library = importlib.import_module(type(request).__module__.partition(".")[0])
                kind = "images" if "/images/" in request.url.path else "chat"
                _tries.get()[0] += 1
                kept: dict[str, str] = {}
                try:
                    async with turns:
                        status, headers, body = await asyncio.wait_for(self._whole(request, kind), config.timeout)
                    if status == 200:
                        clean = images(body, key) if kind == "images" else completion(body, key)
                    else:
                        clean, kept = complaint(body, key, headers)
                except asyncio.TimeoutError:
                    status, clean = 504, own_words(f"no answer in {config.timeout:g} s")
                except NoAnswer as error:
                    status, clean = 502, own_words(without(key, str(error)))
                except library.RequestError:  # the connection: the client tries again by itself
                    raise
                except Exception as error:  # a reply that breaks the library which reads it
                    status, clean = 502, own_words(f"a reply that cannot be read ({type(error).__name__})")
                kept["content-type"] = "application/json"
                return library.Response(status, headers=kept, content=clean, request=request)

            async def _whole(self, request: Any, kind: str) -> tuple[int, dict[str, str], bytes]:
                request.headers["accept-encoding"] = "identity"
                response = await super().send(request, stream=True, follow_redirects=False)
                try:
                    parts, size = [], 0
                    async for part in response.aiter_bytes():
                        parts.append(part)
                        size += len(part)
                        if size > _LONGEST[kind]:
                            raise NoAnswer(f"a reply of more than {_LONGEST[kind] >> 20} MiB")
                    return response.status_code, dict(response.headers), b"".join(parts)
                finally:
                    await response.aclose()

        return openai.AsyncOpenAI(
            api_key=key or "none",
            base_url=self.config.base_url,
            timeout=self.config.timeout,
            max_retries=self.config.attempts - 1,
            http_client=Guarded(),
        )

    def _key(self) -> str:
        name = self.config.key_env
        if name is None:
            return ""
        key = os.environ.get(name, "").strip()
        if not key:
            raise UserError(
                f"{name} is not set: the judge's key comes from the environment (export {name}=…); "
                "for a server that wants none set key_env to null"
            )
        return key


@functools.cache
def _background() -> Background:
    """The thread in which requests to endpoints are under way."""
    return Background("endpoints")


def _explain(error: Exception) -> str:
    """What happened, in a line: the reply's own words, or the connection's."""
    with needs("judge"):
        import openai
    if isinstance(error, openai.APIStatusError):
        said = error.body.get("message") if isinstance(error.body, dict) else None
        return f"HTTP {error.status_code}: {said or error.message}"
    cause = f" ({error.__cause__})" if error.__cause__ is not None and str(error.__cause__) else ""
    return f"{type(error).__name__}: {error}{cause}"
