"""Serving: requests of many users in one running batch, over models that are open.

`ServingEngine` is stepped by its caller; `AsyncEngine` steps one in a thread and speaks asyncio.
"""

from .asynchronous import AsyncEngine
from .engine import AT_ONCE, BATCH_FROM, ServingEngine
from .queue import DeadlinePassed, QueueFull
from .requests import AnswerRequest, Drawn, Ended, Event, ImageRequest, Preview, Request, Taken, Written

__all__ = [
    "AT_ONCE",
    "BATCH_FROM",
    "AnswerRequest",
    "AsyncEngine",
    "DeadlinePassed",
    "Drawn",
    "Ended",
    "Event",
    "ImageRequest",
    "Preview",
    "QueueFull",
    "Request",
    "ServingEngine",
    "Taken",
    "Written",
]
