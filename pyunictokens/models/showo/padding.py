"""Prompts of different lengths in tensors of one shape, masked exactly and without a mask.

    score(q, k) = scale · (q·k + 1·mark),   mark = 0 at a prompt's own positions, a huge negative number at padding

Padded keys carry one more feature, the mark, and queries a one in its place. The scores of the prompt's own positions
gain an exact zero, and the weight of padding underflows to exactly 0. So what is masked lies in the keys, any flash
kernel reads it, and a step that was captured over such tensors serves every prompt that fits into them: its keys are
copied in.

Shape suffixes: H heads, P positions of a prompt, E head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..prefix import Prefix

FEATURES = 8
"""Features that padded keys have more, of which the first is the mark: flash kernels want multiples of 8."""

GRAIN = 128
"""Prompts are padded to a multiple of this many positions, or to the longest that the model reads."""


def padded_length(length: int, longest: int) -> int:
    """The positions that a prompt of `length` is given."""
    return min(-(-length // GRAIN) * GRAIN, longest)


def padded(prompts: Prefix, length: int) -> Prefix:
    """`prompts` with keys and values [H, length, E + 8] in place of [H, P, E]; their own positions come first."""

    def wider(tensor: Tensor, mark: bool) -> Tensor:
        room = (0, FEATURES, 0, length - tensor.shape[1])
        made = F.pad(tensor, room)
        if mark:
            made[:, tensor.shape[1] :, tensor.shape[2]] = hidden_mark(tensor.dtype)
        return made

    half = len(prompts.parts[0]) // 2
    parts = [[wider(each, place < half) for place, each in enumerate(part)] for part in prompts.parts]
    made = prompts.with_tensors([tensor for part in parts for tensor in part])
    made.lengths = [length] * len(parts)
    return made


def hidden_mark(dtype: torch.dtype) -> float:
    """What padding has for a mark: a number of `dtype`, after which a score's weight is 0 in every precision."""
    return -(2.0**15) if dtype == torch.float16 else -(2.0**96)


def reading_marks(q: Tensor) -> Tensor:
    """Queries [..., E] as padded keys want them, [..., E + 8]: a one at the mark."""
    one = q.new_ones(*q.shape[:-1], 1)
    return torch.cat([q, one, one.new_zeros(*q.shape[:-1], FEATURES - 1)], dim=-1)
