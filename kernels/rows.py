"""Which tokens take part, and moving their rows: compaction of a mask, guided gather, scatter and column sums.

A *row* is the place of a token among those that take part; `index` says which token it is (None: they are the same).
Where `count` is given, the number of rows is read from device memory, and programs past it end at once. Row offsets are
64-bit.

Legend: M tokens, m rows of a chunk, D width, K codebook entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, power_of_two


@triton.jit
def rows_here(count_ptr, start, rows):
    """How many of the chunk's `rows` from `start` on exist."""
    if count_ptr is not None:
        rows = tl.minimum(rows, tl.load(count_ptr) - start)
    return rows


@triton.jit
def token_of(index_ptr, start, row, inside):
    """The token (int64) of a row of the chunk that begins at `start`."""
    if index_ptr is not None:
        return tl.load(index_ptr + start + row, mask=inside, other=0).to(tl.int64)
    return start + row.to(tl.int64)


@triton.jit
def compact_tokens(mask_ptr, before_ptr, index_ptr, tokens, BLOCK: tl.constexpr):
    """index[number of kept tokens before t] = t for every kept token t; `before` is the inclusive prefix sum."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    keep = inside & (tl.load(mask_ptr + token, mask=inside, other=0) != 0)
    row = tl.load(before_ptr + token, mask=keep, other=1) - 1
    tl.store(index_ptr + row, token, mask=keep)


@triton.jit
def gather_rows(
    hidden_ptr,
    uncond_ptr,
    index_ptr,
    factor_ptr,
    out_ptr,
    count_ptr,
    start,
    rows,
    width,
    scale,
    BLOCK: tl.constexpr,
):
    """out[row] = factor[row]·((1 + s)·hidden[token] − s·uncond[token]), summed in float32."""
    row = tl.program_id(0)
    if row < rows_here(count_ptr, start, rows):
        lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = lane < width
        at = token_of(index_ptr, start, row, True) * width + lane
        value = tl.load(hidden_ptr + at, mask=inside).to(tl.float32)
        if uncond_ptr is not None:
            value = (1.0 + scale) * value - scale * tl.load(uncond_ptr + at, mask=inside).to(tl.float32)
        if factor_ptr is not None:
            value = value * tl.load(factor_ptr + row)
        tl.store(out_ptr + row.to(tl.int64) * width + lane, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scatter_rows(
    d_rows_ptr,
    index_ptr,
    factor_ptr,
    d_hidden_ptr,
    d_uncond_ptr,
    count_ptr,
    start,
    rows,
    width,
    hidden_scale,
    uncond_scale,
    BLOCK: tl.constexpr,
):
    """d_hidden[token] = (1 + s)·factor[row]·d_rows[row] and d_uncond[token] = −s·factor[row]·d_rows[row]."""
    row = tl.program_id(0)
    if row < rows_here(count_ptr, start, rows):
        lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = lane < width
        at = token_of(index_ptr, start, row, True) * width + lane
        value = tl.load(d_rows_ptr + row.to(tl.int64) * width + lane, mask=inside)
        if factor_ptr is not None:
            value = value * tl.load(factor_ptr + row)
        if d_hidden_ptr is not None:
            tl.store(d_hidden_ptr + at, (hidden_scale * value).to(d_hidden_ptr.dtype.element_ty), mask=inside)
        if d_uncond_ptr is not None:
            tl.store(d_uncond_ptr + at, (uncond_scale * value).to(d_uncond_ptr.dtype.element_ty), mask=inside)


@triton.jit
def column_sums(
    values_ptr,
    factor_ptr,
    sums_ptr,
    count_ptr,
    start,
    rows,
    entries,
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sums[slice, k] += Σ over the slice's rows of factor[row]·values[row, k].

    Blocks of rows are dealt out to the slices in turn; one program owns its columns of its slice, so that their order
    is fixed.
    """
    sums_ptr += tl.program_id(1) * entries
    column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    wide = column < entries
    here = rows_here(count_ptr, start, rows)
    total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for first in range(tl.program_id(1) * BLOCK_M, here, SLICES * BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        inside = row < here
        at = row.to(tl.int64)[:, None] * entries + column[None, :]
        value = tl.load(values_ptr + at, mask=inside[:, None] & wide[None, :], other=0.0).to(tl.float32)
        if factor_ptr is not None:
            value = value * tl.load(factor_ptr + row, mask=inside, other=0.0)[:, None]
        total += value
    before = tl.load(sums_ptr + column, mask=wide, other=0.0)
    tl.store(sums_ptr + column, before + tl.sum(total, 0), mask=wide)


def compact(mask_M: Tensor) -> tuple[Tensor, Tensor]:
    """(the kept tokens in order, int32 [M] of which the first `count` are set; count, int32 [1]), on the device."""
    before = torch.cumsum(mask_M, 0, dtype=torch.int32)
    index = torch.empty_like(before)
    launch(compact_tokens, (-(-len(mask_M) // 1024),), mask_M, before, index, len(mask_M), BLOCK=1024)
    return index, before[-1:] if len(before) else before.new_zeros(1)


def gather(
    hidden_MD: Tensor,
    uncond_MD: Tensor | None,
    index: Tensor | None,
    count: Tensor | None,
    out_mD: Tensor,
    start: int,
    scale: float,
    factor_m: Tensor | None = None,
) -> None:
    """Fill `out_mD` with the guided rows of tokens start … start + len(out_mD)."""
    rows, width = out_mD.shape
    block = power_of_two(width, 128, 2048)
    grid = (rows, -(-width // block))
    launch(
        gather_rows, grid, hidden_MD, uncond_MD, index, factor_m, out_mD, count, start, rows, width, scale, BLOCK=block
    )


def scatter(
    d_rows_mD: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    d_hidden_MD: Tensor | None,
    d_uncond_MD: Tensor | None,
    start: int,
    hidden_scale: float,
    uncond_scale: float,
    factor_m: Tensor | None = None,
) -> None:
    """Hand the gradient of guided rows (float32) back to the two inputs; rows outside the index are left alone."""
    rows, width = d_rows_mD.shape
    block = power_of_two(width, 128, 2048)
    launch(
        scatter_rows,
        (rows, -(-width // block)),
        d_rows_mD,
        index,
        factor_m,
        d_hidden_MD,
        d_uncond_MD,
        count,
        start,
        rows,
        width,
        hidden_scale,
        uncond_scale,
        BLOCK=block,
    )


def add_column_sums(
    values_mK: Tensor, sums_SK: Tensor, count: Tensor | None, start: int, factor_m: Tensor | None = None
) -> None:
    """Add the column sums of a chunk's rows to those of S slices, whose sum they are; in one order always."""
    (rows, entries), slices = values_mK.shape, len(sums_SK)
    tensors = values_mK, factor_m, sums_SK, count
    grid = (-(-entries // 64), slices)
    launch(column_sums, grid, *tensors, start, rows, entries, SLICES=slices, BLOCK_M=64, BLOCK_K=64)
