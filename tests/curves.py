"""Curves of reports are painted where a test looks at them, and elsewhere drawn up to that.

Every finished run writes its report, and painting the ten pictures of one takes longer than most runs of the tests.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from PIL import Image

from pyunictokens.evaluate.report import plots

_paint = plots._png


@functools.cache
def _blank() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (96, 32)).save(buffer, "png")
    return buffer.getvalue()


@contextmanager
def unpainted() -> Iterator[None]:
    """All figures are laid out and filled, and come as an empty picture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_png", lambda figure: _blank())
        yield


@contextmanager
def painted() -> Iterator[None]:
    """As a user gets them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_png", _paint)
        yield
