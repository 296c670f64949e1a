"""One door to an OpenAI-compatible endpoint: the key, retries with back-off and jitter, time-outs, a limit, counters.

Sends chat messages and returns text. Errors that pass (429, 5xx, time-outs, lost connections, replies that are no chat
completion) are tried again, others (a wrong key, an unknown model) are not. The key is read from the environment when a
request is made; it is kept in no field, no message and no log. Scores and caches are judge.py's.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..utils.errors import UserError, require

T = TypeVar("T")
R = TypeVar("R")


class EndpointError(RuntimeError):
    """A request that got no answer. The message says why and how often it was tried; it never holds the key."""


@dataclass(frozen=True)
class EndpointConfig:
    """Where to ask, and how patiently."""

    model: str
    """The model's name at the endpoint, e.g. gpt-4o."""
    base_url: str | None = None
    """The endpoint up to /v1. None: what OPENAI_BASE_URL says, else the client's own default."""
    key_env: str | None = "OPENAI_API_KEY"
    """The environment variable that holds the key. None: the endpoint wants none (a local server)."""
    timeout: float = 60.0
    """Seconds one attempt may take to connect, to send, and between two bytes of the reply."""
    attempts: int = 5
    """How often one request is tried before it is given up."""
    backoff: float = 1.0
    """Seconds before the second attempt; doubled each time, and shortened by chance to between half and all of it."""
    backoff_limit: float = 30.0
    """The longest wait in seconds, also where the server asks for more."""
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
        for name, low in (("timeout", 0.0), ("backoff", -1e-9), ("backoff_limit", -1e-9)):
            value = getattr(self, name)
            if not low < value < float("inf"):
                raise UserError(f"{name}={value}: must be a finite number of seconds {'> 0' if low == 0 else '≥ 0'}")
        for name in ("attempts", "concurrency"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.limit_field not in {"max_tokens", "max_completion_tokens"}:
            raise UserError(f"limit_field={self.limit_field!r}: must be max_tokens or max_completion_tokens")
        for name in ("price_prompt", "price_completion"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name}={getattr(self, name)}: must be a finite price ≥ 0")


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

    def latency(self, share: float = 0.5) -> float:
        """The latency that `share` of the answered requests stayed within; 0 before the first one."""
        if not self.seconds:
            return 0.0
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def summary(self) -> dict[str, float | int]:
        """Numbers for a log or a report."""
        counts = {name: getattr(self, name) for name in ("answered", "retried", "failed", "cached")}
        tokens = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return {**counts, **tokens, "cost": self.cost, "p50_s": self.latency(0.5), "p95_s": self.latency(0.95)}


@dataclass(frozen=True)
class Reply:
    """One answer of the endpoint."""

    text: str
    seconds: float
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Endpoint:
    """Sends chat messages to one model. Safe to use from several threads.

    sleep, chance: the clock and the dice of the back-off, replaced by tests.
    """

    def __init__(
        self,
        config: EndpointConfig,
        *,
        sleep: Callable[[float], None] = time.sleep,
        chance: Callable[[], float] = random.random,
    ):
        self.config = config
        self.counters = Counters()
        self._sleep, self._chance = sleep, chance
        self._limit = threading.Semaphore(config.concurrency)
        self._lock = threading.Lock()
        self._openai: Any = None
        self._made: Any = None

    def chat(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> Reply:
        """The reply to `messages` (role and content, as the endpoint wants them). Raises EndpointError, UserError.

        more: further fields of the request, e.g. ``temperature=1.0, seed=3``; they win over the configuration.
        """
        client = self._client()
        request = self.request(messages, **more)
        begin = time.monotonic()
        why = ""
        for attempt in range(self.config.attempts):
            if attempt:
                self.count(retried=1)
            try:
                with self._limit:
                    made = client.chat.completions.create(**request)
                text, sent, got = _read(made)
            except _NoAnswer as error:
                why, wait = str(error), 0.0
            except self._openai.OpenAIError as error:
                why, wait = self._without_key(_explain(error)), _retry_after(error)
                if not _passes(error):
                    self.count(failed=1)
                    raise EndpointError(f"{self.config.model}: {why}") from None
            except ValueError as error:  # a reply that claims to be JSON and is not
                why, wait = self._without_key(f"a reply that cannot be read: {error}"), 0.0
            else:
                seconds = time.monotonic() - begin
                cost = (sent * self.config.price_prompt + got * self.config.price_completion) / 1e6
                self.count(answered=1, prompt_tokens=sent, completion_tokens=got, cost=cost)
                with self._lock:
                    self.counters.seconds.append(seconds)
                return Reply(text, seconds, sent, got)
            if attempt + 1 < self.config.attempts:
                self._sleep(self._wait(attempt, wait))
        self.count(failed=1)
        raise EndpointError(f"{self.config.model}: {why} (given up after {self.config.attempts} attempts)")

    def request(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        """The fields a request is made of; what a cache is keyed by."""
        fields: dict[str, Any] = {"model": self.config.model, "messages": [dict(message) for message in messages]}
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

    def _client(self) -> Any:
        with self._lock:
            if self._made is None:
                self._openai = require("openai", "judge")
                self._made = self._openai.OpenAI(
                    api_key=self._key() or "none",
                    base_url=self.config.base_url,
                    timeout=self.config.timeout,
                    max_retries=0,  # retries are made here, where they are counted
                )
            return self._made

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

    def _without_key(self, text: str) -> str:
        key = os.environ.get(self.config.key_env, "").strip() if self.config.key_env else ""
        return text.replace(key, "[key]") if key else text

    def _wait(self, attempt: int, asked: float) -> float:
        """Seconds before the next attempt: the doubled back-off by chance, or what the server asked for if longer."""
        grown = self.config.backoff * 2.0**attempt * (0.5 + 0.5 * self._chance())
        return min(self.config.backoff_limit, max(grown, asked))

    def count(self, **by: float) -> None:
        """Add to the counters by name."""
        with self._lock:
            for name, amount in by.items():
                setattr(self.counters, name, getattr(self.counters, name) + amount)


class _NoAnswer(Exception):
    """A reply without an answer in it."""


def _read(made: Any) -> tuple[str, int, int]:
    """(text, prompt tokens, completion tokens) of a chat completion."""
    choices = getattr(made, "choices", None)
    if not choices:
        raise _NoAnswer("the reply holds no choices: is this a chat completions endpoint?")
    text = choices[0].message.content
    if not isinstance(text, str):
        raise _NoAnswer(f"the reply holds no text (finish_reason {choices[0].finish_reason})")
    usage = getattr(made, "usage", None)
    return text, int(getattr(usage, "prompt_tokens", 0) or 0), int(getattr(usage, "completion_tokens", 0) or 0)


def _passes(error: Any) -> bool:
    """Whether the same request may succeed later."""
    status = getattr(error, "status_code", None)
    if status is None:
        return True  # the connection: refused, lost, timed out
    if getattr(error, "code", None) == "insufficient_quota":
        return False
    return status in {408, 409, 425, 429} or status >= 500


def _explain(error: Any) -> str:
    status = getattr(error, "status_code", None)
    cause = f" ({error.__cause__})" if error.__cause__ is not None and str(error.__cause__) else ""
    return f"HTTP {status}: {error}" if status is not None else f"{type(error).__name__}: {error}{cause}"


def _retry_after(error: Any) -> float:
    """Seconds the server asks to wait, 0 where it does not say."""
    response = getattr(error, "response", None)
    try:
        return max(0.0, float(response.headers.get("retry-after", 0))) if response is not None else 0.0
    except ValueError:
        return 0.0  # a date: the back-off decides
