"""The clipped-ratio objective over log-probabilities: loss, statistics and gradient in one pass.

    −1/R Σ mask·alpha·( min(D·A, clip(D)·A) − beta·k3 ),  D = exp(logp − old),  k3 = exp(ref − logp) − (ref − logp) − 1

Two-stage sums: every program adds up its own tokens in float32, the program that finishes last adds the programs' sums
in float64 and in their order. So two runs agree to the last bit although the finishing order differs, and one launch is
enough. `epilogue` shares `objective`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import capturing, launch, power_of_two

MOST_PROGRAMS = 1024
"""Programs of the first stage: about eight for each multiprocessor of the GPUs this is for."""


@triton.jit
def objective(logp, old, ref, advantage, low, high, beta):
    """Per token (value, slope = d value / d logp, clipped, k3, ratio); ref None: no penalty.

    A log-prob that is NaN makes its value NaN: of two numbers a GPU otherwise takes the one that is none.
    """
    ratio = tl.exp(logp - old)
    inside = tl.maximum(ratio, low, propagate_nan=tl.PropagateNan.ALL)
    inside = tl.minimum(inside, high, propagate_nan=tl.PropagateNan.ALL)
    value = tl.minimum(ratio * advantage, inside * advantage, propagate_nan=tl.PropagateNan.ALL)
    clipped = ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))
    slope = tl.where(clipped, 0.0, ratio * advantage)
    k3 = tl.zeros_like(ratio)
    if ref is not None:
        gap = ref - logp
        # exp(g) − g − 1 cancels where g is small, which is where a policy near its reference lives: there, the series.
        series = 1.0 / 720 + gap * (1.0 / 5040 + gap * (1.0 / 40320))
        series = 1.0 / 2 + gap * (1.0 / 6 + gap * (1.0 / 24 + gap * (1.0 / 120 + gap * series)))
        k3 = tl.where(tl.abs(gap) < 0.5, gap * gap * series, tl.exp(gap) - gap - 1.0)
        if beta != 0.0:  # 0 · inf must not spoil a loss without penalty
            value = value - beta * k3
            slope = slope + beta * (gap + k3)  # exp(g) − 1 = g + k3
    return value, slope, clipped, k3, ratio


@triton.jit
def _total(partials, at, PROGRAMS: tl.constexpr):
    lane = tl.arange(0, PROGRAMS)
    part = tl.load(partials + at * PROGRAMS + lane, mask=lane < tl.num_programs(0), other=0.0, cache_modifier=".cg")
    return tl.sum(part.to(tl.float64), 0)


@triton.jit
def grpo_tokens(
    logp_ptr,
    old_ptr,
    ref_ptr,
    advantage_ptr,
    alpha_ptr,
    mask_ptr,
    entropy_ptr,
    d_logp_ptr,
    loss_ptr,
    statistics_ptr,
    partials_ptr,
    counter_ptr,
    tokens,  # of one rollout
    blocks,  # of one rollout
    tasks,  # blocks of all rollouts
    low,
    high,
    beta,
    share,  # −1/R
    DENSE_ALPHA: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """loss, statistics and (where wanted) d loss / d logp; masked-out tokens are never loaded."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    loss = tl.zeros([BLOCK], tl.float32)
    cuts, k3s, ratios, count, entropies = loss, loss, loss, loss, loss
    top = loss
    for task in range(program, tasks, programs):
        rollout = task // blocks
        lane = (task % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        at = rollout.to(tl.int64) * tokens + lane
        inside = lane < tokens
        keep = inside
        if mask_ptr is not None:
            keep = inside & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
        logp = tl.load(logp_ptr + at, mask=keep, other=0.0).to(tl.float32)
        old = tl.load(old_ptr + at, mask=keep, other=0.0).to(tl.float32)
        advantage = tl.zeros([BLOCK], tl.float32) + tl.load(advantage_ptr + rollout).to(tl.float32)
        if DENSE_ALPHA:
            alpha = tl.load(alpha_ptr + at, mask=keep, other=0.0).to(tl.float32)
        else:
            alpha = tl.load(alpha_ptr).to(tl.float32)
        if ref_ptr is not None:
            ref = tl.load(ref_ptr + at, mask=keep, other=0.0).to(tl.float32)
            value, slope, clipped, k3, ratio = objective(logp, old, ref, advantage, low, high, beta)
        else:
            value, slope, clipped, k3, ratio = objective(logp, old, None, advantage, low, high, beta)
        loss += tl.where(keep, share * alpha * value, 0.0)
        cuts += tl.where(keep & clipped, 1.0, 0.0)
        k3s += tl.where(keep, k3, 0.0)
        ratios += tl.where(keep, ratio, 0.0)
        top = tl.maximum(top, tl.where(keep, ratio, 0.0))
        count += tl.where(keep, 1.0, 0.0)
        if entropy_ptr is not None:
            entropies += tl.load(entropy_ptr + at, mask=keep, other=0.0)
        if d_logp_ptr is not None:
            tl.store(d_logp_ptr + at, tl.where(keep, share * alpha * slope, 0.0), mask=inside)

    mine = partials_ptr + program
    tl.store(mine, tl.sum(loss, 0))
    tl.store(mine + PROGRAMS, tl.sum(cuts, 0))
    tl.store(mine + 2 * PROGRAMS, tl.sum(k3s, 0))
    tl.store(mine + 3 * PROGRAMS, tl.max(top, 0))
    tl.store(mine + 4 * PROGRAMS, tl.sum(ratios, 0))
    tl.store(mine + 5 * PROGRAMS, tl.sum(count, 0))
    tl.store(mine + 6 * PROGRAMS, tl.sum(entropies, 0))
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1:
        lane = tl.arange(0, PROGRAMS)
        tops = tl.load(partials_ptr + 3 * PROGRAMS + lane, mask=lane < programs, other=0.0, cache_modifier=".cg")
        counted = tl.maximum(_total(partials_ptr, 5, PROGRAMS), 1.0)
        tl.store(loss_ptr, _total(partials_ptr, 0, PROGRAMS).to(tl.float32))
        tl.store(statistics_ptr, (_total(partials_ptr, 1, PROGRAMS) / counted).to(tl.float32))
        tl.store(statistics_ptr + 1, (_total(partials_ptr, 2, PROGRAMS) / counted).to(tl.float32))
        mean = (_total(partials_ptr, 4, PROGRAMS) / counted).to(tl.float32)
        # The largest of some numbers leaves NaN out, their sum does not.
        tl.store(statistics_ptr + 2, tl.where(mean == mean, tl.max(tops, 0), mean))
        tl.store(statistics_ptr + 3, mean)
        if entropy_ptr is not None:
            tl.store(statistics_ptr + 4, (_total(partials_ptr, 6, PROGRAMS) / counted).to(tl.float32))
        tl.store(counter_ptr, 0)  # ready for the next call


_counters: dict[tuple[torch.device, int], Tensor] = {}


def _counter(like: Tensor) -> Tensor:
    """How many programs have finished: 0 between calls. One per stream; a captured graph gets one of its own."""
    if not like.is_cuda or capturing(like):
        return torch.zeros(1, dtype=torch.int32, device=like.device)
    key = like.device, torch.cuda.current_stream(like.device).cuda_stream
    if key not in _counters:
        _counters[key] = torch.zeros(1, dtype=torch.int32, device=like.device)
    return _counters[key]


def dense(values: Tensor | None, shape: torch.Size) -> Tensor | None:
    """`values` broadcast to `shape` and laid out in order; None stays. A copy only where they were neither."""
    return None if values is None else values.expand(shape).contiguous()


def grpo(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    advantages: Tensor,
    alpha: Tensor,
    mask: Tensor | None,
    clip_low: float,
    clip_high: float,
    beta: float,
    *,
    entropy: Tensor | None = None,
    numbers: int = 4,
    gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, `numbers` statistics, d loss / d logp or None). alpha and mask broadcast to logp [R, ...]."""
    shape, rollouts = logp.shape, logp.shape[0]
    tokens = logp.numel() // rollouts
    block = power_of_two(tokens, 128, 512)
    blocks = -(-tokens // block)
    programs = max(1, min(MOST_PROGRAMS, rollouts * blocks))
    d_logp = torch.empty(shape, dtype=logp.dtype, device=logp.device) if gradient else None
    loss = torch.empty((), dtype=torch.float32, device=logp.device)
    statistics = torch.zeros(numbers, dtype=torch.float32, device=logp.device)
    launch(
        grpo_tokens,
        (programs,),
        logp.contiguous(),
        old_logp.contiguous(),
        dense(ref_logp, shape),
        advantages.contiguous(),
        alpha if alpha.numel() == 1 else dense(alpha, shape),
        dense(mask, shape),
        entropy,
        d_logp,
        loss,
        statistics,
        torch.empty(7 * MOST_PROGRAMS, dtype=torch.float32, device=logp.device),
        _counter(logp),
        tokens,
        blocks,
        rollouts * blocks,
        1.0 - clip_low,
        1.0 + clip_high,
        beta,
        -1.0 / rollouts,
        DENSE_ALPHA=alpha.numel() != 1,
        BLOCK=block,
        PROGRAMS=MOST_PROGRAMS,
        warps=block // 64,
    )
    return loss, statistics, d_logp
