"""The `cpu` backend of the operations with a head: torch's matrix products around the compiled core's row loops.

A chunk of rows is multiplied into one reused buffer; the core turns it into log-probabilities, or in place into the
gradient of the scores, and two more products send that back. Tokens outside a mask are left out before the first
product. Everything is float32: 16-bit hidden states are widened a chunk at a time, a 16-bit weight once, because torch
has no product of bfloat16 matrices on a CPU that returns float32. Does not validate.

Legend: M tokens, m tokens of a chunk, D width, K codes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import _native
from ._dispatch import Entry, offer
from .reference import NEEDS_BIAS, NEEDS_HIDDEN, NEEDS_UNCOND, NEEDS_WEIGHT

BUFFER_ELEMENTS = 1 << 21
"""Scores held at once: 8 MiB. Fewer make the products slower, more leave the cache."""


class _Head:
    """Guided hidden states times the head into the buffer, and the way back. `rows` None: all, in order."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        hidden_uncond: Tensor | None,
        guidance_scale: float,
        rows: Tensor | None,
        needs: int,
    ):
        width, entries = hidden.shape[-1], len(weight)
        self.hidden_MD, self.rows, self.needs, self.scale = hidden.reshape(-1, width), rows, needs, guidance_scale
        self.uncond_MD = None if hidden_uncond is None else hidden_uncond.reshape(-1, width)
        self.weight_KD, self.weight_dtype = weight.float(), weight.dtype
        self.bias_K = None if bias is None else bias.float().contiguous()
        self.bias_dtype = weight.dtype if bias is None else bias.dtype
        self.count = len(self.hidden_MD) if rows is None else len(rows)
        self.step = max(1, min(self.count, BUFFER_ELEMENTS // entries))
        self.buffer = torch.empty(self.step, entries)
        new = torch.empty if rows is None else torch.zeros
        self.d_hidden = new(self.hidden_MD.shape if needs & NEEDS_HIDDEN else 0, dtype=hidden.dtype)
        self.d_uncond = new(self.hidden_MD.shape if needs & NEEDS_UNCOND else 0, dtype=hidden.dtype)
        self.narrow = hidden.dtype != torch.float32
        self.d_weight = torch.zeros(weight.shape if needs & NEEDS_WEIGHT else 0)
        self.d_bias = torch.zeros(entries if needs & NEEDS_BIAS else 0)

    def chunks(self) -> Iterator[slice]:
        """Pieces of the tokens that fit the buffer."""
        for start in range(0, self.count, self.step):
            yield slice(start, min(start + self.step, self.count))

    def forward(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """(guided hidden states [m, D], W·h [m, K] in the buffer)."""
        rows = chunk if self.rows is None else self.rows[chunk]
        guided_mD = self.hidden_MD[rows].float()
        if self.uncond_MD is not None:
            guided_mD = (guided_mD * (1.0 + self.scale)).sub_(self.uncond_MD[rows].float(), alpha=self.scale)
        scores_mK = self.buffer[: len(guided_mD)]
        return guided_mD, torch.mm(guided_mD, self.weight_KD.T, out=scores_mK)

    def backward(self, chunk: slice, guided_mD: Tensor, d_scores_mK: Tensor) -> None:
        """Add what the gradient of a chunk's scores means for hidden states, weight and bias."""
        if self.needs & NEEDS_WEIGHT:
            self.d_weight.addmm_(d_scores_mK.T, guided_mD)
        if self.needs & NEEDS_BIAS:
            self.d_bias += d_scores_mK.sum(0)
        if self.needs & (NEEDS_HIDDEN | NEEDS_UNCOND):
            rows = chunk if self.rows is None else self.rows[chunk]
            if self.needs & NEEDS_HIDDEN and self.uncond_MD is None and isinstance(rows, slice) and not self.narrow:
                torch.mm(d_scores_mK, self.weight_KD, out=self.d_hidden[rows])
                return
            d_guided_mD = d_scores_mK @ self.weight_KD
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
            self.d_weight.to(self.weight_dtype),
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
    head = _Head(hidden, weight, bias, hidden_uncond, guidance_scale, None, 0)
    target_M = target.reshape(-1)
    logp_M, lse_M = torch.empty(len(target_M)), torch.empty(len(target_M))
    for chunk in head.chunks():
        _, scores_mK = head.forward(chunk)
        _native.head_logprob(
            scores_mK, head.bias_K, temperature, target_M[chunk].contiguous(), lse_M[chunk], logp_M[chunk], None
        )
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
    if len(rows) < len(grad_M):
        target_M, grad_M, lse_M = target_M[rows], grad_M[rows], lse_M[rows]
    head = _Head(
        hidden, weight, bias, hidden_uncond, guidance_scale, rows if len(rows) < target.numel() else None, needs
    )
    for chunk in head.chunks():
        guided_mD, scores_mK = head.forward(chunk)
        _native.head_gradient(scores_mK, head.bias_K, temperature, target_M[chunk], lse_M[chunk], grad_M[chunk])
        head.backward(chunk, guided_mD, scores_mK)
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
    head = _Head(hidden, weight, bias, hidden_uncond, guidance_scale, kept, needs)

    def gather(values: Tensor) -> Tensor:
        flat = values.expand(shape).reshape(-1)
        return flat.contiguous() if kept is None else flat[kept]

    target_M, old_M, ref_M = gather(target), gather(old_logp), None if ref_logp is None else gather(ref_logp)
    advantage_M = gather(advantages.reshape(-1, *[1] * (len(shape) - 1)))
    alpha_M = gather(alpha) if alpha.numel() > 1 else alpha
    lse_M, logp_M = torch.empty(head.count), torch.empty(head.count)
    entropy_M = torch.empty(head.count) if entropy else None

    def loss(part: slice) -> tuple[Tensor, Tensor]:
        weights = alpha_M[part] if alpha_M.numel() > 1 else alpha_M
        ref = None if ref_M is None else ref_M[part]
        return _native.loss_over_tokens(
            logp_M[part], old_M[part], ref, advantage_M[part], 1, weights, None, rollouts, clip_low, clip_high, beta
        )

    for chunk in head.chunks():
        guided_mD, scores_mK = head.forward(chunk)
        _native.head_logprob(
            scores_mK,
            head.bias_K,
            temperature,
            target_M[chunk],
            lse_M[chunk],
            logp_M[chunk],
            None if entropy_M is None else entropy_M[chunk],
        )
        if needs:
            slope_m = loss(chunk)[1]
            _native.head_gradient(scores_mK, head.bias_K, temperature, target_M[chunk], lse_M[chunk], slope_m)
            head.backward(chunk, guided_mD, scores_mK)
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
