"""Everything that goes wrong, in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}`` and a status."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

from ..rollout.serving import DeadlinePassed, QueueFull
from ..rollout.serving.asynchronous import Closing
from ..utils.errors import MissingExtra, NotFinite, UserError
from .catalog import UnknownModel


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.told = Told(status, message, param, code, headers or {})


@dataclass(frozen=True)
class Told:
    """An error as a client reads it."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """OpenAI's type of error."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    @property
    def table(self) -> dict[str, object]:
        """The answer's JSON."""
        told = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": told}

    @property
    def body(self) -> bytes:
        return json.dumps(self.table, ensure_ascii=False).encode()


def too_many(message: str, retry_after: float) -> Refused:
    """Refused for now: the client is told when to ask again."""
    headers = {"retry-after": str(max(1, math.ceil(retry_after)))}
    return Refused(429, message, code="rate_limit_exceeded", headers=headers)


def told(error: BaseException) -> Told:
    """What a client is told of an error. What nobody foresaw is a 500 without details: they stand in the log."""
    if isinstance(error, Refused):
        return error.told
    if isinstance(error, UnknownModel):
        return Told(404, str(error), "model", "model_not_found")
    if isinstance(error, QueueFull):
        return too_many(str(error), error.retry_after).told
    if isinstance(error, DeadlinePassed):
        # OpenAI's client sends a 408 again by itself; whoever set a deadline wants nothing after it
        return Told(408, str(error), "deadline", "deadline_passed", {"x-should-retry": "false"})
    if isinstance(error, Closing):
        return Told(503, str(error), None, "server_ending", {"retry-after": "5"})
    if isinstance(error, (NotFinite, MissingExtra)):
        return Told(500, str(error))
    if isinstance(error, UserError):
        return Told(400, str(error), None, "invalid_value")
    return Told(500, "the server failed at this request; its log says why")
