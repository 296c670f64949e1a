"""Answers of many requests in one batch: rows join and leave between any two tokens, each at a token of its own.

Every row writes its next key and value at its own place of a shared buffer, and what a row has not written yet is
masked; so rows of any age go through the same matrix products. A row's prompt is read where it lies.

Shape suffixes: B rows, H heads, L answer positions, P prompt positions, E head width, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..prefix import Prefix
from .attention import keys_values, own_scores, with_prompts

if TYPE_CHECKING:
    from .model import Showo


class JoiningAttention:
    """One new position a call for every row, over its prompt and its own answer so far."""

    def __init__(self, layers: int, heads: int, width: int, dtype: torch.dtype, device: torch.device):
        empty = torch.zeros(0, heads, 0, width, dtype=dtype, device=device)
        self._keys, self._values = [empty] * layers, [empty] * layers
        self._runs: list[tuple[int, list[Tensor], list[Tensor]]] = []
        """(rows, the prompt's keys, its values by layer) of each join."""
        self._written: list[int] = []
        self._most: list[int] = []
        self._scale = width**-0.5
        self._device = device
        self._at: tuple[Tensor, Tensor | None] | None = None

    def join(self, prompt: Prefix, rows: int, max_new: int) -> None:
        keys, values = keys_values(prompt)
        self._runs.append((rows, keys[0], values[0]))
        self._written += [0] * rows
        self._most += [max_new] * rows
        self._fit(range(len(self._written) - rows))

    def keep_rows(self, rows: Sequence[int]) -> None:
        wanted, left, start = set(rows), [], 0
        for count, keys, values in self._runs:
            kept = sum(row in wanted for row in range(start, start + count))
            if kept:
                left.append((kept, keys, values))
            start += count
        self._runs = left
        self._written, self._most = [self._written[row] for row in rows], [self._most[row] for row in rows]
        self._fit(rows)

    def _fit(self, old: Sequence[int]) -> None:
        """Buffers for the rows there are now, of which the first are the rows `old` of before."""
        rows, long = len(self._written), max(self._most, default=0)
        kept = torch.tensor(old, dtype=torch.int64, device=self._device)
        for buffers in (self._keys, self._values):
            for layer, buffer in enumerate(buffers):
                made = buffer.new_zeros(rows, buffer.shape[1], long, buffer.shape[3])
                both = min(long, buffer.shape[2])
                made[: len(old), :, :both] = buffer[kept, :, :both]
                buffers[layer] = made
        self._at = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._keys[layer], self._values[layer]
        at, nothing = self._places()
        rows = torch.arange(len(at), device=at.device)
        keys[rows, :, at], values[rows, :, at] = k[:, :, 0], v[:, :, 0]
        long = max(self._written) + 1
        keys, values = keys[:, :, :long], values[:, :, :long]
        scores = own_scores(q, keys, self._scale)
        if nothing is not None:
            scores = scores.masked_fill(nothing, -torch.inf)
        runs = [(count, its_keys[layer], its_values[layer]) for count, its_keys, its_values in self._runs]
        return with_prompts(q, scores, values, runs, self._scale)

    def _places(self) -> tuple[Tensor, Tensor | None]:
        """Where each row writes int64 [B], and which places bool [B, 1, 1, L] it has not written; None: it has all."""
        if self._at is None:
            at = torch.tensor(self._written, device=self._device)
            nothing = None
            if len(set(self._written)) > 1:
                places = torch.arange(max(self._written) + 1, device=self._device)
                nothing = (places > at[:, None])[:, None, None]
            self._at = at, nothing
        return self._at

    def advance(self) -> None:
        """The positions just written become part of the past."""
        self._written = [count + 1 for count in self._written]
        self._at = None


class JoinedDecoder:
    """The `JoiningDecoder` of Show-o."""

    def __init__(self, model: Showo):
        config = model.config
        self._model, self._start = model, torch.zeros(0, dtype=torch.int64, device=model.device)
        self._attend = JoiningAttention(
            config.num_hidden_layers, config.num_attention_heads, config.head_dim, model.dtype, model.device
        )

    def join(self, prefix: Prefix, rows: int, max_new: int) -> None:
        begin = torch.full((rows,), prefix.next_position[0], device=self._start.device)
        self._start = torch.cat([self._start, begin])
        self._attend.join(prefix, rows, max_new)

    def __call__(self, x_BD: Tensor) -> Tensor:
        hidden = self._model.encode(x_BD[:, None], self._start[:, None], self._attend)[:, 0]
        self._attend.advance()
        self._start = self._start + 1
        return hidden

    def keep_rows(self, rows: Sequence[int]) -> None:
        self._attend.keep_rows(rows)
        self._start = self._start[torch.tensor(rows, dtype=torch.int64, device=self._start.device)]
