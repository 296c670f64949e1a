"""Layer norm and partial rotary of queries and keys: both read once and written once, and the way back.

The first `rotary` of a head's E entries turn: entry e < rotary / 2 with its partner e + rotary / 2. A row is therefore
held as three parts (first half of what turns, second half, the rest), each padded to a power of two, so that partners
lie at the same place of two registers. Everything is computed in float32 and rounded once, when it is written.

Legend: B batch rows, H heads, L positions, E head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, power_of_two

MOST_PROGRAMS = 1024
"""Programs of the way back, each with its own sums for the gradients of weight and bias."""


@triton.jit
def load_parts(ptr, at, step, half, rest, there, HALF: tl.constexpr, REST: tl.constexpr):
    """The three parts (float32, zero outside) of what begins at `at` [BLOCK, 1], its entries `step` apart."""
    narrow, wide = there & (half < HALF), there & (rest < REST)
    first = tl.load(ptr + at + half * step, mask=narrow, other=0.0).to(tl.float32)
    second = tl.load(ptr + at + (HALF + half) * step, mask=narrow, other=0.0).to(tl.float32)
    third = tl.load(ptr + at + (2 * HALF + rest) * step, mask=wide, other=0.0).to(tl.float32)
    return first, second, third


@triton.jit
def store_parts(ptr, at, step, half, rest, there, first, second, third, HALF: tl.constexpr, REST: tl.constexpr):
    narrow, wide = there & (half < HALF), there & (rest < REST)
    tl.store(ptr + at + half * step, first.to(ptr.dtype.element_ty), mask=narrow)
    tl.store(ptr + at + (HALF + half) * step, second.to(ptr.dtype.element_ty), mask=narrow)
    tl.store(ptr + at + (2 * HALF + rest) * step, third.to(ptr.dtype.element_ty), mask=wide)


@triton.jit
def sum_parts(first, second, third):
    """The sum over the entries of each row, [BLOCK, 1]."""
    return (tl.sum(first, 1) + tl.sum(second, 1) + tl.sum(third, 1))[:, None]


@triton.jit
def normalised(first, second, third, half, rest, eps, HALF: tl.constexpr, REST: tl.constexpr):
    """The parts with mean 0 and variance 1 (zero outside), and 1 / standard deviation [BLOCK, 1]."""
    mean = sum_parts(first, second, third) / (2 * HALF + REST)
    first = tl.where(half < HALF, first - mean, 0.0)
    second = tl.where(half < HALF, second - mean, 0.0)
    third = tl.where(rest < REST, third - mean, 0.0)
    variance = sum_parts(first * first, second * second, third * third) / (2 * HALF + REST)
    inverse = 1.0 / tl.sqrt(variance + eps)
    return first * inverse, second * inverse, third * inverse, inverse


@triton.jit
def load_angles(ptr, at, half, there, HALF: tl.constexpr):
    """Cosines or sines of both halves of what turns."""
    narrow = there & (half < HALF)
    first = tl.load(ptr + at + half, mask=narrow, other=0.0).to(tl.float32)
    return first, tl.load(ptr + at + HALF + half, mask=narrow, other=0.0).to(tl.float32)


@triton.jit
def norm_and_turn(
    x_ptr,
    at,
    step,
    weight_ptr,
    bias_ptr,
    out_ptr,
    out_at,
    cos1,
    cos2,
    sin1,
    sin2,
    half,
    rest,
    there,
    eps,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """One block of positions of one head."""
    x1, x2, x3 = load_parts(x_ptr, at, step, half, rest, there, HALF, REST)
    x1, x2, x3, _ = normalised(x1, x2, x3, half, rest, eps, HALF, REST)
    w1, w2, w3 = load_parts(weight_ptr, 0, 1, half, rest, True, HALF, REST)
    b1, b2, b3 = load_parts(bias_ptr, 0, 1, half, rest, True, HALF, REST)
    y1, y2, y3 = x1 * w1 + b1, x2 * w2 + b2, x3 * w3 + b3
    z1, z2 = y1 * cos1 - y2 * sin1, y2 * cos2 + y1 * sin2
    store_parts(out_ptr, out_at, 1, half, rest, there, z1, z2, y3, HALF, REST)


@triton.jit
def norm_rotary(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    q_bias_ptr,
    k_weight_ptr,
    k_bias_ptr,
    q_out_ptr,
    k_out_ptr,
    heads,
    length,
    blocks,  # of positions
    angles_row,  # from one batch row's angles to the next; 0: they share them
    q_row,
    q_head,
    q_place,
    q_step,
    k_row,
    k_head,
    k_place,
    k_step,
    eps,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """q and k of one head at BLOCK positions, normalised and turned; the results are laid out [B, H, L, E]."""
    program = tl.program_id(0)
    head = program // blocks
    row = (head // heads).to(tl.int64)
    place = (program % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    there = place < length
    half, rest = tl.arange(0, BLOCK_HALF)[None, :], tl.arange(0, BLOCK_REST)[None, :]
    angle = row * angles_row + place * (2 * HALF)
    cos1, cos2 = load_angles(cos_ptr, angle, half, there, HALF)
    sin1, sin2 = load_angles(sin_ptr, angle, half, there, HALF)
    out_at = (head.to(tl.int64) * length + place) * (2 * HALF + REST)
    q_at = row * q_row + (head % heads).to(tl.int64) * q_head + place * q_place
    norm_and_turn(
        q_ptr,
        q_at,
        q_step,
        q_weight_ptr,
        q_bias_ptr,
        q_out_ptr,
        out_at,
        cos1,
        cos2,
        sin1,
        sin2,
        half,
        rest,
        there,
        eps,
        HALF,
        REST,
    )
    k_at = row * k_row + (head % heads).to(tl.int64) * k_head + place * k_place
    norm_and_turn(
        k_ptr,
        k_at,
        k_step,
        k_weight_ptr,
        k_bias_ptr,
        k_out_ptr,
        out_at,
        cos1,
        cos2,
        sin1,
        sin2,
        half,
        rest,
        there,
        eps,
        HALF,
        REST,
    )


@triton.jit
def norm_rotary_backward(
    x_ptr,
    grad_ptr,
    cos_ptr,
    sin_ptr,
    weight_ptr,
    d_x_ptr,
    sums_ptr,
    heads,
    length,
    blocks,  # of positions
    tasks,  # blocks of all heads of all rows
    angles_row,
    x_row,
    x_head,
    x_place,
    x_step,
    grad_row,
    grad_head,
    grad_place,
    grad_step,
    d_row,
    d_head,
    d_place,
    d_step,
    eps,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """The gradient of q or of k, and where wanted sums[program] = this program's part of weight's and bias's."""
    half, rest = tl.arange(0, BLOCK_HALF)[None, :], tl.arange(0, BLOCK_REST)[None, :]
    w1, w2, w3 = load_parts(weight_ptr, 0, 1, half, rest, True, HALF, REST)
    dw1 = tl.zeros([BLOCK, BLOCK_HALF], tl.float32)
    dw3 = tl.zeros([BLOCK, BLOCK_REST], tl.float32)
    dw2, db1, db2, db3 = dw1, dw1, dw1, dw3
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        head = task // blocks
        row, head = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
        place = (task % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
        there = place < length
        angle = row * angles_row + place * (2 * HALF)
        cos1, cos2 = load_angles(cos_ptr, angle, half, there, HALF)
        sin1, sin2 = load_angles(sin_ptr, angle, half, there, HALF)
        at = row * grad_row + head * grad_head + place * grad_place
        g1, g2, dy3 = load_parts(grad_ptr, at, grad_step, half, rest, there, HALF, REST)
        dy1, dy2 = g1 * cos1 + g2 * sin2, g2 * cos2 - g1 * sin1
        at = row * x_row + head * x_head + place * x_place
        x1, x2, x3 = load_parts(x_ptr, at, x_step, half, rest, there, HALF, REST)
        x1, x2, x3, inverse = normalised(x1, x2, x3, half, rest, eps, HALF, REST)
        if sums_ptr is not None:
            dw1 += dy1 * x1
            dw2 += dy2 * x2
            dw3 += dy3 * x3
            db1 += dy1
            db2 += dy2
            db3 += dy3
        dx1, dx2, dx3 = dy1 * w1, dy2 * w2, dy3 * w3
        mean = sum_parts(dx1, dx2, dx3) / (2 * HALF + REST)
        slope = sum_parts(dx1 * x1, dx2 * x2, dx3 * x3) / (2 * HALF + REST)
        dx1 = inverse * (dx1 - mean - slope * x1)
        dx2 = inverse * (dx2 - mean - slope * x2)
        dx3 = inverse * (dx3 - mean - slope * x3)
        at = row * d_row + head * d_head + place * d_place
        store_parts(d_x_ptr, at, d_step, half, rest, there, dx1, dx2, dx3, HALF, REST)
    if sums_ptr is not None:
        at = tl.program_id(0) * 2 * (2 * HALF + REST)
        w1, w2, w3 = tl.sum(dw1, 0)[None, :], tl.sum(dw2, 0)[None, :], tl.sum(dw3, 0)[None, :]
        store_parts(sums_ptr, at, 1, half, rest, True, w1, w2, w3, HALF, REST)
        b1, b2, b3 = tl.sum(db1, 0)[None, :], tl.sum(db2, 0)[None, :], tl.sum(db3, 0)[None, :]
        store_parts(sums_ptr, at + 2 * HALF + REST, 1, half, rest, True, b1, b2, b3, HALF, REST)


def _constants(length: int, width: int, rotary: int) -> dict[str, int]:
    """The compile-time arguments but the number of warps."""
    half, rest = rotary // 2, width - rotary
    return {
        "HALF": half,
        "REST": rest,
        "BLOCK": power_of_two(length, 4, 32),
        "BLOCK_HALF": power_of_two(half, 1, half * 2),
        "BLOCK_REST": power_of_two(rest, 1, rest * 2),
    }


def _warps(constants: dict[str, int], entries: int) -> int:
    """Warps for `entries` of a block to each thread."""
    total = constants["BLOCK"] * (2 * constants["BLOCK_HALF"] + constants["BLOCK_REST"])
    return power_of_two(total // (32 * entries), 1, 8)


def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(q, k) normalised and turned, as `reference.qk_norm_rotary`."""
    (rows, heads, length, width), rotary = q.shape, cos.shape[-1]
    q_out, k_out = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    constants = _constants(length, width, rotary)
    blocks = -(-length // constants["BLOCK"])
    launch(
        norm_rotary,
        (rows * heads * blocks,),
        *(q, k, cos.contiguous(), sin.contiguous()),
        *(each.contiguous() for each in (q_weight, q_bias, k_weight, k_bias)),
        *(q_out, k_out, heads, length, blocks, length * rotary if cos.ndim == 4 and cos.shape[0] > 1 else 0),
        *(*q.stride(), *k.stride(), eps),
        warps=_warps(constants, 32),
        **constants,
    )
    return q_out, k_out


def qk_norm_rotary_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    eps: float,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and the four parameters in their order; those of the parameters empty where not wanted.

    Every program adds up its own positions, and their sums are added in one order.
    """
    (rows, heads, length, width), rotary = q.shape, cos.shape[-1]
    constants = _constants(length, width, rotary)
    blocks = -(-length // constants["BLOCK"])
    tasks = rows * heads * blocks
    programs = min(tasks, MOST_PROGRAMS)
    angles = cos.contiguous(), sin.contiguous()
    found = []
    for x, grad, weight, bias in ((q, grad_q, q_weight, q_bias), (k, grad_k, k_weight, k_bias)):
        d_x = torch.empty_like(x)
        sums = torch.empty(programs, 2, width, dtype=torch.float32, device=x.device) if parameters else None
        launch(
            norm_rotary_backward,
            (programs,),
            *(x, grad, *angles, weight.contiguous(), d_x, sums, heads, length, blocks, tasks),
            length * rotary if cos.ndim == 4 and cos.shape[0] > 1 else 0,
            *(*x.stride(), *grad.stride(), *d_x.stride(), eps),
            warps=_warps(constants, 16),
            **constants,
        )
        if sums is None:
            found.append((d_x, weight.new_empty(0), bias.new_empty(0)))
        else:
            found.append((d_x, sums[:, 0].sum(0).to(weight.dtype), sums[:, 1].sum(0).to(bias.dtype)))
    (d_q, d_q_weight, d_q_bias), (d_k, d_k_weight, d_k_bias) = found
    return d_q, d_k, d_q_weight, d_q_bias, d_k_weight, d_k_bias
