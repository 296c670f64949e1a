"""Answers token by token: all rows of all prompts decoded together over cached prompts, leaving as they end.

Prompts of different lengths share every matrix product; only attention is taken per length, so it needs no mask
(DESIGN, lever 9). Noise is keyed by (seed, sample id, token number), so an answer is the same in any batch. It takes
prompts that models/cached.py has computed; it does not know questions, images or tokenizers.

Shape suffixes: B rows, L answer tokens, D width, V vocabulary, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..models import PromptKV, Showo
from ..models.attention import DecodeAttention
from .images import exact

PADDING = -1


@dataclass(frozen=True)
class TextSettings:
    """The numbers of one decoding, equal for all its rows."""

    max_new_tokens: int
    temperature: float
    """0 takes the likeliest token."""
    top_k: int
    """0 samples from the full distribution."""
    seed: int
    end_id: int
    backend: str | None = None


class DecodeByLength:
    """Attention strategy for rows whose prompts differ in length: one `DecodeAttention` for each length.

    Rows must be sorted by prompt length, so that every group is a slice.
    """

    def __init__(self, prompts: PromptKV, prompt_of_row: Sequence[int], max_new: int):
        lengths = [prompts.lengths[prompt] for prompt in prompt_of_row]
        if lengths != sorted(lengths):
            raise ValueError("rows must be sorted by the length of their prompts")
        self._groups: list[tuple[int, DecodeAttention]] = []
        for length in dict.fromkeys(lengths):
            rows = [prompt for prompt, its in zip(prompt_of_row, lengths, strict=True) if its == length]
            self._groups.append((len(rows), DecodeAttention(prompts, rows, max_new)))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if len(self._groups) == 1:
            return self._groups[0][1](layer, q, k, v)
        parts, start = [], 0
        for rows, attend in self._groups:
            part = slice(start, start + rows)
            parts.append(attend(layer, q[part], k[part], v[part]))
            start += rows
        return torch.cat(parts)

    def keep(self, kept: list[bool]) -> None:
        """Drop the rows whose flag is False."""
        groups, start = [], 0
        for rows, attend in self._groups:
            places = [place for place in range(rows) if kept[start + place]]
            if places and len(places) < rows:
                attend.keep_rows(torch.tensor(places))
            if places:
                groups.append((len(places), attend))
            start += rows
        self._groups = groups

    def advance(self) -> None:
        """The position just written becomes part of the past."""
        for _, attend in self._groups:
            attend.advance()


def decode(
    model: Showo,
    prompts: PromptKV,
    last_hidden: Tensor,
    prompt_of_row: Sequence[int],
    sample_ids: Sequence[int],
    settings: TextSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens int64 [B, L] with −1 after the end token, logp float32 [B, L] with 0 there, lengths int64 [B]).

    `last_hidden` [P, D] is each prompt's state before its first answer token.
    """
    order = sorted(range(len(prompt_of_row)), key=lambda row: (prompts.lengths[prompt_of_row[row]], row))
    alive = list(order)
    device = last_hidden.device
    weight, bias = (exact(part.detach()) for part in model.text_head())
    tokens = torch.full((len(order), settings.max_new_tokens), PADDING, device=device)
    logp = torch.zeros(len(order), settings.max_new_tokens, device=device)
    attend = DecodeByLength(prompts, [prompt_of_row[row] for row in order], settings.max_new_tokens)
    hidden = last_hidden[[prompt_of_row[row] for row in order]]
    for step in range(settings.max_new_tokens):
        rows = torch.tensor(alive, device=device)
        samples = torch.tensor([sample_ids[row] for row in alive], device=device)
        drawn, chance = ops.sample_categorical(
            F.linear(exact(hidden), weight, bias),
            temperature=settings.temperature,
            top_k=settings.top_k,
            seed=settings.seed,
            sample_ids=samples,
            step=step,
            backend=settings.backend,
        )
        tokens[rows, step], logp[rows, step] = drawn, chance.to(logp.dtype)
        goes_on = (drawn != settings.end_id).tolist()
        if step + 1 == settings.max_new_tokens or not any(goes_on):
            break
        if not all(goes_on):
            attend.keep(goes_on)
            alive = [row for row, flag in zip(alive, goes_on, strict=True) if flag]
            drawn = drawn[torch.tensor(goes_on, device=device)]
        positions = torch.tensor([[prompts.next_position[prompt_of_row[row]] + step] for row in alive], device=device)
        hidden = model.encode(model.embed(drawn[:, None]), positions, attend)[:, 0]
        attend.advance()
    lengths = (tokens != PADDING).sum(1)
    longest = int(lengths.max())
    return tokens[:, :longest].clone(), logp[:, :longest].clone(), lengths
