"""Weights that transformers and diffusers read from this machine, without the progress bars that they print."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import needs


@contextmanager
def no_bars() -> Iterator[None]:
    """Inside this context transformers shows no progress bar. Downloads happen before it, and keep theirs."""
    with needs("train"):
        from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
