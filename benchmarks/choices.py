"""Measure the choices that the fast paths make on a CPU, each side against the other on one thread.

    python -m benchmarks.choices

    attention   prompt and own keys put together, or attended apart and joined (models/joined.py)
    head        a few rows through a large head as W·xᵀ, or as x·Wᵀ (models/vocabulary.py)

Processor time is compared, so that a busy machine matters less; what is printed goes into docs/measured-facts.md.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from pyunictokens.models import PromptKV
from pyunictokens.models.attention import PromptAttention

ROUNDS = 15


def compare(what: str, one: str, first: Callable[[], object], other: str, second: Callable[[], object]) -> None:
    """Print the ratio of the two sides' medians over alternating rounds after a warm-up."""

    def seconds(call: Callable[[], object]) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    seconds(first), seconds(second)
    pairs = [(seconds(first), seconds(second)) for _ in range(ROUNDS)]
    mine, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(f"{what}: {one} {1000 * mine:.2f} ms, {other} {1000 * theirs:.2f} ms, ratio {theirs / mine:.2f}")


def attention(group: int, codes: int, heads: int, width: int, lengths: list[int]) -> None:
    """A group's rows over their prompts and as many over the empty one, as guidance has them."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    every = [*lengths, 3]
    prompts = PromptKV(
        [[draw(heads, length, width)] for length in every], [[draw(heads, length, width)] for length in every], [0]
    )
    rows = sorted(range(group), key=lambda row: row % len(lengths))
    prompt_of_row = [row % len(lengths) for row in rows] + [len(lengths)] * group
    q, k, v = (draw(2 * group, heads, codes + 2, width) for _ in range(3))
    together, joined = (PromptAttention(prompts, prompt_of_row, joined=flag) for flag in (False, True))
    compare(
        f"attention, {group} rows of {codes} codes over {len(lengths)} prompts",
        "together",
        lambda: together(0, q, k, v),
        "joined",
        lambda: joined(0, q, k, v),
    )


def head(rows: int, entries: int, width: int) -> None:
    """`rows` hidden states through a head of `entries` columns."""
    weight, bias, x = torch.randn(entries, width), torch.randn(entries), torch.randn(rows, width)
    compare(
        f"head, {rows} rows, {entries} columns of {width}",
        "W·xᵀ",
        lambda: torch.addmm(bias[:, None], weight, x.T).T.contiguous(),
        "x·Wᵀ",
        lambda: F.linear(x, weight, bias),
    )


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    attention(4, 256, 8, 64, [27])
    attention(9, 64, 4, 32, [20, 31, 40])
    for rows in (1, 4, 8, 9, 16):
        head(rows, 54402, 512)


if __name__ == "__main__":
    main()
