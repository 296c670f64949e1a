"""Philox4x32-10 and the noise built on it, in plain torch integers: the definition that every backend follows.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC'11). The layout of the counter is
told below and in docs/ops.md; csrc/include/noise.h has the same. There is no state: a number is a function of its
address.

    key     = (seed[31:0], seed[63:32])
    counter = (sample[31:0], sample[63:32], step·2¹⁶ + position, stream·2²⁸ + ⌊lane/4⌋),    word = lane mod 4

A word w becomes v = min((float32(w) + ½)·2⁻³², 1 − 2⁻²⁴), each operation rounded to nearest even, so v is in (0, 1) and
has the same bits on every backend. u = 1 − v is the uniform number, E = −log u = −log1p(−v) an exponential one and g =
−log E a Gumbel one, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

STREAM_TOKEN = 0
"""Lane k at (step, position) belongs to codebook entry k."""
STREAM_RANK = 1
"""Lane 0 at (step, position) is the re-masking noise of that position."""
STREAM_TEXT = 2
"""Lane k at (answer token, position 0) belongs to vocabulary entry k."""

MAX_STEP = 0xFFFF
MAX_POSITION = 0xFFFF
MAX_LANES = 1 << 30

_WORD = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_KEY_STEP = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds of Philox4x32: counter int64 [..., 4] and key int64 [..., 2] of 32-bit words to int64 [..., 4].

    Leading dimensions broadcast.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    return torch.stack(torch.broadcast_tensors(*_rounds(c0, c1, c2, c3, k0, k1)), dim=-1)


def _rounds(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor | int, k1: Tensor | int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 64-bit products wrap in int64; their halves are cut out with masks."""
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEP[0]) & _WORD, (k1 + _KEY_STEP[1]) & _WORD
    return c0, c1, c2, c3


def words(seed: int, sample_ids: Tensor, step: Tensor, position: Tensor, lanes: int, stream: int) -> Tensor:
    """The raw 32-bit words of lanes 0 … lanes−1 for M addresses: three int64 [M] in, int64 [M, lanes] out."""
    blocks = torch.arange((lanes + 3) // 4, device=sample_ids.device)
    shape = (sample_ids.numel(), blocks.numel())
    block = _rounds(
        (sample_ids & _WORD)[:, None].expand(shape),
        ((sample_ids >> 32) & _WORD)[:, None].expand(shape),
        ((step << 16) | position)[:, None].expand(shape),
        (blocks | (stream << 28))[None, :].expand(shape),
        seed & _WORD,
        (seed >> 32) & _WORD,
    )
    return torch.stack(block, dim=-1).flatten(1)[:, :lanes]


def exponential(word: Tensor) -> Tensor:
    """32-bit words (int64) to exponential variates E = −log1p(−v) in float32, the same shape."""
    v = ((word.to(torch.float32) + 0.5) * 2.0**-32).clamp_max(1.0 - 2.0**-24)
    return -torch.log1p(-v)


def gumbel(
    seed: int, sample_ids: Tensor, step: Tensor, position: Tensor, lanes: int, stream: int = STREAM_TOKEN
) -> Tensor:
    """Gumbel noise of M addresses: int64 [M] each for sample, step and position; returns float32 [M, lanes]."""
    return -torch.log(exponential(words(seed, sample_ids, step, position, lanes, stream)))
