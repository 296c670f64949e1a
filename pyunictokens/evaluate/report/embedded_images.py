"""Images as data URIs, so that a page needs no other file: small ones as PNG, photos as JPEG, large ones shrunk. Needs
Pillow.
"""

from __future__ import annotations

import base64
import io
import os
from typing import TYPE_CHECKING

from torch import Tensor

from ...data.images import fit_within, read_image
from ...utils.errors import needs

if TYPE_CHECKING:
    from PIL.Image import Image

_TILE, _SHEET = 256, 1400  # longest sides on the page: of one image, of a whole grid
_PNG_UP_TO = 160  # images of the toy stay crisp as PNG and small; photos are smaller as JPEG


def each(images: Tensor) -> list[str]:
    """A data URI for each of uint8 [S, 3, H, W]."""
    with needs("evaluate"):
        from PIL import Image

    return [_uri(fit_within(Image.fromarray(one.permute(1, 2, 0).contiguous().numpy()), _TILE)) for one in images]


def file_uri(path: str | os.PathLike[str], longest: int = _SHEET) -> str:
    """An image file, shrunk to `longest` pixels where it is larger. Raises UserError when it cannot be read."""
    return _uri(fit_within(read_image(path, at_least=longest), longest))


def png_uri(data: bytes) -> str:
    """PNG bytes as they are."""
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def on_white(data: bytes) -> bytes:
    """A transparent PNG laid on white, for viewers with a dark background."""
    with needs("evaluate"):
        from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        sheet = Image.new("RGBA", image.size, "white")
        sheet.alpha_composite(image.convert("RGBA"))
    buffer = io.BytesIO()
    sheet.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _uri(image: Image) -> str:
    buffer = io.BytesIO()
    if max(image.size) <= _PNG_UP_TO:
        image.save(buffer, "PNG", optimize=True)
        return png_uri(buffer.getvalue())
    image.convert("RGB").save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
