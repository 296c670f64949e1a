"""What is done with a row of logits once a matrix product has written it: log-sum-exp, chosen entry, entropy, gradient.

One program a row. x = (scores + bias)/temperature, so scores are the bare product. Three kernels over the same pieces:
`logprob_rows` looks, `gradient_rows` turns the row into grad·(onehot − softmax) given what was seen before, `loss_rows`
does both with the GRPO slope in between; where the product has left parts of the statistics (`scores`), it joins those
instead of looking. A row of up to `RESIDENT` entries is read once and stays in registers, a
longer one is passed over twice. −inf rules an entry out.

With `FOLD` the gradient's factor is multiplied in; without it (float16, whose range is too small for a factor times a
probability) the row is onehot − softmax and the factor goes to `factor` for whoever uses the row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .grpo import objective
from .launch import launch, power_of_two
from .plan import RESIDENT
from .rows import rows_here, token_of

# The longest row kept in registers, RESIDENT, is 32 numbers a thread with sixteen warps.


@triton.jit
def _logits(row_ptr, bias_ptr, lane, entries, sharpness):
    """x of the entries `lane`, −inf outside the codebook; sharpness is 1/temperature."""
    inside = lane < entries
    x = tl.load(row_ptr + lane, mask=inside, other=float("-inf"))
    if bias_ptr is not None:
        x += tl.load(bias_ptr + lane, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    return x * sharpness


@triton.jit
def _one(row_ptr, bias_ptr, entry, entries, sharpness):
    """x of one entry; NaN where the entry is none of the codebook's."""
    inside = (entry >= 0) & (entry < entries)
    x = tl.load(row_ptr + entry, mask=inside, other=float("nan"))
    if bias_ptr is not None:
        x += tl.load(bias_ptr + entry, mask=inside, other=0.0).to(tl.float32)
    return x * sharpness


@triton.jit
def _moments(x, top):
    """Σ e and Σ e·(x − top) with e = exp(x − top); an entry at −inf adds nothing."""
    gap = x - tl.where(top == float("-inf"), 0.0, top)
    e = tl.exp(gap)
    return tl.sum(e, 0), tl.sum(tl.where(e > 0.0, e * gap, 0.0), 0)


@triton.jit
def merge(top, mass, spread, other_top, other_mass, other_spread):
    """Two parts of a row as one: (largest x, Σ exp(x − top), Σ exp(x − top)·(x − top))."""
    high = tl.maximum(top, other_top)
    mine = tl.where(top == float("-inf"), 0.0, top - high)
    theirs = tl.where(other_top == float("-inf"), 0.0, other_top - high)
    spread = (spread + mass * mine) * tl.exp(mine) + (other_spread + other_mass * theirs) * tl.exp(theirs)
    return high, mass * tl.exp(mine) + other_mass * tl.exp(theirs), spread


@triton.jit
def _survey(row_ptr, bias_ptr, entries, sharpness, BLOCK: tl.constexpr):
    """(top, mass, spread) of a row that does not fit into one block."""
    top = tl.full([], float("-inf"), tl.float32)
    mass = tl.full([], 0.0, tl.float32)
    spread = tl.full([], 0.0, tl.float32)
    for first in range(0, entries, BLOCK):
        x = _logits(row_ptr, bias_ptr, first + tl.arange(0, BLOCK), entries, sharpness)
        here = tl.max(x, 0)
        e, eg = _moments(x, here)
        top, mass, spread = merge(top, mass, spread, here, e, eg)
    return top, mass, spread


@triton.jit
def _joined(parts_ptr, row, rows, parts, PARTS: tl.constexpr):
    """(top, mass, spread) of a row from its parts, in one order."""
    lane = tl.arange(0, PARTS)
    inside = lane < parts
    at = parts_ptr + row.to(tl.int64) * parts + lane
    plane = tl.cast(rows, tl.int64) * parts
    tops = tl.load(at, mask=inside, other=float("-inf"))
    mass = tl.load(at + plane, mask=inside, other=0.0)
    spread = tl.load(at + 2 * plane, mask=inside, other=0.0)
    top = tl.max(tops, 0)
    gap = tl.where(tops == float("-inf"), 0.0, tops - top)
    e = tl.exp(gap)
    return top, tl.sum(mass * e, 0), tl.sum((spread + mass * gap) * e, 0)


