"""Is the wanted text written in the image? An optical reader compared with the prompt's column `text`.

``score = 1 − edits / length``, at least 0: edits is the least number of letters to insert, delete or change between
what is read and what was wanted, spaces and case left out (the measure of flow-based text rendering work). What is read
besides counts as edits, so scribbles beside the text cost.

The reader is the package `rapidocr-onnxruntime` (extra `ocr`), whose wheel holds its own weights, or any function from
pixels to text.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ...utils.errors import UserError, require
from ..base import RewardBatch
from ..networks import to_bytes
from ..registry import register

Reader = Callable[[np.ndarray], str]
"""From an image, uint8 [H, W, 3] RGB, to the text in it, lines from top to bottom."""


@register("ocr", label="OCR: written text")
class Ocr:
    """Scores what is written in each image against its prompt's column `text`.

    reader: a function from an image to its text; by default rapidocr's. least: images are enlarged until their shorter
    side has as many pixels, since readers miss small letters.
    """

    columns = ("text",)

    def __init__(self, reader: Reader | None = None, least: int = 256):
        if isinstance(least, bool) or not isinstance(least, int) or not 1 <= least <= 4096:
            raise UserError(f"least={least!r}: must be a whole number from 1 to 4096")
        self._reader, self._least = reader, least

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores [R] in [0, 1]. Raises UserError naming a prompt without text."""
        wanted = batch.columns.get("text")
        if wanted is None:
            raise UserError("the prompts have no column text: what should be written?")
        scores = []
        for row, pixels in enumerate(to_bytes(batch.images).cpu()):
            text = wanted[row]
            if not isinstance(text, str) or not _letters(text):
                raise UserError(f"prompt {batch.prompts[row]!r}: text={text!r}: must be a text with letters or digits")
            scores.append(likeness(self._read(pixels), text))
        return torch.tensor(scores)

    def _read(self, pixels: Tensor) -> str:
        if self._reader is None:
            self._reader = rapid_reader()
        scale = -(-self._least // min(pixels.shape[-2:]))
        if scale > 1:
            size = (pixels.shape[-2] * scale, pixels.shape[-1] * scale)
            large = torch.nn.functional.interpolate(pixels[None].float(), size, mode="bicubic", align_corners=False)
            pixels = large[0].clamp(0, 255).round().to(torch.uint8)
        return self._reader(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def rapid_reader() -> Reader:
    """rapidocr's reader with the weights of its wheel."""
    engine = require("rapidocr_onnxruntime", "ocr").RapidOCR()

    def read(image: np.ndarray) -> str:
        found, _ = engine(np.ascontiguousarray(image[..., ::-1]))  # it wants BGR
        return " ".join(str(line[1]) for line in found or [])

    return read


def likeness(read: str, wanted: str) -> float:
    """1 − edits / length of `wanted`, at least 0; letters and digits alone count, case does not."""
    a, b = _letters(read), _letters(wanted)
    return max(0.0, 1.0 - edits(a, b) / len(b))


def _letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text.casefold())


def edits(a: str, b: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        corner, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (left != right))
    return row[-1]
