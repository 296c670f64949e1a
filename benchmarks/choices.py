"""Measure the choices that the fast paths make on a CPU, each side against the other on one thread.

    python -m benchmarks.choices                 # --only uvit: some of them

    attention   prompt and own keys put together, or attended apart and joined (models/showo/shared_prefix.py)
    buffers     a layer of an image step over buffers that stay, or with keys put together (models/showo/buffers.py)
    adjoining   queries, keys and values from one product, or from three (models/adjoining.py)
    head        a few rows through a large head as W·xᵀ, or as x·Wᵀ (models/showo/vocabulary.py)
    uvit        attention over 80 keys or 77, a gate copied before its GELU or not, squares summed or torch's norm
                (models/uvit.py)
    compiled    images of the toy model with blocks compiled by torch.compile, or eager (models/showo/compiled.py)
    host        what the host needs for one chunk of maskgit_grpo_loss (kernels/engine.py): Python and torch's dispatch,
                with tiny products on the CPU; Triton's launcher and CUDA's queue are not in it
    pointwise   tanh-GELU, and norm with rotary of queries and keys, by the core or by torch, for one guided image and
                for 32 of the toy (csrc/cpu/pointwise_rows.h)
    products    the core's product with all that goes with it, or torch's product alone (csrc/cpu/head_products.h)

Processor time is compared, so that a busy machine matters less; what is printed goes into docs/measured-facts.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from pyunictokens import RolloutEngine
from pyunictokens.kernels import engine, plan
from pyunictokens.kernels.launch import recording
from pyunictokens.models import PromptKV
from pyunictokens.models.showo.attention import PromptAttention
from pyunictokens.models.showo.buffers import BufferedAttention
from pyunictokens.models.showo.padding import padded
from pyunictokens.ops import gelu, rotary
from pyunictokens.ops.backends import cpu as _native
from pyunictokens.toy.model import load_toy

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


def buffers(group: int, codes: int, heads: int, width: int, lengths: list[int], room: int) -> None:
    """The same rows over prompts padded to `room` positions, as captured steps have them; the empty one is not."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    every = [*lengths, 3]
    prompts = PromptKV(
        [[draw(heads, length, width)] for length in every],
        [[draw(heads, length, width)] for length in every],
        [0] * len(every),
    )
    prompts = padded(prompts.select(range(len(lengths))), room) + prompts.select([len(lengths)])
    prompt_of_row = sorted(row % len(lengths) for row in range(group)) + [len(lengths)] * group
    q, k, v = (draw(2 * group, codes + 2, heads, width).transpose(1, 2) for _ in range(3))
    together = PromptAttention(prompts, prompt_of_row, joined=False)
    stay = BufferedAttention(prompts, prompt_of_row, codes + 2, width)
    with torch.no_grad():
        compare(
            f"attention, {group} rows of {codes} codes over {len(lengths)} padded prompts",
            "buffers",
            lambda: stay(0, q, k, v),
            "together",
            lambda: together(0, q, k, v),
        )


def adjoining(rows: int, positions: int, width: int) -> None:
    """`rows` rows of `positions` through three square layers."""
    x, weight, bias = torch.randn(rows, positions, width), torch.randn(3 * width, width), torch.randn(3 * width)
    layers = list(zip(weight.chunk(3), bias.chunk(3), strict=True))
    compare(
        f"queries, keys and values, {rows} rows of {positions} of {width}",
        "one product",
        lambda: F.linear(x, weight, bias),
        "three",
        lambda: [F.linear(x, *layer) for layer in layers],
    )