@triton.jit
def _write_gradient(row_ptr, x, lane, entries, chosen, factor, lse):
    """factor·(onehot(chosen) − exp(x − lse)) into the row."""
    value = factor * (tl.where(lane == chosen, 1.0, 0.0) - tl.exp(x - lse))
    tl.store(row_ptr + lane, value.to(row_ptr.dtype.element_ty), mask=lane < entries)


@triton.jit
def logprob_rows(
    scores_ptr,
    bias_ptr,
    target_ptr,
    index_ptr,
    count_ptr,
    logp_ptr,
    lse_ptr,
    entropy_ptr,
    start,
    rows,
    entries,
    sharpness,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """logp, log-sum-exp and entropy (each where wanted) of the tokens of a chunk."""
    row = tl.program_id(0)
    if row < rows_here(count_ptr, start, rows):
        token = token_of(index_ptr, start, row, True)
        row_ptr = scores_ptr + row.to(tl.int64) * entries
        if WHOLE:
            x = _logits(row_ptr, bias_ptr, tl.arange(0, BLOCK), entries, sharpness)
            top = tl.max(x, 0)
            mass, spread = _moments(x, top)
        else:
            top, mass, spread = _survey(row_ptr, bias_ptr, entries, sharpness, BLOCK)
        lse = top + tl.log(mass)
        tl.store(logp_ptr + token, _one(row_ptr, bias_ptr, tl.load(target_ptr + token), entries, sharpness) - lse)
        if lse_ptr is not None:
            tl.store(lse_ptr + token, lse)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + token, tl.log(mass) - spread / mass)


