"""Matrix tiles: the head's log-probs without logits, and a plain product whose row count lives on the device.

`logprob_tiles` multiplies a tile of rows with one tile of the codebook after the other and keeps, per row, the largest
logit, the sum of exponentials, the spread for the entropy and the chosen logit; the codebook may be split among
programs, whose parts `combine_splits` joins in order. `product` is C (+)= A·B with any strides, for CUDA graphs:
captured cuBLAS calls cannot depend on how many tokens a mask keeps, these programs read it and end.

float32 is multiplied as float32 ("ieee", not TF32), everything is summed in float32.

Legend: m rows of a chunk, D width, K codebook entries; for `product` C is [m, n], summed over k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue import merge
from .launch import launch
from .rows import rows_here, token_of


@dataclass(frozen=True)
class Tile:
    """Block sizes of a product: rows, columns, summed; warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def product_tile(dtype: torch.dtype, aligned: bool) -> Tile:
    """The tile of `product`: as large as it can be without spilling registers on any target (docs/kernels.md).

    Where rows do not begin at multiples of sixteen numbers (not `aligned`) every load is a narrow one with an address
    of its own, which takes most of the registers.
    """
    if dtype == torch.float32:
        return Tile(64, 64, 16, 8, 2)
    if not aligned:
        return Tile(64, 64, 32, 8, 2)
    return Tile(128, 128, 64, 8, 3)


def logprob_tile(dtype: torch.dtype, aligned: bool) -> Tile:
    """The tile of `logprob_tiles`; half as high as a product's, because a row keeps four more numbers."""
    if dtype == torch.float32 or not aligned:
        return Tile(64, 64, 32, 8, 2)
    return Tile(64, 128, 64, 8, 4)


@triton.jit
def logprob_tiles(
    rows_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    index_ptr,
    count_ptr,
    parts_ptr,
    start,
    rows,
    width,
    entries,
    tiles,  # codebook tiles of one split
    sharpness,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """parts[split, (top, mass, spread, chosen), row] of the rows of a chunk."""
    here = rows_here(count_ptr, start, rows)
    first = tl.program_id(0) * BLOCK_M
    if first < here:
        row = first + tl.arange(0, BLOCK_M)
        inside = row < here
        target = tl.load(target_ptr + token_of(index_ptr, start, row, inside), mask=inside, other=-1)
        # 64-bit where a tile begins, 32-bit inside it: that halves the registers that addresses take.
        a_ptr = rows_ptr + tl.cast(first, tl.int64) * width
        within_m, within_n = tl.arange(0, BLOCK_M)[:, None] * width, tl.arange(0, BLOCK_N)[None, :] * width
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK_M], tl.float32)
        spread = tl.zeros([BLOCK_M], tl.float32)
        chosen = tl.where((target >= 0) & (target < entries), 0.0, float("nan"))
        split = tl.program_id(1)
        last = tl.minimum((split + 1) * tiles, tl.cdiv(entries, BLOCK_N))
        for tile in range(split * tiles, last):
            column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            wide = column < entries
            b_ptr = weight_ptr + tl.cast(tile * BLOCK_N, tl.int64) * width
            x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for k in range(0, width, BLOCK_K):
                lane = k + tl.arange(0, BLOCK_K)
                deep = lane < width
                a = tl.load(a_ptr + (within_m + lane[None, :]), mask=inside[:, None] & deep[None, :], other=0.0)
                b = tl.load(b_ptr + (within_n + lane[:, None]), mask=deep[:, None] & wide[None, :], other=0.0)
                x = tl.dot(a, b, x, input_precision="ieee")
            if bias_ptr is not None:
                x += tl.load(bias_ptr + column, mask=wide, other=0.0).to(tl.float32)[None, :]
            x = tl.where(wide[None, :], x * sharpness, float("-inf"))
            chosen += tl.sum(tl.where(column[None, :] == target[:, None], x, 0.0), 1)
            high = tl.max(x, 1)
            x -= tl.where(high == float("-inf"), 0.0, high)[:, None]
            e = tl.exp(x)
            x = tl.where(e > 0.0, e * x, 0.0)
            top, mass, spread = merge(top, mass, spread, high, tl.sum(e, 1), tl.sum(x, 1))
        part = parts_ptr + split.to(tl.int64) * 4 * rows + row
        tl.store(part, top, mask=inside)
        tl.store(part + rows, mass, mask=inside)
        tl.store(part + 2 * rows, spread, mask=inside)
        tl.store(part + 3 * rows, chosen, mask=inside)