def pointwise(rows: int, positions: int, width: int, heads: int) -> None:
    """What stands between the products of a layer of `width`, forward alone."""
    inner = torch.randn(rows, positions, 4 * width)
    compare(
        f"tanh-GELU of {rows} rows of {positions} of {4 * width}",
        "the core",
        lambda: [gelu.tanh_gelu(inner) for _ in range(20)],
        "torch",
        lambda: [F.gelu(inner, approximate="tanh") for _ in range(20)],
    )
    size = width // heads
    q, k = (torch.randn(rows, positions, heads, size).transpose(1, 2) for _ in range(2))
    rest = (*(torch.randn(positions, size // 2) for _ in range(2)), *(torch.randn(size) for _ in range(4)), 1e-5)
    compare(
        f"norm and rotary of {rows} rows of {positions} of {heads} heads of {size}",
        "the core",
        lambda: [rotary.qk_norm_rotary(q, k, *rest) for _ in range(20)],
        "torch",
        lambda: [rotary.qk_norm_rotary(q, k, *rest, backend="reference") for _ in range(20)],
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


def products(tokens: int, width: int, entries: int) -> None:
    """The core: log-probabilities; then the gradient of the scores and those of hidden states or weight."""
    weight, target = torch.randn(entries, width) / width**0.5, torch.randint(0, entries, (tokens,))
    hidden, scores, slope = torch.randn(tokens, width), torch.randn(tokens, entries), torch.randn(tokens)
    size = _native.head_padded(tokens)
    workspace = (entries, torch.empty(size * entries), torch.empty(_native.head_packed(tokens, width, entries, True)))
    chunk = _native.HeadChunk(hidden, (weight, None, 1.0), target, workspace)
    lse, logp, d_hidden, d_weight = (torch.empty(tokens), torch.empty(tokens), torch.empty_like(hidden), weight.clone())
    nothing, case = torch.empty(0), f"{tokens} tokens, {entries} entries of {width}"

    def held(*gradients: torch.Tensor) -> None:  # the scores are what an earlier call left: of no use, and as fast
        chunk.backward(lse, slope, True, (*gradients, nothing))

    compare(
        f"scores and log-softmax, {case}",
        "core",
        lambda: chunk.logprob(lse, logp, None),
        "torch.mm alone",
        lambda: torch.mm(hidden, weight.T, out=scores),
    )
    compare(
        f"gradient of scores and hidden states, {case}",
        "core",
        lambda: held(d_hidden, nothing),
        "torch.mm alone",
        lambda: torch.mm(scores, weight, out=d_hidden),
    )
    compare(
        f"gradient of scores and weight, {case}",
        "core",
        lambda: held(nothing, d_weight),
        "torch.mm alone",
        lambda: d_weight.addmm_(scores.T, hidden),
    )


def uvit(rows: int, codes: int, width: int, keys: int, heads: int) -> None:
    """Parts of aMUSEd's layers for a guided group: `rows` rows, half of which read either of two texts."""
    q = torch.randn(2, heads, rows // 2 * codes, width // heads)
    padded = torch.randn(2, heads, -(-keys // 16) * 16, width // heads)
    bare = padded[:, :, :keys].contiguous()
    seen = torch.zeros(1, 1, 1, padded.shape[2])
    seen[..., keys:] = -torch.inf
    compare(
        f"attention, {rows} rows of {codes} codes over {keys} keys of 2 texts",
        f"padded to {padded.shape[2]}",
        lambda: F.scaled_dot_product_attention(q, padded, padded, attn_mask=seen),
        "as they are",
        lambda: F.scaled_dot_product_attention(q, bare, bare),
    )
    both = torch.randn(rows * codes, 6 * width)

    def copied() -> torch.Tensor:
        value, gate = both.chunk(2, dim=-1)
        return torch.ops.aten.gelu_(gate.contiguous()).mul_(value)

    def where_it_lies() -> torch.Tensor:
        value, gate = both.chunk(2, dim=-1)
        return value * F.gelu(gate)

    compare(f"gated GELU, {rows * codes} rows of {3 * width}", "copied", copied, "where it lies", where_it_lies)
    x = torch.randn(rows, codes, 4 * width)
    compare(
        f"norm over positions, {rows} rows of {codes} codes, width {4 * width}",
        "squares summed",
        lambda: x.square().sum(1, keepdim=True).sqrt_(),
        "torch.norm",
        lambda: torch.norm(x, p=2, dim=1, keepdim=True),
    )


def compiled(group: int, steps: int) -> None:
    """A group of the toy's images without pixels, guided; compiling comes before the clock and takes minutes."""
    model = load_toy(torch.float32).model
    eager, made = RolloutEngine(model), RolloutEngine(model, blocks="compiled")

    def draw(engine: RolloutEngine) -> object:
        return engine.generate_images([[5, 6, 7]], samples=group, steps=steps, guidance_scale=5.0, decode=False)

    draw(made)
    compare(f"{group} images of the toy, {steps} steps", "compiled", lambda: draw(made), "eager", lambda: draw(eager))


def host(tokens: int) -> None:
    """Seconds of `tokens` tokens in chunks of two, less those in chunks of four, are those of tokens / 4 chunks."""
    hidden, weight = torch.randn(2, tokens // 2, 8), torch.randn(16, 8)
    target, old = torch.zeros(2, tokens // 2, dtype=torch.long), torch.zeros(2, tokens // 2)
    fixed = (hidden, weight, target, old, None, torch.ones(2), torch.ones(()), None, None, None)
    numbers = (0.0, 1.0, 0.2, 0.2, 0.0, engine.NEEDS_HIDDEN | engine.NEEDS_WEIGHT, False)

    def seconds(rows: int) -> float:
        def cut(*sizes: int, **options: Any) -> plan.Plan:
            return replace(plan.choose(*sizes, **options), engine="chunked", rows=rows, inner=rows)

        with recording(), patch.object(engine, "choose", cut):
            start = time.process_time()
            engine.maskgit_grpo_loss(*fixed, *numbers)
            return time.process_time() - start

    seconds(2), seconds(4)
    each = [4e6 * (seconds(2) - seconds(4)) / tokens for _ in range(ROUNDS)]
    low, middle, high = statistics.quantiles(each, n=4)
    print(f"host, a chunk of maskgit_grpo_loss: {middle:.1f} µs ({low:.1f} to {high:.1f})")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        choices=["attention", "buffers", "adjoining", "pointwise", "head", "uvit", "products", "host", "compiled"],
        help="one kind instead of all",
    )
    only = parser.parse_args().only
    torch.set_num_threads(1)
    if only in (None, "attention"):
        attention(4, 256, 8, 64, [27])
        attention(9, 64, 4, 32, [20, 31, 40])
    if only in (None, "buffers"):
        buffers(4, 256, 8, 64, [123], 128)
        buffers(9, 64, 4, 32, [20, 31, 40], 49)
    if only in (None, "adjoining"):
        adjoining(4, 258, 256)
        adjoining(18, 66, 128)
        adjoining(2, 1026, 512)
    if only in (None, "pointwise"):
        pointwise(2, 66, 192, 6)
        pointwise(64, 66, 192, 6)
    if only in (None, "head"):
        for rows in (1, 4, 8, 9, 16):
            head(rows, 54402, 512)
    if only in (None, "uvit"):
        uvit(16, 64, 128, 77, 4)
    if only in (None, "compiled"):
        compiled(9, 6)
    if only in (None, "host"):
        host(1024)
    if only in (None, "products"):
        products(1024, 512, 1024)
        products(512, 2048, 1024)


if __name__ == "__main__":
    main()
