"""Who a row may look at: the attention strategies of the transformer, and the cache of prompts.

A transformer block hands (layer, q, k, v) to a strategy and gets the attended values back. So one set of blocks serves
the plain full-sequence definition, image steps over a cached prompt (text is causal and blind to the image, hence its
keys and values never change), and token-by-token text.

Shape suffixes: B batch rows, H heads, L new positions, P prompt positions, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...utils.profiling import taken
from ..prefix import Prefix
from ..sdpa import attend
from .kernels import TOGETHER, Kernel, kernel_for
from .padding import FEATURES, reading_marks
from .shared_prefix import joined_attention


class Attention(Protocol):
    """One layer's attention. q, k, v are [B, H, L, E], rotary already applied; the result is [B, H, L, E]."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


@dataclass
class FullAttention:
    """The definition: every row against its own sequence under a boolean mask [B, L, L] (True = may look), or none.

    `causal` needs no mask: position j sees those ≤ j.
    """

    allowed: Tensor | None = None
    causal: bool = False

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = None if self.allowed is None else self.allowed[:, None]
        return attend(q, k, v, mask, self.causal)


@dataclass
class Recorded:
    """Another strategy whose new keys and values are kept, one pair of [B, H, L, E] a layer."""

    attend: Attention
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys.append(k)
        # A part of a product of queries, keys and values would keep all of it.
        self.values.append(v if v.untyped_storage().nbytes() <= v.nbytes else v.clone())
        return self.attend(layer, q, k, v)

    def prompts(self, end: int) -> PromptKV:
        """What was kept, row by row, as prompts that end before position `end`."""
        rows = range(self.keys[0].shape[0])
        keys, values = ([[layer[row] for layer in part] for row in rows] for part in (self.keys, self.values))
        return PromptKV(keys, values, [end] * len(rows))


class PromptKV(Prefix):
    """Keys and values of several prompts, each without padding: per prompt and layer a pair of [H, P, E] tensors.

    A prompt's `parts` are the keys of all layers, then the values of all layers.
    """

    def __init__(self, keys: list[list[Tensor]], values: list[list[Tensor]], next_position: Sequence[int]):
        parts = [[*mine, *theirs] for mine, theirs in zip(keys, values, strict=True)]
        super().__init__(parts, [layers[0].shape[1] for layers in keys], next_position)

    @property
    def keys(self) -> list[list[Tensor]]:
        """[prompt][layer]"""
        return keys_values(self)[0]

    @property
    def values(self) -> list[list[Tensor]]:
        """[prompt][layer]"""
        return keys_values(self)[1]

    def followed_by(self, more: PromptKV) -> PromptKV:
        """Each prompt with the positions of the same one of `more` behind its own."""

        def join(mine: list[list[Tensor]], theirs: list[list[Tensor]]) -> list[list[Tensor]]:
            return [
                [torch.cat(pair, dim=1) for pair in zip(first, second, strict=True)]
                for first, second in zip(mine, theirs, strict=True)
            ]

        return PromptKV(join(self.keys, more.keys), join(self.values, more.values), more.next_position)


