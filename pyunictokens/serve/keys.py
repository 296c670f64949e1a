"""Who may ask, for which models, and how often: API keys, compared in constant time, with limits of their own.

One key comes from an environment variable; many come from a file:

    - name: ann
      key: some-long-random-text
      priority: 1
      requests_per_minute: 60
      concurrent: 4
      models: [bo, mug]

Keys are kept as digests. A key is never logged; its name is.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..config.settings import from_mapping
from ..utils.errors import UserError
from ..utils.text import read_text
from ..utils.yaml_text import parse_yaml
from .errors import Refused, too_many

KEY, KEY_FILE = "PYUNICTOKENS_SERVE_KEY", "PYUNICTOKENS_SERVE_KEY_FILE"
"""The environment variables that hold one key, or name the file that holds many."""
SHORTEST = 16


@dataclass(frozen=True)
class KeySettings:
    """One key and what it may do."""

    name: str = "default"
    """Stands in the log; its requests share slots fairly with those of other names."""
    key: str = ""
    """At least 16 characters."""
    priority: int = 0
    """Requests of a higher number go first."""
    requests_per_minute: int = 0
    """0: as many as there come."""
    concurrent: int = 0
    """Requests under way at once; 0: as many as there come."""
    models: tuple[str, ...] = ()
    """Models it may ask for; none named means all."""

    def __post_init__(self) -> None:
        if min(self.requests_per_minute, self.concurrent) < 0:
            raise UserError(f"key {self.name!r}: requests_per_minute and concurrent must be ≥ 0 (0: no limit)")


class Client:
    """Whoever has one key."""

    def __init__(self, settings: KeySettings, clock: Callable[[], float] = time.monotonic):
        self.settings, self._clock = settings, clock
        self._left, self._at = float(settings.requests_per_minute), clock()
        self._under_way = 0

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Around one request. Raises Refused (429) where there are too many."""
        limit = self.settings.concurrent
        if limit and self._under_way >= limit:
            raise too_many(f"{self._under_way} requests of this key are under way: the limit is {limit}", 1.0)
        self._take()
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    def _take(self) -> None:
        """One of the requests of this minute: a bucket that fills evenly."""
        most = self.settings.requests_per_minute
        if not most:
            return
        now = self._clock()
        self._left = min(float(most), self._left + (now - self._at) * most / 60)
        self._at = now
        if self._left < 1:
            wait = (1 - self._left) * 60 / most
            raise too_many(f"more than {most} requests a minute with this key: ask again later", wait)
        self._left -= 1

    def may_ask(self, model: str) -> bool:
        return not self.settings.models or model in self.settings.models


class Keys:
    """All keys. Without any, everybody is the one client `nobody`."""

    def __init__(self, settings: list[KeySettings], clock: Callable[[], float] = time.monotonic):
        for each in settings:
            if len(each.key.strip()) < SHORTEST:
                raise UserError(
                    f"key {each.name!r} has {len(each.key.strip())} characters: must have at least {SHORTEST}; "
                    'python -c "import secrets; print(secrets.token_urlsafe(32))" makes one'
                )
            if not each.key.isascii():
                raise UserError(f"key {each.name!r} has letters beyond ASCII: clients cannot send them in a header")
        for field in ("name", "key"):
            values = [str(getattr(each, field)) for each in settings]
            if len(set(values)) < len(values):
                raise UserError(f"two keys have the same {field}: each needs its own")
        self._clients = [
            (_digest(each.key.strip().encode()), Client(replace(each, key=""), clock)) for each in settings
        ]
        self.nobody = Client(KeySettings("nobody"), clock)

    def __len__(self) -> int:
        return len(self._clients)

    @classmethod
    def from_environment(cls, file: Path | None = None) -> Keys:
        """The keys of `file`, or of the file or the key that the environment names; none where neither is."""
        named = os.environ.get(KEY_FILE, "")
        if file is None and named:
            file = Path(named)
        if file is not None:
            return cls(_read(file))
        key = os.environ.get(KEY, "")
        return cls([KeySettings(key=key)] if key else [])

    def client(self, authorization: str | None) -> Client:
        """Whoever sends this Authorization header. Raises Refused (401)."""
        if not self._clients:
            return self.nobody
        scheme, _, given = (authorization or "").partition(" ")
        digest, found = _digest(given.strip().encode()), None
        for each, client in self._clients:  # all of them, so that the time says nothing
            if hmac.compare_digest(each, digest):
                found = client
        if found is None or scheme.lower() != "bearer":
            what = "no API key" if not authorization else "an API key that is not known here"
            raise Refused(401, f"{what}: send it as `Authorization: Bearer KEY`", code="invalid_api_key")
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _read(file: Path) -> list[KeySettings]:
    values = parse_yaml(read_text(file), str(file))
    if not isinstance(values, list) or not values:
        raise UserError(f"{file}: must be a list of keys, each with name and key")
    keys = []
    for place, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise UserError(f"{file}: entry {place + 1} must be a table with name and key")
        keys.append(from_mapping(KeySettings, value, origin=f"{file}: entry {place + 1}"))
    return keys
