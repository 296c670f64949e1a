"""The `reference` backend: what "correct" means for every operation, in plain torch, on any device, up to float64.

Equations: the GRPO loss is UniCTokens-R1's (the clipped objective with the k3 penalty and Dr. GRPO's normalisation);
maskgit_step as published with MaskGIT and Show-o. Rows are handled in chunks, and the backward pass forms the logits of
a chunk anew, so no tensor of size [..., K] exists beyond `CHUNK_ELEMENTS` numbers. Does not validate (the modules
beside it do) and does not know about autograd or other backends.

Legend: M tokens (all leading dimensions as one), D width, K codes, B samples, N positions, R rollouts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import philox
from .registry import Entry, offer

CHUNK_ELEMENTS = 1 << 22
"""Most logits formed at once. A few temporaries of this size exist together: about 16 MiB each in float32."""

NEEDS_HIDDEN, NEEDS_UNCOND, NEEDS_WEIGHT, NEEDS_BIAS = 1, 2, 4, 8
"""Bits of `needs`: which gradients a call shall form."""


def working_dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays; everything else is computed in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunks(count: int, entries: int, limit: int | None = None) -> Iterator[slice]:
    size = max(1, (limit or CHUNK_ELEMENTS) // max(entries, 1))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


class _Head:
    """Guided hidden states times the head, a chunk of rows at a time, and the way back."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        hidden_uncond: Tensor | None,
        guidance_scale: float,
        temperature: float,
        needs: int = 0,
    ):
        self.dtype = working_dtype(hidden)
        self.hidden_MD = hidden.reshape(-1, hidden.shape[-1])
        guided = hidden_uncond is not None and guidance_scale != 0.0
        self.uncond_MD = hidden_uncond.reshape(-1, hidden.shape[-1]) if guided and hidden_uncond is not None else None
        self.weight_KD = weight.to(self.dtype)
        self.bias_K = None if bias is None else bias.to(self.dtype)
        self.scale, self.temperature = guidance_scale, temperature
        # An operation must not return one tensor twice, so each gradient that nobody needs is an empty one of its own.
        self.d_hidden = torch.zeros_like(self.hidden_MD) if needs & NEEDS_HIDDEN else hidden.new_empty(0)
        self.d_uncond = torch.zeros_like(self.hidden_MD) if needs & NEEDS_UNCOND else hidden.new_empty(0)
        self.d_weight = torch.zeros_like(self.weight_KD) if needs & NEEDS_WEIGHT else self.weight_KD.new_empty(0)
        self.d_bias = self.weight_KD.new_zeros(len(weight)) if needs & NEEDS_BIAS else self.weight_KD.new_empty(0)
        self.needs = needs
        self.shape, self.weight_dtype = hidden.shape, weight.dtype
        self.bias_dtype = weight.dtype if bias is None else bias.dtype

    def guided(self, rows: slice | Tensor) -> Tensor:
        """h = (1+s)·hidden − s·hidden_uncond, [m, D]."""
        hidden = self.hidden_MD[rows].to(self.dtype)
        if self.uncond_MD is None:
            return hidden
        return (1.0 + self.scale) * hidden - self.scale * self.uncond_MD[rows].to(self.dtype)

    def logits(self, guided_mD: Tensor) -> Tensor:
        """(W·h + b) / temperature, [m, K]."""
        return torch.nn.functional.linear(guided_mD, self.weight_KD, self.bias_K).div_(self.temperature)

    def back(self, rows: slice | Tensor, guided_mD: Tensor, d_logits_mK: Tensor) -> None:
        """Add what the gradient of a chunk's logits means for hidden states, weight and bias."""
        d_scores_mK = d_logits_mK.div_(self.temperature)
        if self.needs & NEEDS_WEIGHT:
            self.d_weight.addmm_(d_scores_mK.T, guided_mD)
        if self.needs & NEEDS_BIAS:
            self.d_bias += d_scores_mK.sum(0)
        if self.needs & (NEEDS_HIDDEN | NEEDS_UNCOND):
            d_guided_mD = d_scores_mK @ self.weight_KD
            factor = 1.0 if self.uncond_MD is None else 1.0 + self.scale
            if self.needs & NEEDS_HIDDEN:
                self.d_hidden[rows] = (factor * d_guided_mD).to(self.d_hidden.dtype)
            if self.needs & NEEDS_UNCOND and self.uncond_MD is not None:
                self.d_uncond[rows] = (-self.scale * d_guided_mD).to(self.d_uncond.dtype)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(d_hidden, d_hidden_uncond, d_weight, d_bias) in the inputs' shapes and dtypes; empty where not needed."""
        return (
            self.d_hidden.view(self.shape) if self.needs & NEEDS_HIDDEN else self.d_hidden,
            self.d_uncond.view(self.shape) if self.needs & NEEDS_UNCOND else self.d_uncond,
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
    """log_softmax((W·h + b)/temperature)[target] and the log-sum-exp, both shaped like target."""
    head = _Head(hidden, weight, bias, hidden_uncond, guidance_scale, temperature)
    target_M = target.reshape(-1)
    logp_M = hidden.new_empty(target_M.shape, dtype=head.dtype)
    lse_M = torch.empty_like(logp_M)
    for rows in _chunks(len(target_M), len(weight)):
        logits_mK = head.logits(head.guided(rows))
        lse_M[rows] = logits_mK.logsumexp(-1)
        logp_M[rows] = logits_mK.gather(-1, target_M[rows, None])[:, 0] - lse_M[rows]
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
    """Gradients of Σ grad·logp; d_logits = grad·(onehot(target) − softmax)."""
    head = _Head(hidden, weight, bias, hidden_uncond, guidance_scale, temperature, needs)
    target_M, grad_M, lse_M = target.reshape(-1), grad.reshape(-1).to(head.dtype), lse.reshape(-1)
    for rows in _chunks(len(target_M), len(weight)):
        guided_mD = head.guided(rows)
        _logits_gradient(head, rows, guided_mD, head.logits(guided_mD), lse_M[rows], target_M[rows], grad_M[rows])
    return head.gradients()


def _logits_gradient(
    head: _Head,
    rows: slice | Tensor,
    guided_mD: Tensor,
    logits_mK: Tensor,
    lse_m: Tensor,
    target_m: Tensor,
    grad_m: Tensor,
) -> None:
    """Overwrites the logits with grad·(onehot − softmax) and sends that back through the head."""
    d_logits_mK = logits_mK.sub_(lse_m[:, None]).exp_().mul_(-grad_m[:, None])
    d_logits_mK.scatter_add_(1, target_m[:, None], grad_m[:, None])
    head.back(rows, guided_mD, d_logits_mK)


def _objective(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    advantage: Tensor,
    clip_low: float,
    clip_high: float,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per token: min(D·A, clip(D)·A) − beta·k3, its derivative in logp, and (clipped, k3, D) for the statistics."""
    ratio = (logp - old_logp).exp()
    value = torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantage)
    clipped = ((advantage > 0) & (ratio > 1.0 + clip_high)) | ((advantage < 0) & (ratio < 1.0 - clip_low))
    slope = torch.where(clipped, torch.zeros_like(ratio), ratio * advantage)
    if ref_logp is None:
        return value, slope, clipped, torch.zeros_like(ratio), ratio
    gap = ref_logp - logp
    k3 = gap.exp() - gap - 1.0
    if beta != 0.0:
        value = value - beta * k3
        slope = slope + beta * (gap.exp() - 1.0)
    return value, slope, clipped, k3, ratio


def _per_token(values_R: Tensor, shape: torch.Size) -> Tensor:
    """[R] to the shape [R, ...] of the tokens, without a copy."""
    return values_R.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)


def _statistics(clipped: Tensor, k3: Tensor, ratio: Tensor, entropy: Tensor | None, mask: Tensor | None) -> Tensor:
    """(clip_fraction, kl, ratio_max, ratio_mean[, entropy]) over the tokens that count, zero if none does."""
    means = [clipped.to(ratio.dtype), k3, ratio] + ([] if entropy is None else [entropy])
    count: Tensor | int = max(ratio.numel(), 1)
    if mask is not None:
        count = mask.sum().clamp_min(1)
        zero = ratio.new_zeros(())
        means = [torch.where(mask, x, zero) for x in means]
        ratio = torch.where(mask, ratio, zero)
    top = ratio.max() if ratio.numel() else ratio.new_zeros(())
    clip_fraction, kl, ratio_mean, *rest = [x.sum() / count for x in means]
    return torch.stack([clip_fraction, kl, top, ratio_mean, *rest])


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    advantages: Tensor,
    alpha: Tensor,
    mask: Tensor | None,
    clip_low: float,
    clip_high: float,
    beta: float,
    gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss = −1/R Σ mask·alpha·(min(D·A, clip(D)·A) − beta·k3); also the four statistics and d loss/d logp, which is
    empty without `gradient`."""
    dtype = working_dtype(logp)
    advantage = _per_token(advantages.to(dtype), logp.shape)
    value, slope, clipped, k3, ratio = _objective(
        logp.to(dtype),
        old_logp.to(dtype),
        None if ref_logp is None else ref_logp.to(dtype),
        advantage,
        clip_low,
        clip_high,
        beta,
    )
    share = -alpha.to(dtype) / logp.shape[0]
    terms, slopes = share * value, share * slope if gradient else value.new_empty(0)
    if mask is not None:
        mask = mask.expand(logp.shape)
        zero = terms.new_zeros(())
        terms = torch.where(mask, terms, zero)
        slopes = torch.where(mask, slopes, zero) if gradient else slopes
    return terms.sum(), _statistics(clipped, k3, ratio, None, mask), slopes.to(logp.dtype)


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
    """selected_logprob and grpo_loss in one pass: (loss, logp, five statistics, and the four gradients of the loss).

    The fifth statistic is the mean entropy, 0 unless `entropy` asks for it.

    Tokens outside the mask are left out before the first product; their logp is returned as 0. A chunk's gradient is
    formed while its logits are there, so they are computed once. Counting the tokens inside a mask waits for the
    device.
    """
    head = _Head(hidden, weight, bias, hidden_uncond, guidance_scale, temperature, needs)
    shape, dtype = target.shape, head.dtype
    kept = None if mask is None else mask.expand(shape).reshape(-1).nonzero()[:, 0]

    def gather(values: Tensor) -> Tensor:
        flat = values.expand(shape).reshape(-1)
        return flat if kept is None else flat[kept]

    target_M, old_M, alpha_M = gather(target), gather(old_logp).to(dtype), gather(alpha).to(dtype)
    ref_M = None if ref_logp is None else gather(ref_logp).to(dtype)
    advantage_M = gather(_per_token(advantages, shape)).to(dtype)
    share_M = -alpha_M / shape[0]
    logp_M, entropy_M = torch.empty_like(old_M), torch.zeros_like(old_M)
    for chunk in _chunks(len(target_M), len(weight)):
        rows = chunk if kept is None else kept[chunk]
        guided_mD = head.guided(rows)
        logits_mK = head.logits(guided_mD)
        lse_m = logits_mK.logsumexp(-1)
        logp_M[chunk] = logits_mK.gather(-1, target_M[chunk, None])[:, 0] - lse_m
        if entropy:
            probability_mK = (logits_mK - lse_m[:, None]).exp_()
            entropy_M[chunk] = lse_m - probability_mK.mul_(logits_mK).nan_to_num_(nan=0.0).sum(-1)
        if needs:
            ref_m = None if ref_M is None else ref_M[chunk]
            slope_m = _objective(logp_M[chunk], old_M[chunk], ref_m, advantage_M[chunk], clip_low, clip_high, beta)[1]
            _logits_gradient(head, rows, guided_mD, logits_mK, lse_m, target_M[chunk], share_M[chunk] * slope_m)
    value_M, _, clipped_M, k3_M, ratio_M = _objective(logp_M, old_M, ref_M, advantage_M, clip_low, clip_high, beta)
    loss = (share_M * value_M).sum()
    if kept is None:
        logp = logp_M
    else:
        logp = logp_M.new_zeros(target.numel())
        logp[kept] = logp_M
    statistics = _statistics(clipped_M, k3_M, ratio_M, entropy_M, None)
    return loss, logp.view(shape), statistics, *head.gradients()


def argmax_lowest(values: Tensor) -> Tensor:
    """argmax over the last dimension; among equals the lowest index, on every device."""
    best = values.amax(-1, keepdim=True)
    lanes = torch.arange(values.shape[-1], device=values.device)
    return torch.where(values == best, lanes, values.shape[-1] - 1).amin(-1)


def maskgit_step(
    logits: Tensor,
    codes: Tensor,
    mask_len: Tensor,
    temperature: Tensor,
    seed: int,
    sample_ids: Tensor,
    step: Tensor,
    token_gumbel: Tensor | None,
    rank_gumbel: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, chosen, logp, masked), see :func:`pyunictokens.ops.maskgit_step`. All per-sample arguments are [B]."""
    batch, positions, entries = logits.shape
    dtype = working_dtype(logits)
    flat_MK, codes_M = logits.flatten(0, 1), codes.flatten()
    position_M = torch.arange(positions, device=logits.device).repeat(batch)
    sample_M, step_M = sample_ids.repeat_interleave(positions), step.repeat_interleave(positions)
    chosen_M, logp_M = torch.empty_like(codes_M), flat_MK.new_empty(len(codes_M), dtype=dtype)
    for rows in _chunks(len(codes_M), entries, CHUNK_ELEMENTS // 4):
        logp_mK = torch.log_softmax(flat_MK[rows].to(dtype), -1)
        if token_gumbel is None:
            noise_mK = philox.gumbel(seed, sample_M[rows], step_M[rows], position_M[rows], entries, stream).to(dtype)
        else:
            noise_mK = token_gumbel.flatten(0, 1)[rows].to(dtype)
        sampled_m = argmax_lowest(logp_mK + noise_mK)
        chosen_M[rows] = torch.where(codes_M[rows] < 0, sampled_m, codes_M[rows])
        logp_M[rows] = logp_mK.gather(-1, chosen_M[rows, None])[:, 0]
    chosen, logp = chosen_M.view_as(codes), logp_M.view_as(codes)

    if rank_gumbel is None:
        rank_gumbel = philox.gumbel(seed, sample_M, step_M, position_M, 1, philox.STREAM_RANK).view(batch, positions)
    unknown = codes < 0
    confidence = logp + temperature.to(dtype)[:, None] * rank_gumbel.to(dtype)
    confidence = torch.where(unknown, confidence, torch.inf)
    order = confidence.argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(positions, device=codes.device).expand_as(order))
    masked = (rank < mask_len[:, None]) & unknown
    return torch.where(masked, -1, chosen), chosen, logp, masked


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
    """(q, k) [B, H, L, E] after their layer norms and a partial turn; differentiable as it stands."""
    width = q.shape[-1:]
    q, k = F.layer_norm(q, width, q_weight, q_bias, eps), F.layer_norm(k, width, k_weight, k_bias, eps)
    return partial_rotary(q, cos, sin), partial_rotary(k, cos, sin)


def partial_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., L, E] with its first R entries turned, entry e with e + R/2; cos and sin [..., L, R]."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)


def tanh_gelu(x: Tensor) -> tuple[Tensor]:
    """GELU as tanh approximates it, of any shape."""
    return (F.gelu(x, approximate="tanh"),)


offer("selected_logprob", "reference", Entry(selected_logprob, selected_logprob_backward))
offer("grpo_loss", "reference", Entry(grpo_loss))
offer("maskgit_grpo_loss", "reference", Entry(maskgit_grpo_loss))
offer("maskgit_step", "reference", Entry(maskgit_step))
offer("qk_norm_rotary", "reference", Entry(qk_norm_rotary))
offer("tanh_gelu", "reference", Entry(tanh_gelu))
