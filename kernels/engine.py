"""The head operations of the `triton` backend: chunks of rows, products, epilogues, and the way back.

A call is cut into chunks of rows by `plan`. For every chunk: gather the (guided) rows of the tokens that take part,
then, in pieces whose float32 logits exist at once, product → row kernel; then, over the whole chunk, the column sums of
a bias and the two products of the way back. Products are cuBLAS, except where the number of rows is known to the
device alone (`count`).

Masks: outside a CUDA graph the host waits once for the number of tokens kept, and work is cut to it. While a graph is
captured nothing may wait: chunks cover all tokens, and programs past the count end at once.

Does not validate and knows nothing of autograd. Legend as in `rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import epilogue, head, measured, rows, scores
from .grpo import dense, grpo
from .launch import capturing
from .plan import BIAS_SLICES, choose
from .rotary import qk_norm_rotary as qk_norm_rotary
from .rotary import qk_norm_rotary_backward as qk_norm_rotary_backward

NEEDS_HIDDEN, NEEDS_UNCOND, NEEDS_WEIGHT, NEEDS_BIAS = 1, 2, 4, 8
"""Bits of `needs`, as in the reference."""


@dataclass
class Settings:
    """What tests, benchmarks and users turn; the defaults are what everybody else gets."""

    deterministic: bool = True
    """Every sum in one order. False lets the programs of a small captured product share a sum out."""
    engine: str | None = None
    """"chunked" or "fused" instead of the cost model's choice (where no gradient is formed)."""
    counted: bool | None = None
    """Read the number of kept tokens on the device (as while capturing) or not; None: only while capturing."""
    statistics: str | None = None
    """Who forms a softmax' statistics on the way to a gradient: "rows" (the row kernel), "product" (its epilogue, where
    that can run); None: what `measured` found to be faster."""


settings = Settings()

Epilogue = Callable[[Tensor, Tensor | None, Tensor | None, int], None]
"""(scores of some rows, where their gradient goes, where its factor goes, number of the first row)."""