def keys_values(prompts: Prefix) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """(keys, values) of prompts, each [prompt][layer]."""
    keys = [part[: len(part) // 2] for part in prompts.parts]
    return keys, [part[len(part) // 2 :] for part in prompts.parts]


class PromptAttention:
    """Image rows over cached prompts: row b sees all of prompt `prompt_of_row[b]` and all of its own L positions.

    There is no mask and no padding, whatever lengths the prompts have. On a GPU the rows of all prompts go through one
    kernel for their own positions, and each prompt is read where it lies by all its rows (shared_prefix.py). Elsewhere
    keys are put together, which is the faster of the two there (docs/measured-facts.md): rows are taken in groups of
    equal prompt length, and a group whose rows share one prompt broadcasts it. `joined` chooses by hand. Prompts may be
    padded (padding.py).
    """

    causal = False

    def __init__(self, prompts: Prefix, prompt_of_row: Sequence[int], joined: bool | None = None):
        groups: dict[tuple[int, int], list[int]] = {}
        for row, prompt in enumerate(prompt_of_row):
            groups.setdefault((prompts.lengths[prompt], prompts.parts[prompt][0].shape[-1]), []).append(row)
        self.rows = len(prompt_of_row)
        self._groups = []
        for rows in groups.values():
            chosen = [prompt_of_row[row] for row in rows]
            contiguous = rows == list(range(rows[0], rows[0] + len(rows)))
            where = slice(rows[0], rows[0] + len(rows)) if contiguous else torch.tensor(rows)
            self._groups.append((where, len(rows), chosen))
        (self._keys, self._values), self._joined = keys_values(prompts), joined
        self._runs = runs_of(prompt_of_row)

    def _of_group(self, layers: list[list[Tensor]], layer: int, chosen: list[int]) -> Tensor:
        if len(set(chosen)) == 1:
            return layers[chosen[0]][layer].unsqueeze(0).expand(len(chosen), -1, -1, -1)
        return torch.stack([layers[prompt][layer] for prompt in chosen])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._joined if self._joined is not None else q.is_cuda and self._one_kernel(layer, q):
            runs = [(count, self._keys[prompt][layer], self._values[prompt][layer]) for prompt, count in self._runs]
            return joined_attention(q, k, v, runs, causal=self.causal)
        taken("shared-prefix attention", TOGETHER)
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

    def _one_kernel(self, layer: int, q: Tensor) -> bool:
        """Whether a kernel that gives its log-sum-exp takes rows like `q` and all the prompts."""
        every = [self._keys[prompt][layer] for prompt, _ in self._runs]
        return all(kernel_for(each) is not None for each in (q, max(every, key=lambda keys: keys.shape[-1])))

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, chosen: list[int]) -> Tensor:
        width = q.shape[-1]
        if self._keys[chosen[0]][layer].shape[-1] != width:  # padded prompts
            q, k, v = reading_marks(q), F.pad(k, (0, FEATURES)), F.pad(v, (0, FEATURES))
        keys = torch.cat([self._of_group(self._keys, layer, chosen), k], dim=2)
        values = torch.cat([self._of_group(self._values, layer, chosen), v], dim=2)
        mask = None
        if self.causal:
            past = keys.shape[2] - k.shape[2]
            new = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
            mask = torch.cat([new.new_ones(q.shape[2], past), new], dim=1)
        return attend(q, keys, values, mask, scale=width**-0.5)[..., :width]


class CausalAfterPrompt(PromptAttention):
    """Text rows after cached prompts, all new positions at once: position j sees its prompt and new positions ≤ j.

    This is how the update scores whole answers; padding at the end of a row is harmless, nothing before it sees it.
    """

    causal = True


class DecodeAttention:
    """Token-by-token text: one new position a call for every row, over its prompt and its answer so far.

    Rows of one prompt stand together and read its keys and values where they lie, without a copy a row; prompts may
    have any lengths. Answers lie in static buffers of `max_new` positions, and the position written next is a number on
    the device, so a step can be captured. With ``sliced=True`` (for a host that runs every step) attention ends at the
    position just written; otherwise it goes over the whole buffer and masks what is not written yet. Call
    :meth:`advance` after each token.
    """

    def __init__(self, prompts: Prefix, prompt_of_row: Sequence[int], max_new: int, sliced: bool = True):
        (self._past_keys, self._past_values), self._sliced = keys_values(prompts), sliced
        self._runs = runs_of(prompt_of_row)
        if len({prompt for prompt, _ in self._runs}) != len(self._runs):
            raise ValueError("rows of one prompt must stand together")
        first = self._past_keys[0][0]
        kernel_for(first[None])  # a kernel is tried when it is first asked for, which must not be within a capture
        shape = (len(prompt_of_row), first.shape[0], max_new, first.shape[2])
        layers = range(len(self._past_keys[0]))
        self._keys = [first.new_zeros(shape) for _ in layers]
        self._values = [first.new_zeros(shape) for _ in layers]
        self._scale = first.shape[2] ** -0.5
        self.filled = 0
        """Positions written, as the host counts them."""
        self._at = torch.zeros(1, dtype=torch.int64, device=first.device)
        self._places = torch.arange(max_new, device=first.device)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop every row but those of the given indices, in ascending order (answers that ended need no more work)."""
        kept, wanted = torch.tensor(rows, device=self._at.device), set(rows)
        self._keys = [buffer[kept] for buffer in self._keys]
        self._values = [buffer[kept] for buffer in self._values]
        left, start = [], 0
        for prompt, count in self._runs:
            count_left = sum(row in wanted for row in range(start, start + count))
            if count_left:
                left.append((prompt, count_left))
            start += count
        self._runs = left

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._keys[layer], self._values[layer]
        if self._sliced:
            keys[:, :, self.filled : self.filled + 1] = k
            values[:, :, self.filled : self.filled + 1] = v
            keys, values = keys[:, :, : self.filled + 1], values[:, :, : self.filled + 1]
        else:
            keys.index_copy_(2, self._at, k)
            values.index_copy_(2, self._at, v)
        scores = own_scores(q, keys, self._scale)
        if not self._sliced:
            scores = scores.masked_fill(self._places > self._at, -torch.inf)
        pasts = [
            (count, self._past_keys[prompt][layer], self._past_values[prompt][layer]) for prompt, count in self._runs
        ]
        return with_prompts(q, scores, values, pasts, self._scale)

    def advance(self, going: Tensor | int = 1) -> None:
        """The position just written becomes part of the past, unless `going` (0 or 1) is 0."""
        self.filled += 1
        self._at += going


def runs_of(prompt_of_row: Sequence[int]) -> list[tuple[int, int]]:
    """(prompt, number of rows) of each run of rows with one prompt."""
    return [(prompt, len(list(rows))) for prompt, rows in groupby(prompt_of_row)]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def own_scores(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Scores [B, H, 1, L], at least float32, of q [B, H, 1, E] over the answers' own keys [B, H, L, E]."""
    wide = _wide(q)
    return (q * scale if q.dtype == wide else q.to(wide) * scale) @ keys.to(wide).transpose(-1, -2)


def with_prompts(
    q: Tensor, scores: Tensor, values: Tensor, runs: Sequence[tuple[int, Tensor, Tensor]], scale: float
) -> Tensor:
    """One new position of every row over its prompt and its answer: [B, H, 1, E].

    `scores` are :func:`own_scores`, −inf where there is nothing, `values` [B, H, L, E] theirs; `runs` lists (rows, the
    prompt's keys [H, P, E], its values) in the order of the rows.
    """
    narrow = kernel_for(q) if q.dtype != scores.dtype else None
    parts, start = [], 0
    for count, past_keys, past_values in runs:
        rows = slice(start, start + count)
        own, own_values = scores[rows].transpose(0, 2), values[rows]
        if narrow is None:
            parts.append(_in_one(q[rows].transpose(0, 2), past_keys, past_values, own, own_values, scale))
        else:
            parts.append(_in_two(narrow, q[rows].transpose(0, 2), past_keys, past_values, own, own_values))
        start += count
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _in_one(q: Tensor, keys: Tensor, values: Tensor, own: Tensor, own_values: Tensor, scale: float) -> Tensor:
    """One softmax over prompt and answer: q [1, H, G, E], the prompt's [H, P, E], scores [1, H, G, L] of the answer's
    positions, values [G, H, L, E]; in at least float32."""
    past = (q.to(own.dtype) * scale) @ keys.to(own.dtype).transpose(-1, -2)
    weights = torch.cat([past, own], dim=-1).softmax(-1)
    over_prompt = weights[..., : keys.shape[1]] @ values.to(own.dtype)
    over_own = weights[..., keys.shape[1] :].transpose(0, 2) @ own_values.to(own.dtype)
    return (over_prompt.transpose(0, 2) + over_own).to(q.dtype)


def _in_two(kernel: Kernel, q: Tensor, keys: Tensor, values: Tensor, own: Tensor, own_values: Tensor) -> Tensor:
    """The same for narrow types, whose prompt a flash kernel reads as it is; the parts are joined in float32."""
    over_prompt, lse, _ = kernel.forward(q, keys[None], values[None], False)
    over_own = own.softmax(-1).transpose(0, 2) @ own_values.float()
    share = torch.sigmoid(own.logsumexp(-1) - lse)[..., None].transpose(0, 2)  # of the answer's part
    return torch.lerp(over_prompt.float().transpose(0, 2), over_own, share).to(q.dtype)
