"""Embeddings that are asked for again and again, computed once: of reference images, facts and the prompts of a run.

Hundreds of steps score new images against the same references and texts. These two caches compare by value, so they can
never serve stale numbers; what the embeddings mean they do not know.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .base import as_rows

T = TypeVar("T")


class TextCache:
    """Embeddings of texts, [B, D]; each text is encoded once, the least recently used go first when it is full."""

    def __init__(self, encode: Callable[[Sequence[str]], Tensor], limit: int = 4096):
        self._encode = encode
        self._limit = limit
        self._rows: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [len(texts), D] in the order of `texts`."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._rows]
        if missing:
            for text, row in zip(missing, as_rows(self._encode(missing), len(missing), "encode_text"), strict=True):
                self._rows[text] = row.detach()
        rows = [self._rows[text] for text in texts]
        place = next(reversed(self._rows.values())).device  # where the network was last; it may have moved since
        found = torch.stack([row.to(place) for row in rows])
        for text in texts:
            self._rows.move_to_end(text)
        while len(self._rows) > self._limit:
            self._rows.popitem(last=False)
        return found


class ReferenceCache(Generic[T]):
    """What an encoder made of a set of reference images. Holds the last few sets; a set is recognised by its pixels."""

    def __init__(self, encode: Callable[[Tensor], T], sets: int = 4):
        self._encode = encode
        self._sets = sets
        self._known: list[tuple[Tensor, T]] = []

    def __call__(self, pixels: Tensor) -> T:
        """The encoder's result for `pixels` [M, 3, H, W]."""
        for index, (seen, result) in enumerate(self._known):
            if seen.shape == pixels.shape and seen.device == pixels.device and torch.equal(seen, pixels):
                self._known.insert(0, self._known.pop(index))
                return result
        result = self._encode(pixels)
        self._known.insert(0, (pixels.detach().clone(), result))
        del self._known[self._sets :]
        return result
