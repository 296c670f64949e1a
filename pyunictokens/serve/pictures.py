"""Pictures in and out of requests: limits before anything is decoded, and decoding beside the event loop.

A picture comes as a file of a form or as a ``data:`` URL. No other address is fetched: a server that fetches what a
client names can be sent anywhere.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeVar

from torch import Tensor

from ..data.images import read_image_bytes, to_pil
from ..utils.errors import UserError
from .errors import Refused

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
Format = Literal["png", "jpeg", "webp"]
_DATA = re.compile(r"data:image/[a-z0-9.+-]{1,40}(?:;[a-z0-9=._-]{1,40})*;base64,", re.IGNORECASE)


class Pictures:
    """Decodes and encodes, a few at a time: a small file may hold a picture of hundreds of megabytes. most_pixels: of a
    picture that is sent."""

    def __init__(self, most_pixels: int = 40_000_000, at_once: int = 4):
        self.most_pixels = most_pixels
        self._room = asyncio.Semaphore(at_once)

    async def use(self, work: Callable[[], T]) -> T:
        """What `work()` gives, which decodes pictures and keeps none of them: in a thread, when it is its turn."""
        async with self._room:
            return await asyncio.to_thread(work)

    def decoded(self, data: bytes, name: str) -> Image:
        """An upright RGB picture, or RGBA where it has transparency. Raises Refused, naming it by `name`."""
        try:
            return read_image_bytes(data, name, self.most_pixels)
        except UserError as error:
            raise Refused(400, str(error), param=name, code="invalid_image") from None

    def of_url(self, url: str, name: str) -> Image:
        """The picture of a ``data:image/…;base64,…`` URL."""
        found = _DATA.match(url)
        if found is None:
            raise Refused(
                400,
                f"{name}: must be a data URL (data:image/png;base64,…); other addresses are not fetched",
                param=name,
                code="invalid_image_url",
            )
        try:
            data = base64.b64decode(url[found.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise Refused(
                400, f"{name}: the base64 of the data URL is damaged", param=name, code="invalid_image"
            ) from None
        return self.decoded(data, name)

    async def encode(self, pixels: Tensor, kind: Format = "png", quality: int = 90) -> str:
        """Pixels [3, H, W] as a base64 file."""
        return await self.use(lambda: _encode(pixels, kind, quality))


def _encode(pixels: Tensor, kind: Format, quality: int) -> str:
    buffer = io.BytesIO()
    options = {} if kind == "png" else {"quality": quality}
    to_pil(pixels).save(buffer, format=kind.upper(), **options)
    return base64.b64encode(buffer.getvalue()).decode()
