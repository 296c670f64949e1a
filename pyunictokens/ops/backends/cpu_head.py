"""The `cpu` backend of the operations with a head: chunks of tokens, handed to the compiled core one after another.

The core multiplies a chunk with a block of the weight's rows, turns the scores into log-probabilities, or in place into
their gradient, which two more products send back (csrc/include/head.h). `selected_logprob` needs no more than a block
at once; `maskgit_grpo_loss` holds whole rows of scores, because their gradient is known as soon as their
log-probabilities are. What stays here is what torch says well: guidance, the tokens inside a mask (the others are left
out before the first product), dtypes. Everything is float32: 16-bit hidden states are widened a chunk at a time, a
16-bit weight by the core as it reads it. Does not validate.

Legend: M tokens, m tokens of a chunk, D width, K codes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..reference import NEEDS_BIAS, NEEDS_HIDDEN, NEEDS_UNCOND, NEEDS_WEIGHT
from ..registry import Entry, offer
from . import cpu as _native

TOKENS = 64, 1024
"""The least and the most tokens of a chunk. The weight is read anew for each chunk, so few make the products slower."""

PACKED_ELEMENTS = 1 << 19, 1 << 21
"""Hidden states of a chunk, rearranged for the products, twice where the weight learns: 2 MiB stay in a core's cache.
Where they are so wide that this makes fewer than ENOUGH tokens, up to 8 MiB for ENOUGH of them."""

ENOUGH = 256
"""Tokens over which the packed weight and its gradient, read and written once a chunk, cost little."""

BLOCK_ELEMENTS = 1 << 19
"""Scores of a block: 2 MiB."""

ROW_ELEMENTS = 1 << 21
"""Scores held at once where whole rows are: 8 MiB; more leave the cache, fewer make chunks of few tokens."""


class _Head:
    """Guided hidden states times the head into the buffer, and the way back. `rows` None: all, in order."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        hidden_uncond: Tensor | None,
        guidance_scale: float,
        temperature: float,
        target_M: Tensor,
        rows: Tensor | None,
        needs: int,
        whole_rows: bool,
    ):
        width, entries = hidden.shape[-1], len(weight)
        self.hidden_MD, self.rows, self.needs, self.scale = hidden.reshape(-1, width), rows, needs, guidance_scale
        self.uncond_MD = None if hidden_uncond is None else hidden_uncond.reshape(-1, width)
        self.weight_KD, self.temperature, self.target_M = weight.contiguous(), temperature, target_M
        self.bias_K = None if bias is None else bias.float().contiguous()
        self.bias_dtype = weight.dtype if bias is None else bias.dtype
        self.count = len(self.hidden_MD) if rows is None else len(rows)
        wide = width * (2 if needs & NEEDS_WEIGHT else 1)
        fitting = max(PACKED_ELEMENTS[0] // wide, min(ENOUGH, PACKED_ELEMENTS[1] // wide))
        self.step = min(TOKENS[1], fitting, ROW_ELEMENTS // entries if whole_rows else TOKENS[1])
        self.step = min(_native.head_padded(max(self.count, 1)), max(TOKENS[0], self.step // TOKENS[0] * TOKENS[0]))
        self.block = entries if whole_rows else min(entries, max(TOKENS[0], BLOCK_ELEMENTS // self.step))
        packed = _native.head_packed(self.step, width, self.block, bool(needs & NEEDS_WEIGHT))
        self.scores, self.packed = torch.empty(self.step * self.block), torch.empty(packed)
        new = torch.empty if rows is None else torch.zeros
        self.d_hidden = new(self.hidden_MD.shape if needs & NEEDS_HIDDEN else 0, dtype=hidden.dtype)
        self.d_uncond = new(self.hidden_MD.shape if needs & NEEDS_UNCOND else 0, dtype=hidden.dtype)
        self.d_weight = torch.zeros(weight.shape if needs & NEEDS_WEIGHT else 0)
        self.d_bias = torch.zeros(entries if needs & NEEDS_BIAS else 0)

    def chunks(self) -> Iterator[tuple[slice, _native.HeadChunk]]:
        """Pieces of the tokens that fit the workspace, in order."""
        for start in range(0, self.count, self.step):
            part = slice(start, min(start + self.step, self.count))
            rows = part if self.rows is None else self.rows[part]
            guided_mD = self.hidden_MD[rows].float()
            if self.uncond_MD is not None:
                guided_mD = (guided_mD * (1.0 + self.scale)).sub_(self.uncond_MD[rows].float(), alpha=self.scale)
            head = (self.weight_KD, self.bias_K, self.temperature)
            workspace = (self.block, self.scores, self.packed)
            yield part, _native.HeadChunk(guided_mD, head, self.target_M[part], workspace)

    def backward(self, part: slice, chunk: _native.HeadChunk, lse_m: Tensor, slope_m: Tensor, held: bool) -> None:
        """Add the gradient of Σ slope·logp over a chunk to those of hidden states, weight and bias."""
        wants_hidden = bool(self.needs & (NEEDS_HIDDEN | NEEDS_UNCOND))
        rows = part if self.rows is None else self.rows[part]
        in_place = (
            wants_hidden and self.uncond_MD is None and self.rows is None and self.d_hidden.dtype == torch.float32
        )
        d_guided_mD = self.d_hidden[rows] if in_place else torch.empty(chunk.shape if wants_hidden else 0)
        chunk.backward(lse_m, slope_m, held, (d_guided_mD, self.d_weight, self.d_bias))
        if in_place or not wants_hidden:
            return
        if self.needs & NEEDS_UNCOND and self.uncond_MD is not None:
            self.d_uncond[rows] = (-self.scale * d_guided_mD).to(self.d_uncond.dtype)
        if self.needs & NEEDS_HIDDEN:
            factor = 1.0 if self.uncond_MD is None else 1.0 + self.scale
            self.d_hidden[rows] = d_guided_mD.mul_(factor).to(self.d_hidden.dtype)

    def gradients(self, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(d_hidden, d_hidden_uncond, d_weight, d_bias) in the inputs' shapes and dtypes; empty where not needed."""
        return (
            self.d_hidden.view(shape) if self.needs & NEEDS_HIDDEN else self.d_hidden,
            self.d_uncond.view(shape) if self.needs & NEEDS_UNCOND else self.d_uncond,
            self.d_weight.to(self.weight_KD.dtype),
            self.d_bias.to(self.bias_dtype),
        )


def selected_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    hidden_uncond: Tensor | None,
    guidance_scale: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """log_softmax((W·h + b)/temperature)[target] and the log-sum-exp, both float32 shaped like target."""
    target_M = target.reshape(-1).contiguous()
    head = _Head(hidden, weight, bias, hidden_uncond, guidance_scale, temperature, target_M, None, 0, False)
    logp_M, lse_M = torch.empty(len(target_M)), torch.empty(len(target_M))
    for part, chunk in head.chunks():
        chunk.logprob(lse_M[part], logp_M[part], None)
    return logp_M.view(target.shape), lse_M.view(target.shape)


def selected_logprob_backward(
    grad: Tensor,
    lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    hidden_uncond: Tensor | None,
    guidance_scale: float,
    temperature: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of Σ grad·logp; the scores are formed anew, chunk by chunk. Tokens with grad = 0 cost no product."""
    target_M, grad_M = target.reshape(-1).contiguous(), grad.float().reshape(-1).contiguous()
    lse_M, rows = lse.reshape(-1).contiguous(), grad_M.nonzero()[:, 0]
    kept = rows if len(rows) < len(grad_M) else None
    if kept is not None:
        target_M, grad_M, lse_M = target_M[rows], grad_M[rows], lse_M[rows]
    head = _Head(hidden, weight, bias, hidden_uncond, guidance_scale, temperature, target_M, kept, needs, False)
    for part, chunk in head.chunks():
        head.backward(part, chunk, lse_M[part], grad_M[part], held=False)
    return head.gradients(hidden.shape)


def maskgit_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    advantages: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    hidden_uncond: Tensor | None,
    mask: Tensor | None,
    guidance_scale: float,
    temperature: float,
    clip_low: float,
    clip_high: float,
    beta: float,
    needs: int,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logp, five statistics, and the four gradients of the loss), each chunk's product formed once."""
    shape, rollouts = target.shape, target.shape[0]
    kept = None if mask is None else mask.expand(shape).reshape(-1).nonzero()[:, 0]

    def gather(values: Tensor) -> Tensor:
        flat = values.expand(shape).reshape(-1)
        return flat.contiguous() if kept is None else flat[kept]

    target_M, old_M, ref_M = gather(target), gather(old_logp), None if ref_logp is None else gather(ref_logp)
    advantage_M = gather(advantages.reshape(-1, *[1] * (len(shape) - 1)))
    alpha_M = gather(alpha) if alpha.numel() > 1 else alpha
    head = _Head(hidden, weight, bias, hidden_uncond, guidance_scale, temperature, target_M, kept, needs, True)
    lse_M, logp_M = torch.empty(head.count), torch.empty(head.count)
    entropy_M = torch.empty(head.count) if entropy else None

    def loss(part: slice) -> tuple[Tensor, Tensor]:
        weights = alpha_M[part] if alpha_M.numel() > 1 else alpha_M
        ref = None if ref_M is None else ref_M[part]
        return _native.loss_over_tokens(
            logp_M[part], old_M[part], ref, advantage_M[part], 1, weights, None, rollouts, clip_low, clip_high, beta
        )

    for part, chunk in head.chunks():
        chunk.logprob(lse_M[part], logp_M[part], None if entropy_M is None else entropy_M[part])
        if needs:
            head.backward(part, chunk, lse_M[part], loss(part)[1], held=True)
    out, _ = loss(slice(None))
    mean = out.new_zeros(()) if entropy_M is None or not head.count else entropy_M.double().mean().float()
    logp = logp_M if kept is None else logp_M.new_zeros(target.numel()).index_copy_(0, kept, logp_M)
    return out[0].clone(), logp.view(shape), torch.cat([out[1:], mean[None]]), *head.gradients(hidden.shape)


if _native.core() is not None:
    offer(
        "selected_logprob",
        "cpu",
        Entry(selected_logprob, selected_logprob_backward, devices=("cpu",), dtypes=_native.NARROW),
    )
    offer("maskgit_grpo_loss", "cpu", Entry(maskgit_grpo_loss, devices=("cpu",), dtypes=_native.NARROW))