@triton.jit
def combine_splits(
    parts_ptr,
    index_ptr,
    count_ptr,
    logp_ptr,
    lse_ptr,
    entropy_ptr,
    start,
    rows,
    splits,
    BLOCK: tl.constexpr,
):
    """Join the splits of every row in their order and hand the results to the tokens."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows_here(count_ptr, start, rows)
    token = token_of(index_ptr, start, row, inside)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    spread = tl.zeros([BLOCK], tl.float32)
    chosen = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        part = parts_ptr + split * 4 * rows + row
        high = tl.load(part, mask=inside, other=float("-inf"))
        e = tl.load(part + rows, mask=inside, other=0.0)
        eg = tl.load(part + 2 * rows, mask=inside, other=0.0)
        top, mass, spread = merge(top, mass, spread, high, e, eg)
        chosen += tl.load(part + 3 * rows, mask=inside, other=0.0)
    lse = top + tl.log(mass)
    tl.store(logp_ptr + token, chosen - lse, mask=inside)
    if lse_ptr is not None:
        tl.store(lse_ptr + token, lse, mask=inside)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + token, tl.log(mass) - spread / mass, mask=inside)


@triton.jit
def product_tiles(
    a_ptr,
    b_ptr,
    c_ptr,
    count_ptr,
    start,
    m,
    n,
    k,
    a_m,
    a_k,
    b_k,
    b_n,
    COUNTS_K: tl.constexpr,
    ADD: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """C [m, n] (+)= A·B. `count` limits the rows of A, or with COUNTS_K the length of the sum.

    SPLITS > 1 shares the sum out among programs that add to C atomically: faster where tiles are few, but in no fixed
    order.
    """
    rows, depth = m, k
    if COUNTS_K:
        depth = tl.maximum(rows_here(count_ptr, start, k), 0)
    else:
        rows = rows_here(count_ptr, start, m)
    # Eight tiles of rows share the columns they read while these are still in the cache.
    across = tl.cdiv(n, BLOCK_N)
    group = 8 * across
    leader = tl.program_id(0) // group * 8
    height = tl.minimum(tl.cdiv(m, BLOCK_M) - leader, 8)
    tile_m = leader + tl.program_id(0) % group % height
    tile_n = tl.program_id(0) % group // height
    if tile_m * BLOCK_M < rows:
        # 64-bit where a tile begins, 32-bit inside it: that halves the registers that addresses take.
        within_m, within_n, within_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        high, wide = tile_m * BLOCK_M + within_m < rows, tile_n * BLOCK_N + within_n < n
        a_ptr += (tile_m * BLOCK_M).to(tl.int64) * a_m
        b_ptr += (tile_n * BLOCK_N).to(tl.int64) * b_n
        a_at = within_m[:, None] * a_m + within_k[None, :] * a_k
        b_at = within_k[:, None] * b_k + within_n[None, :] * b_n
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(tl.program_id(1) * BLOCK_K, depth, SPLITS * BLOCK_K):
            deep = within_k < depth - first
            at = tl.cast(first, tl.int64)
            a = tl.load(a_ptr + at * a_k + a_at, mask=high[:, None] & deep[None, :], other=0.0)
            b = tl.load(b_ptr + at * b_k + b_at, mask=deep[:, None] & wide[None, :], other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee")
        out = c_ptr + (tile_m * BLOCK_M).to(tl.int64) * n + tile_n * BLOCK_N
        out += within_m[:, None] * n + within_n[None, :]
        inside = high[:, None] & wide[None, :]
        if SPLITS > 1:
            tl.atomic_add(out, total, mask=inside)
        else:
            if ADD:
                total += tl.load(out, mask=inside, other=0.0)
            tl.store(out, total, mask=inside)


def logprob(
    rows_mD: Tensor,
    weight_KD: Tensor,
    bias_K: Tensor | None,
    target_M: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    logp_M: Tensor,
    lse_M: Tensor | None,
    entropy_M: Tensor | None,
    start: int,
    temperature: float,
) -> None:
    """Fill logp_M, lse_M and entropy_M for the tokens of one chunk of (guided) rows; no logits are written."""
    (rows, width), entries = rows_mD.shape, len(weight_KD)
    tile = logprob_tile(rows_mD.dtype, width % 16 == 0)
    high, wide = -(-rows // tile.m), -(-entries // tile.n)
    splits = max(1, min(wide, 64, 512 // max(high, 1)))
    tiles = -(-wide // splits)
    splits = -(-wide // tiles)
    parts = torch.empty(splits * 4 * rows, dtype=torch.float32, device=rows_mD.device)
    launch(
        logprob_tiles,
        (high, splits),
        *(rows_mD, weight_KD, bias_K, target_M, index, count, parts),
        *(start, rows, width, entries, tiles, 1.0 / temperature),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        warps=tile.warps,
        stages=tile.stages,
    )
    tensors = parts, index, count, logp_M, lse_M, entropy_M
    launch(combine_splits, (-(-rows // 128),), *tensors, start, rows, splits, BLOCK=128)


def product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    count: Tensor | None,
    start: int,
    *,
    counts_k: bool = False,
    add: bool = False,
    atomic: bool = False,
) -> None:
    """out (+)= a·b in float32, with `count` − start rows of `a` at most (or, with counts_k, terms of the sum).

    `atomic` lets programs share one sum out where there are few tiles; the result then varies in its last bits.
    """
    (m, k), n = a.shape, b.shape[1]
    strides = *a.stride(), *b.stride()
    tile = product_tile(a.dtype, all(stride == 1 or stride % 16 == 0 for stride in strides))
    tiles = -(-m // tile.m) * -(-n // tile.n)
    splits = 4 if atomic and add and tiles < 128 and k >= 4 * tile.k else 1
    launch(
        product_tiles,
        (tiles, splits),
        *(a, b, out, count, start, m, n, k, *strides),
        COUNTS_K=counts_k,
        ADD=add,
        SPLITS=splits,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        warps=tile.warps,
        stages=tile.stages,
    )