class Head:
    """Guided hidden states times the head for the tokens that take part, and the way back."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        hidden_uncond: Tensor | None,
        guidance_scale: float,
        temperature: float,
        needs: int = 0,
        mask_M: Tensor | None = None,
        joins: bool = False,
    ):
        """`joins`: whoever visits the scores can make use of parts of their statistics (`self.parts_3mP`)."""
        wide = torch.promote_types(hidden.dtype, weight.dtype)
        self.dtype = torch.float32 if wide == torch.float64 else wide
        width = hidden.shape[-1]
        self.hidden_MD = hidden.detach().reshape(-1, width).contiguous()
        guided = hidden_uncond is not None and guidance_scale != 0.0
        self.uncond_MD = None
        if hidden_uncond is not None and guided:
            self.uncond_MD = hidden_uncond.detach().reshape(-1, width).contiguous()
        self.weight_KD = weight.detach().to(self.dtype).contiguous()
        self.bias_K = None if bias is None else bias.detach().contiguous()
        self.scale, self.temperature, self.needs = guidance_scale, temperature, needs
        self.shape, self.weight_dtype = hidden.shape, weight.dtype
        self.bias_dtype = weight.dtype if bias is None else bias.dtype

        self.index: Tensor | None = None
        self.count: Tensor | None = None
        self.total = len(self.hidden_MD)
        if mask_M is not None:
            self.index, self.count = rows.compact(mask_M)
            counted = capturing(hidden) if settings.counted is None else settings.counted
            if not counted:
                self.total = self.total if hidden.is_meta else int(self.count)
                self.count = None
        entries, size = len(weight), self.dtype.itemsize
        self.plan = choose(self.total, width, entries, size, gradient=bool(needs), engine=settings.engine)
        self.gathered = guided or self.index is not None or self.dtype != hidden.dtype
        self.form: str | None = "rows"
        if joins and needs and self.total and settings.statistics != "rows":
            like = self.weight_KD if self.gathered else self.hidden_MD
            if not scores.objection(like, self.weight_KD):
                self.form = settings.statistics or measured.remembered(self._key(), like)
        self._allocate(guided)

    def _key(self) -> measured.Key:
        """What the faster form depends on."""
        (entries, width), rows_ = self.weight_KD.shape, self.plan.inner
        device = self.weight_KD.device
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        dtype, shape = str(self.dtype).removeprefix("torch."), (measured.bucket(rows_), width, entries)
        return measured.Key(card, measured.SOFTWARE, dtype, *shape, self.bias_K is not None, self.count is not None)

    def _allocate(self, guided: bool) -> None:
        """Buffers of one chunk, and the gradients: empty ones, each of its own, where an operation needs none."""
        device, like = self.hidden_MD.device, self.hidden_MD
        (entries, width), m = self.weight_KD.shape, self.plan.rows
        single: dict[str, Any] = {"dtype": torch.float32, "device": device}
        chunked = self.plan.engine == "chunked"
        # Rows of logits that TMA writes begin at multiples of 16 bytes, others follow each other without a gap.
        self.pitch = entries if self.form == "rows" else scores.pitch(entries)
        self.buffer = torch.empty(self.plan.inner * self.pitch if chunked else 0, **single)
        parts = 0 if self.form == "rows" else scores.parts_of(entries)
        self.parts = torch.empty(3 * self.plan.inner * parts, **single)
        self.parts_3mP: Tensor | None = None
        # In float16 the gradient's factor is kept apart, so the rows for the weight's gradient are gathered with it.
        self.fold = self.dtype != torch.float16
        again = not self.fold and bool(self.needs & NEEDS_WEIGHT)
        self.rows_mD = torch.empty(m if self.gathered or again else 0, width, dtype=self.dtype, device=device)
        self.d_scores_mK = torch.empty(m if self.needs else 0, entries, dtype=self.dtype, device=device)
        self.factor_m = None if self.fold or not self.needs else torch.empty(m, **single)
        wants_rows = bool(self.needs & (NEEDS_HIDDEN | NEEDS_UNCOND))
        self.direct = wants_rows and not self.gathered and self.fold
        self.d_rows_mD = torch.empty(m if wants_rows and not self.direct else 0, width, **single)
        fresh = torch.zeros_like if self.index is not None else torch.empty_like
        self.d_hidden = fresh(like) if self.needs & NEEDS_HIDDEN else like.new_empty(0)
        wants_uncond = bool(self.needs & NEEDS_UNCOND)
        self.d_uncond = (fresh if guided else torch.zeros_like)(like) if wants_uncond else like.new_empty(0)
        weight = bool(self.needs & NEEDS_WEIGHT)
        self.d_weight = torch.zeros(entries if weight else 0, width, **single) if weight else torch.empty(0, **single)
        self.d_bias = torch.zeros(BIAS_SLICES, entries if self.needs & NEEDS_BIAS else 0, **single)

    def _rows(self, start: int, stop: int) -> Tensor:
        if not self.gathered:
            return self.hidden_MD[start:stop]
        out = self.rows_mD[: stop - start]
        rows.gather(self.hidden_MD, self.uncond_MD, self.index, self.count, out, start, self.scale)
        return out

    def run(self, visit: Epilogue) -> None:
        """Form the scores of all rows piece by piece, `visit` each, and send its gradient back where one is needed."""
        plan = self.plan
        for start in range(0, self.total, plan.rows):
            stop = min(start + plan.rows, self.total)
            rows_mD = self._rows(start, stop)
            for first in range(start, stop, plan.inner):
                piece = slice(first - start, min(first + plan.inner, stop) - start)
                d_scores_mK = self.d_scores_mK[piece] if self.needs else None
                factor_m = None if self.factor_m is None else self.factor_m[piece]
                look = partial(self._look, visit, rows_mD[piece], d_scores_mK, factor_m, first)
                if self.form is None:
                    self.form = measured.faster(self._key(), look, self.d_scores_mK[piece])
                look(self.form)
            if self.needs:
                self._back(rows_mD, start, stop)

    def _look(
        self,
        visit: Epilogue,
        rows_mD: Tensor,
        d_scores_mK: Tensor | None,
        factor_m: Tensor | None,
        start: int,
        form: str,
    ) -> None:
        visit(self._scores(form, rows_mD, start), d_scores_mK, factor_m, start)

    def _scores(self, form: str, rows_mD: Tensor, start: int) -> Tensor:
        """The scores of some rows, formed by the library's product, or by the one that leaves parts of statistics."""
        m, entries = len(rows_mD), len(self.weight_KD)
        if form == "rows":
            self.parts_3mP = None
            scores_mK = self.buffer[: m * entries].view(m, entries)
            multiply(rows_mD, self.weight_KD.T, scores_mK, self.count, start)
        else:
            self.parts_3mP = self.parts[: 3 * m * scores.parts_of(entries)].view(3, m, -1)
            scores_mK = self.buffer[: m * self.pitch].view(m, self.pitch)[:, :entries]
            operands = rows_mD, self.weight_KD, self.bias_K, self.count, scores_mK, self.parts_3mP
            scores.fill(*operands, start, self.temperature)
        return scores_mK

    def _back(self, rows_mD: Tensor, start: int, stop: int) -> None:
        m = stop - start
        d_scores_mK = self.d_scores_mK[:m]
        factor_m = None if self.factor_m is None else self.factor_m[:m]
        if self.needs & NEEDS_BIAS:
            rows.add_column_sums(d_scores_mK, self.d_bias, self.count, start, factor_m)
        if self.direct:
            torch.mm(d_scores_mK, self.weight_KD, out=self.d_hidden[start:stop])
        elif self.needs & (NEEDS_HIDDEN | NEEDS_UNCOND):
            d_rows_mD = self.d_rows_mD[:m]
            multiply(d_scores_mK, self.weight_KD, d_rows_mD, self.count, start)
            d_hidden = self.d_hidden if self.needs & NEEDS_HIDDEN else None
            guided = self.uncond_MD is not None
            d_uncond = self.d_uncond if guided and self.needs & NEEDS_UNCOND else None
            up = 1.0 + self.scale if guided else 1.0
            rows.scatter(d_rows_mD, self.index, self.count, d_hidden, d_uncond, start, up, -self.scale, factor_m)
        if self.needs & NEEDS_WEIGHT:
            if factor_m is not None:
                rows_mD = self.rows_mD[:m]
                rows.gather(
                    self.hidden_MD, self.uncond_MD, self.index, self.count, rows_mD, start, self.scale, factor_m
                )
            multiply(d_scores_mK.T, rows_mD, self.d_weight, self.count, start, counts_k=True, add=start > 0)

    def logprob(
        self, target_M: Tensor, logp_M: Tensor, lse_M: Tensor | None = None, entropy_M: Tensor | None = None
    ) -> None:
        """Log-probs, log-sum-exps and entropies of the tokens that take part, by the engine of the plan."""
        if self.plan.engine == "fused":
            for start in range(0, self.total, self.plan.rows):
                rows_mD = self._rows(start, min(start + self.plan.rows, self.total))
                where = self.index, self.count, logp_M, lse_M, entropy_M, start, self.temperature
                head.logprob(rows_mD, self.weight_KD, self.bias_K, target_M, *where)
            return

        def visit(scores_mK: Tensor, _d: Tensor | None, _f: Tensor | None, start: int) -> None:
            where = self.index, self.count, logp_M, lse_M, entropy_M, start, self.temperature
            epilogue.logprob(scores_mK, self.bias_K, target_M, *where)

        self.run(visit)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(d_hidden, d_hidden_uncond, d_weight, d_bias) in the inputs' shapes and dtypes; empty where not needed."""
        return (
            self.d_hidden.view(self.shape) if self.needs & NEEDS_HIDDEN else self.d_hidden,
            self.d_uncond.view(self.shape) if self.needs & NEEDS_UNCOND else self.d_uncond,
            self.d_weight.to(self.weight_dtype),
            self.d_bias.sum(0).to(self.bias_dtype),
        )


