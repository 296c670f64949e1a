"""Answers that join while others are under way, for any model: those that joined together are decoded by themselves.

It is the definition that a model's own joining decoder is compared with (models/showo/joining.py shares one batch).

Shape suffixes: B rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .prefix import Prefix

if TYPE_CHECKING:
    from .base import AnswerDecoder, AnsweringModel


class SeparateDecoders:
    """An `AnswerDecoder` of `model` for each call of :meth:`join`."""

    def __init__(self, model: AnsweringModel):
        self._model = model
        self._parts: list[tuple[AnswerDecoder, Tensor]] = []
        """Decoders, each with the number int64 [1] of its next token."""
        self._rows: list[int] = []

    def join(self, prefix: Prefix, rows: int, max_new: int) -> None:
        decoder = self._model.decoder(prefix, [0] * rows, max_new, True)
        self._parts.append((decoder, torch.zeros(1, dtype=torch.int64, device=self._model.device)))
        self._rows.append(rows)

    def __call__(self, x_BD: Tensor) -> Tensor:
        hidden = []
        for (decoder, step), x in zip(self._parts, x_BD.split(self._rows), strict=True):
            hidden.append(decoder(x, step))
            decoder.advance()
            step += 1
        return torch.cat(hidden)

    def keep_rows(self, rows: Sequence[int]) -> None:
        left, start = [], 0
        for part, count in zip(self._parts, self._rows, strict=True):
            mine = [row - start for row in rows if start <= row < start + count]
            start += count
            if mine and len(mine) < count:
                part[0].keep_rows(mine)
            if mine:
                left.append((part, len(mine)))
        self._parts, self._rows = [part for part, _ in left], [count for _, count in left]
