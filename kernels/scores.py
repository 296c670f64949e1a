"""The head's logits with the statistics of their softmax formed in the product's epilogue, for GPUs that have TMA.

`score_tiles` is a persistent product: one program a multiprocessor takes tile after tile, operands come by tensor
descriptors (TMA). Beside the logits, which it writes as cuBLAS would (float32, the bare product), it leaves for each
row and tile of columns the largest x, Σ exp(x − top) and Σ exp(x − top)·(x − top) with x = (logit + bias)/temperature,
so that nobody has to go over a row for them before its gradient can be formed. `epilogue.loss` joins the parts.

Legend: m rows of a chunk, D width, K codebook entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import INTERPRETED, launch
from .plan import PART
from .rows import rows_here


@triton.jit
def _part(x, first, row, entries, here, bias_ptr, parts_ptr, rows, parts, sharpness, PART: tl.constexpr):
    """(top, mass, spread) of the PART columns from `first` on, for each row, into their place among the row's parts."""
    column = first + tl.arange(0, PART)
    wide = column < entries
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column, mask=wide, other=0.0).to(tl.float32)[None, :]
    x = tl.where(wide[None, :], x * sharpness, float("-inf"))
    top = tl.max(x, 1)
    x -= tl.where(top == float("-inf"), 0.0, top)[:, None]
    e = tl.exp(x)
    at = parts_ptr + row.to(tl.int64) * parts + first // PART
    plane = tl.cast(rows, tl.int64) * parts
    inside = (row < here) & (first < entries)
    tl.store(at, top, mask=inside)
    tl.store(at + plane, tl.sum(e, 1), mask=inside)
    tl.store(at + 2 * plane, tl.sum(tl.where(e > 0.0, e * x, 0.0), 1), mask=inside)


@triton.jit
def score_tiles(
    rows_desc,
    weight_desc,
    scores_desc,
    bias_ptr,
    count_ptr,
    parts_ptr,
    start,
    rows,
    width,
    entries,
    parts,  # of one row
    sharpness,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PART: tl.constexpr,  # columns of one part, BLOCK_N or half of it
):
    """The logits of a chunk's rows, and parts[(top, mass, spread), row, PART columns] of them."""
    here = rows_here(count_ptr, start, rows)
    high, across = tl.cdiv(here, BLOCK_M), tl.cdiv(entries, BLOCK_N)
    group = 8 * across
    for tile in tl.range(tl.program_id(0), high * across, tl.num_programs(0), flatten=True):
        leader = tile // group * 8
        height = tl.minimum(high - leader, 8)
        m = (leader + tile % group % height) * BLOCK_M
        n = tile % group // height * BLOCK_N
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, width, BLOCK_K):
            total = tl.dot(rows_desc.load([m, k]), weight_desc.load([n, k]).T, total)
        row = m + tl.arange(0, BLOCK_M)
        if PART == BLOCK_N:
            scores_desc.store([m, n], total)
            _part(total, n, row, entries, here, bias_ptr, parts_ptr, rows, parts, sharpness, PART)
        else:
            left, right = tl.split(tl.permute(tl.reshape(total, [BLOCK_M, 2, PART]), [0, 2, 1]))
            scores_desc.store([m, n], left)
            _part(left, n, row, entries, here, bias_ptr, parts_ptr, rows, parts, sharpness, PART)
            scores_desc.store([m, n + PART], right)
            _part(right, n + PART, row, entries, here, bias_ptr, parts_ptr, rows, parts, sharpness, PART)


@dataclass(frozen=True)
class ScoreTile:
    """Block sizes of `score_tiles`: rows, columns (PART or twice as many), summed; warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


LEAST_CAPABILITY = 9
"""TMA came with compute capability 9.0."""
assumed = LEAST_CAPABILITY
"""What a device that is no GPU is taken for: the interpreter's, and that of tensors without memory."""
MANY = 3
"""Programs in the interpreter: fewer than tiles, so that one takes several."""
ALIGNED = 16
"""Bytes that rows must begin at multiples of to be fetched by TMA."""


def score_tile(capability: int) -> ScoreTile:
    """The largest tile that spills no registers on cards of this capability (major number; docs/kernels.md)."""
    return ScoreTile(128, 256, 64, 8, 3) if capability == 9 else ScoreTile(128, 128, 64, 8, 3)


def capability(device: torch.device) -> int:
    """Major compute capability of a GPU, `assumed` of what is none."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else assumed


def objection(rows_MD: Tensor, weight_KD: Tensor) -> str:
    """Why `fill` cannot multiply these two; empty if it can."""
    if not (rows_MD.is_cuda or rows_MD.is_meta or INTERPRETED):
        return "no GPU"
    if weight_KD.dtype not in (torch.bfloat16, torch.float16):
        return "float32 is multiplied without tensor cores, where an epilogue gains nothing"
    if capability(rows_MD.device) < LEAST_CAPABILITY:
        return "the GPU has no TMA: it needs compute capability 9.0"
    for tensor in (rows_MD, weight_KD):
        if tensor.stride(0) * tensor.element_size() % ALIGNED or tensor.data_ptr() % ALIGNED:
            return f"TMA needs rows that begin at multiples of {ALIGNED} bytes: a width that is one of 8"
    return ""


def pitch(entries: int) -> int:
    """Numbers from one row of float32 logits to the next, so that each begins where TMA can write it."""
    return -(-entries // (ALIGNED // 4)) * (ALIGNED // 4)


def parts_of(entries: int) -> int:
    """Parts of one row."""
    return -(-entries // PART)


def fill(
    rows_mD: Tensor,
    weight_KD: Tensor,
    bias_K: Tensor | None,
    count: Tensor | None,
    scores_mK: Tensor,
    parts_3mP: Tensor,
    start: int,
    temperature: float,
) -> None:
    """scores = rows·weightᵀ in float32 (rows `pitch` numbers apart), and the parts of their softmax' statistics.

    parts_3mP, float32 [3, m, parts_of(K)]: (top, mass, spread) of x = (score + bias)/temperature, for each part.
    """
    (rows, width), entries, device = rows_mD.shape, len(weight_KD), rows_mD.device
    tile = score_tile(capability(device))
    tiles = -(-rows // tile.m) * -(-entries // tile.n)
    programs = torch.cuda.get_device_properties(device).multi_processor_count if rows_mD.is_cuda else MANY
    launch(
        score_tiles,
        (min(programs, tiles),),
        TensorDescriptor.from_tensor(rows_mD, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(weight_KD, [tile.n, tile.k]),
        TensorDescriptor.from_tensor(scores_mK, [tile.m, PART]),
        *(bias_K, count, parts_3mP),
        *(start, rows, width, entries, parts_3mP.shape[2], 1.0 / temperature),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        PART=PART,
        warps=tile.warps,
        stages=tile.stages,
    )