def multiply(
    a: Tensor, b: Tensor, out: Tensor, count: Tensor | None, start: int, *, counts_k: bool = False, add: bool = False
) -> None:
    """out (+)= a·b, out float32: by tiles that read the count where there is one, else by the library of the device."""
    if count is not None:
        atomic = not (settings.deterministic or torch.are_deterministic_algorithms_enabled())
        head.product(a, b, out, count, start, counts_k=counts_k, add=counts_k, atomic=atomic)
    elif a.dtype == torch.float32:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif not a.is_cuda:  # the interpreter's tests, and meta tensors
        out.copy_(torch.addmm(out, a.float(), b.float(), beta=float(add)))
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def selected_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    hidden_uncond: Tensor | None,
    guidance_scale: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """(logp, log-sum-exp), as `reference.selected_logprob`."""
    head_ = Head(hidden, weight, bias, hidden_uncond, guidance_scale, temperature)
    logp = torch.empty(target.shape, dtype=torch.float32, device=hidden.device)
    lse = torch.empty_like(logp)
    head_.logprob(target.reshape(-1).contiguous(), logp, lse)
    return logp, lse


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
    """Gradients of Σ grad·logp, as `reference.selected_logprob_backward`."""
    head_ = Head(hidden, weight, bias, hidden_uncond, guidance_scale, temperature, needs)
    target_M, lse_M, grad_M = (x.reshape(-1).contiguous() for x in (target, lse, grad))

    def visit(scores_mK: Tensor, d_scores_mK: Tensor | None, factor_m: Tensor | None, start: int) -> None:
        assert d_scores_mK is not None
        tensors = scores_mK, head_.bias_K, target_M, head_.index, head_.count, lse_M, grad_M, d_scores_mK, factor_m
        epilogue.gradient(*tensors, start, temperature)

    if needs:
        head_.run(visit)
    return head_.gradients()


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
    """(loss, logp, five statistics, and the four gradients of the loss), as `reference.maskgit_grpo_loss`."""
    shape, device = target.shape, hidden.device
    mask = dense(mask, shape)
    mask_M = None if mask is None else mask.view(-1)
    head_ = Head(hidden, weight, bias, hidden_uncond, guidance_scale, temperature, needs, mask_M, joins=True)
    logp = (torch.empty if mask is None else torch.zeros)(shape, dtype=torch.float32, device=device)
    spread = torch.empty(shape, dtype=torch.float32, device=device) if entropy else None
    alpha = alpha.reshape(()) if alpha.numel() == 1 else alpha.expand(shape).contiguous()
    old, ref = old_logp.contiguous(), None if ref_logp is None else ref_logp.contiguous()
    target_M, advantages = target.reshape(-1).contiguous(), advantages.contiguous()

    def visit(scores_mK: Tensor, d_scores_mK: Tensor | None, factor_m: Tensor | None, start: int) -> None:
        assert d_scores_mK is not None
        tensors = scores_mK, head_.bias_K, target_M, head_.index, head_.count, old, ref, advantages, alpha
        where = logp, spread, d_scores_mK, factor_m, start
        epilogue.loss(*tensors, *where, temperature, clip_low, clip_high, beta, head_.parts_3mP)

    if needs:
        head_.run(visit)
    else:
        head_.logprob(target_M, logp, None, spread)
    loss, statistics, _ = grpo(
        logp,
        old,
        ref,
        advantages,
        alpha,
        mask,
        clip_low,
        clip_high,
        beta,
        entropy=spread,
        numbers=5,
        gradient=False,
    )
    return loss, logp, statistics, *head_.gradients()


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
    """(loss, four statistics, d loss / d logp), as `reference.grpo_loss`."""
    loss, statistics, d_logp = grpo(
        logp.detach(), old_logp, ref_logp, advantages, alpha, mask, clip_low, clip_high, beta, gradient=gradient
    )
    if d_logp is None:
        return loss, statistics, logp.new_empty(0)
    if d_logp.stride() != logp.stride():
        d_logp = torch.empty_like(logp).copy_(d_logp)
    return loss, statistics, d_logp
