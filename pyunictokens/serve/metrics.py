"""What the server counts, for Prometheus, and one line of JSON a request for the log."""

from __future__ import annotations

import json
import logging
import time
from typing import Protocol

from ..utils.errors import needs

log = logging.getLogger("pyunictokens.serve")

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Working(Protocol):
    """What is asked when somebody looks: processes that take requests, and sums over them."""

    @property
    def ready(self) -> int: ...

    @property
    def running(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    @property
    def resident(self) -> int: ...


class Metrics:
    """Counters of one server."""

    def __init__(self, working: Working):
        with needs("web"):
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = own = CollectorRegistry()
        self.requests = Counter(
            "pyunictokens_requests", "Requests by route and status", ["route", "status"], registry=own
        )
        self.seconds = Histogram(
            "pyunictokens_request_seconds", "Seconds to the last byte", ["route"], buckets=_SECONDS, registry=own
        )
        self.images = Counter("pyunictokens_images", "Images drawn", registry=own)
        self.tokens = Counter("pyunictokens_answer_tokens", "Answer tokens drawn", registry=own)
        self.aborted = Counter("pyunictokens_aborted", "Requests whose client went away", registry=own)
        for name, text, function in (
            ("workers", "Processes that draw and answer", lambda: working.ready),
            ("rows_running", "Images and answers under way", lambda: working.running),
            ("rows_waiting", "Images and answers that wait for a slot", lambda: working.waiting),
            ("concepts_resident", "Concepts at hand beside a base model", lambda: working.resident),
        ):
            Gauge(f"pyunictokens_{name}", text, registry=own).set_function(function)

    def text(self) -> tuple[bytes, str]:
        """(what Prometheus reads, its media type)."""
        with needs("web"):
            from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST


def log_request(**fields: object) -> None:
    """One request, as a line of JSON."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    log.info(json.dumps({"time": now, **fields}, ensure_ascii=False))