@triton.jit
def gradient_rows(
    scores_ptr,
    bias_ptr,
    target_ptr,
    index_ptr,
    count_ptr,
    lse_ptr,
    grad_ptr,
    d_scores_ptr,
    factor_ptr,
    start,
    rows,
    entries,
    sharpness,
    FOLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d_scores = grad/temperature·(onehot − softmax) from a row's scores and log-sum-exp; a program a row and block."""
    row = tl.program_id(0)
    if row < rows_here(count_ptr, start, rows):
        token = token_of(index_ptr, start, row, True)
        factor = tl.load(grad_ptr + token).to(tl.float32) * sharpness
        if not FOLD:
            tl.store(factor_ptr + row, factor)
            factor = 1.0
        lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = row.to(tl.int64) * entries
        x = _logits(scores_ptr + at, bias_ptr, lane, entries, sharpness)
        chosen = tl.load(target_ptr + token)
        _write_gradient(d_scores_ptr + at, x, lane, entries, chosen, factor, tl.load(lse_ptr + token))


@triton.jit
def loss_rows(
    scores_ptr,
    bias_ptr,
    target_ptr,
    index_ptr,
    count_ptr,
    old_ptr,
    ref_ptr,
    advantage_ptr,
    alpha_ptr,
    logp_ptr,
    entropy_ptr,
    d_scores_ptr,
    factor_ptr,
    parts_ptr,
    start,
    rows,
    entries,
    pitch,  # numbers from one row of scores to the next, where there are parts
    parts,  # of one row
    tokens,  # of one rollout
    sharpness,
    low,
    high,
    beta,
    share,  # −1/R
    DENSE_ALPHA: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """logp and entropy of the tokens of a chunk, and the gradient of the GRPO loss in their scores."""
    row = tl.program_id(0)
    if row < rows_here(count_ptr, start, rows):
        token = token_of(index_ptr, start, row, True)
        at = row.to(tl.int64) * entries
        if parts_ptr is not None:
            row_ptr = scores_ptr + row.to(tl.int64) * pitch
        else:  # rows lie one after another: one offset serves scores and gradient, two would spill on sm_80
            row_ptr = scores_ptr + at
        chosen = tl.load(target_ptr + token)
        x_chosen = _one(row_ptr, bias_ptr, chosen, entries, sharpness)
        lane = tl.arange(0, BLOCK)
        x = _logits(row_ptr, bias_ptr, lane, entries, sharpness)
        if parts_ptr is not None:
            top, mass, spread = _joined(parts_ptr, row, rows, parts, PARTS)
        elif WHOLE:
            top = tl.max(x, 0)
            mass, spread = _moments(x, top)
        else:
            top, mass, spread = _survey(row_ptr, bias_ptr, entries, sharpness, BLOCK)
        lse = top + tl.log(mass)
        logp = x_chosen - lse
        tl.store(logp_ptr + token, logp)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + token, tl.log(mass) - spread / mass)

        old = tl.load(old_ptr + token).to(tl.float32)
        advantage = tl.load(advantage_ptr + token // tokens).to(tl.float32)
        alpha = tl.load(alpha_ptr + token if DENSE_ALPHA else alpha_ptr).to(tl.float32)
        if ref_ptr is not None:
            ref = tl.load(ref_ptr + token).to(tl.float32)
            _, slope, _, _, _ = objective(logp, old, ref, advantage, low, high, beta)
        else:
            _, slope, _, _, _ = objective(logp, old, None, advantage, low, high, beta)
        factor = share * alpha * slope * sharpness
        if not FOLD:
            tl.store(factor_ptr + row, factor)
            factor = 1.0
        if WHOLE:
            _write_gradient(d_scores_ptr + at, x, lane, entries, chosen, factor, lse)
        else:
            for first in range(0, entries, BLOCK):
                x = _logits(row_ptr, bias_ptr, first + lane, entries, sharpness)
                _write_gradient(d_scores_ptr + at, x, first + lane, entries, chosen, factor, lse)


def _block(entries: int) -> tuple[int, bool, int]:
    """(BLOCK, whether a row fits, warps)."""
    if entries <= RESIDENT:
        block = power_of_two(entries, 256, RESIDENT)
        return block, True, max(4, min(16, block // 1024))
    return 8192, False, 8


def logprob(
    scores_mK: Tensor,
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
    """Fill logp_M, lse_M and entropy_M for the tokens of one chunk."""
    rows, entries = scores_mK.shape
    block, whole, warps = _block(entries)
    tensors = scores_mK, bias_K, target_M, index, count, logp_M, lse_M, entropy_M
    numbers = start, rows, entries, 1.0 / temperature
    launch(logprob_rows, (rows,), *tensors, *numbers, BLOCK=block, WHOLE=whole, warps=warps)


def gradient(
    scores_mK: Tensor,
    bias_K: Tensor | None,
    target_M: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    lse_M: Tensor,
    grad_M: Tensor,
    d_scores_mK: Tensor,
    factor_m: Tensor | None,
    start: int,
    temperature: float,
) -> None:
    """Fill d_scores_mK (and factor_m, where given instead of folding it in) for the tokens of one chunk."""
    rows, entries = scores_mK.shape
    block = power_of_two(entries, 256, 2048)
    tensors = scores_mK, bias_K, target_M, index, count, lse_M, grad_M, d_scores_mK, factor_m
    numbers = start, rows, entries, 1.0 / temperature
    grid = (rows, -(-entries // block))
    launch(gradient_rows, grid, *tensors, *numbers, FOLD=factor_m is None, BLOCK=block)


def loss(
    scores_mK: Tensor,
    bias_K: Tensor | None,
    target_M: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    old_M: Tensor,
    ref_M: Tensor | None,
    advantages_R: Tensor,
    alpha: Tensor,
    logp_M: Tensor,
    entropy_M: Tensor | None,
    d_scores_mK: Tensor,
    factor_m: Tensor | None,
    start: int,
    temperature: float,
    clip_low: float,
    clip_high: float,
    beta: float,
    parts_3mP: Tensor | None = None,
) -> None:
    """As `logprob` and `gradient` together, with the slope of the GRPO loss as the gradient of each token.

    parts_3mP: what `scores.fill` left of these rows. A row then need not be in registers as a whole.
    """
    rows, entries = scores_mK.shape
    block, whole, warps = _block(entries)
    if parts_3mP is not None:
        block, whole, warps = power_of_two(entries, 256, 2048), False, 4
    parts = 0 if parts_3mP is None else parts_3mP.shape[2]
    rollouts = len(advantages_R)
    tensors = (scores_mK, bias_K, target_M, index, count, old_M, ref_M, advantages_R, alpha)
    numbers = start, rows, entries, scores_mK.stride(0), parts, len(target_M) // rollouts, 1.0 / temperature
    launch(
        loss_rows,
        (rows,),
        *tensors,
        *(logp_M, entropy_M, d_scores_mK, factor_m, parts_3mP),
        *numbers,
        *(1.0 - clip_low, 1.0 + clip_high, beta, -1.0 / rollouts),
        DENSE_ALPHA=alpha.numel() != 1,
        FOLD=factor_m is None,
        BLOCK=block,
        WHOLE=whole,
        PARTS=power_of_two(parts, 1, 1 << 30),
        warps=warps,
    )
