"""Who a row may look at: the attention strategies of the transformer, and the cache of prompts.

A transformer block hands (layer, q, k, v) to a strategy and gets the attended values back. So one set of blocks serves
the plain full-sequence definition, image steps over a cached prompt (text is causal and blind to the image, hence its
keys and values never change: DESIGN lever 1), and token-by-token text. This file knows shapes and rows; it does not
know embeddings, sampling or what a prompt says.

Shape suffixes: B batch rows, H heads, L new positions, P prompt positions, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attention(Protocol):
    """One layer's attention. q, k, v are [B, H, L, E], rotary already applied; the result is [B, H, L, E]."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


@dataclass
class FullAttention:
    """The definition: every row against its own sequence under a boolean mask [B, L, L] (True = may look), or none.

    With ``record=True`` the keys and values of every layer are kept in `keys` and `values`.
    """

    allowed: Tensor | None = None
    record: bool = False
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.record:
            self.keys.append(k)
            self.values.append(v)
        mask = None if self.allowed is None else self.allowed[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@dataclass
class PromptKV:
    """Keys and values of several prompts, each without padding: per layer and prompt a pair of [H, P, E] tensors.

    `lengths[i]` is P of prompt i, `next_position[i]` the absolute position of what follows it.
    """

    keys: list[list[Tensor]]  # [prompt][layer]
    values: list[list[Tensor]]
    next_position: list[int]

    @property
    def lengths(self) -> list[int]:
        return [layers[0].shape[1] for layers in self.keys]

    def __len__(self) -> int:
        return len(self.keys)

    def __add__(self, other: PromptKV) -> PromptKV:
        return PromptKV(self.keys + other.keys, self.values + other.values, self.next_position + other.next_position)

    def select(self, prompts: Sequence[int]) -> PromptKV:
        """The prompts of the given indices, in that order. Nothing is copied."""
        return PromptKV(
            [self.keys[i] for i in prompts], [self.values[i] for i in prompts], [self.next_position[i] for i in prompts]
        )

    def leaves(self) -> PromptKV:
        """The same numbers cut from their graph, as leaves that collect gradients (DESIGN lever 5)."""

        def cut(layers: list[Tensor]) -> list[Tensor]:
            return [tensor.detach().requires_grad_() for tensor in layers]

        return PromptKV([cut(x) for x in self.keys], [cut(x) for x in self.values], list(self.next_position))

    def backward_from(self, leaves: PromptKV) -> None:
        """Send the gradients that `leaves` collected back through the graph these keys and values came from."""
        live, gradients = [], []
        for mine, theirs in ((self.keys, leaves.keys), (self.values, leaves.values)):
            for layers, leaf_layers in zip(mine, theirs, strict=True):
                for tensor, leaf in zip(layers, leaf_layers, strict=True):
                    if tensor.requires_grad and leaf.grad is not None:
                        live.append(tensor)
                        gradients.append(leaf.grad)
        if live:
            torch.autograd.backward(live, gradients)


class PromptAttention:
    """Image rows over cached prompts: row b sees all of prompt `prompt_of_row[b]` and all of its own L positions.

    Rows are taken in groups of equal prompt length, so no mask and no padding is needed and any flash kernel fits. A
    group whose rows share one prompt broadcasts it instead of copying it.
    """

    def __init__(self, prompts: PromptKV, prompt_of_row: Sequence[int]):
        lengths = prompts.lengths
        groups: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompt_of_row):
            groups.setdefault(lengths[prompt], []).append(row)
        self.rows = len(prompt_of_row)
        self._groups = []
        for rows in groups.values():
            chosen = [prompt_of_row[row] for row in rows]
            contiguous = rows == list(range(rows[0], rows[0] + len(rows)))
            where = slice(rows[0], rows[0] + len(rows)) if contiguous else torch.tensor(rows)
            self._groups.append((where, len(rows), chosen))
        self._prompts = prompts

    def _of_group(self, layers: list[list[Tensor]], layer: int, chosen: list[int]) -> Tensor:
        if len(set(chosen)) == 1:
            return layers[chosen[0]][layer].unsqueeze(0).expand(len(chosen), -1, -1, -1)
        return torch.stack([layers[prompt][layer] for prompt in chosen])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if len(self._groups) == 1 and self._groups[0][1] == q.shape[0]:
            return self._attend(layer, q, k, v, self._groups[0][2])
        parts = []
        for where, _, chosen in self._groups:
            where = where.to(q.device) if isinstance(where, Tensor) else where
            parts.append((where, self._attend(layer, q[where], k[where], v[where], chosen)))
        slices = {where.start: part for where, part in parts if isinstance(where, slice)}
        if len(slices) == len(parts):
            return torch.cat([slices[start] for start in sorted(slices)])
        order = torch.cat(
            [w if isinstance(w, Tensor) else torch.arange(w.start, w.stop, device=q.device) for w, _ in parts]
        )
        return torch.cat([part for _, part in parts])[torch.argsort(order)]

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, chosen: list[int]) -> Tensor:
        keys = torch.cat([self._of_group(self._prompts.keys, layer, chosen), k], dim=2)
        values = torch.cat([self._of_group(self._prompts.values, layer, chosen), v], dim=2)
        mask = self._mask(keys.shape[2] - k.shape[2], q.shape[2], q.device)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)

    def _mask(self, past: int, length: int, device: torch.device) -> Tensor | None:
        return None


class CausalAfterPrompt(PromptAttention):
    """Text rows after cached prompts, all new positions at once: position j sees its prompt and new positions ≤ j.

    This is how the update scores whole answers; padding at the end of a row is harmless, nothing before it sees it.
    """

    def _mask(self, past: int, length: int, device: torch.device) -> Tensor | None:
        new = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        return torch.cat([new.new_ones(length, past), new], dim=1)


class DecodeAttention:
    """Token-by-token text: static buffers hold each row's prompt and its answer so far; one new position a call.

    Rows must all belong to prompts of one length (decode groups of equal length side by side). Call :meth:`advance`
    after each token.
    """

    def __init__(self, prompts: PromptKV, prompt_of_row: Sequence[int], max_new: int):
        lengths = {prompts.lengths[prompt] for prompt in prompt_of_row}
        if len(lengths) != 1:
            raise ValueError(f"prompt lengths {sorted(lengths)}: one DecodeAttention serves prompts of one length")
        self.filled = lengths.pop()
        first = prompts.keys[0][0]
        shape = (len(prompt_of_row), first.shape[0], self.filled + max_new, first.shape[2])
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        for layer in range(len(prompts.keys[0])):
            for store, source in ((self._keys, prompts.keys), (self._values, prompts.values)):
                buffer = first.new_empty(shape)
                buffer[:, :, : self.filled] = torch.stack([source[prompt][layer] for prompt in prompt_of_row])
                store.append(buffer)

    def keep_rows(self, rows: Tensor) -> None:
        """Drop every row but those of the index tensor `rows` (answers that ended need no more work)."""
        self._keys = [buffer[rows] for buffer in self._keys]
        self._values = [buffer[rows] for buffer in self._values]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        end = self.filled + k.shape[2]
        self._keys[layer][:, :, self.filled : end] = k
        self._values[layer][:, :, self.filled : end] = v
        return F.scaled_dot_product_attention(q, self._keys[layer][:, :, :end], self._values[layer][:, :, :end])

    def advance(self) -> None:
        """The position just written becomes part of the past."""
        self.filled += 1
