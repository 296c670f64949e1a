"""The sides of every comparison: this library by backend, its alternatives, and the matrix products alone as the floor.

A peer offers, for some operations, a function from inputs to a call. The call returns the differentiable result on the
same tensors every other side gets, in the same precision; what a peer wants otherwise (a spare row, a flat shape) is
prepared before the clock starts and said in its description. Each adapter is held against float64 before it is timed
(`check.py`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import pyunictokens as uct
from pyunictokens.ops import registry as _dispatch
from pyunictokens.ops.rotary import qk_norm_rotary
from pyunictokens.utils.errors import UserError

from . import plain
from .cases import ALPHA, BETA, CLIP, QK, Case, Inputs

Call = Callable[[], Tensor | tuple[Tensor, ...]]
Build = Callable[[Inputs], Call]


@dataclass(frozen=True)
class Peer:
    """One side. `missing` says why it cannot run a case on a device; an empty string means it can."""

    name: str
    title: str
    what: str
    builds: dict[str, Build] = field(default_factory=dict)
    module: str = ""
    gpu_only: bool = False
    exact: bool = True
    """False: a floor, whose result means nothing."""
    with_bias: bool = True
    """Whether its adapter gives it the bias of a head."""

    def missing(self, case: Case, device: str, dtype: torch.dtype) -> str:
        if case.operation not in self.builds:
            return "offers no such operation"
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"not installed ({self.module})"
        if case.bias and not self.with_bias:
            return "its adapter takes no bias"
        if self.gpu_only and device == "cpu":
            return "GPU only"
        if self.name.startswith("ours-"):
            try:
                _dispatch.choose(case.operation, self.name.removeprefix("ours-"), torch.device(device), dtype)
            except UserError as error:
                return str(error).partition("; use backend")[0]
        return ""


def _upstream(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return inputs.hidden, inputs.weight, inputs.target, inputs.advantages


def _guided(inputs: Inputs) -> Tensor:
    return plain.guided(inputs.hidden, inputs.get("hidden_uncond"), inputs.case.guidance)


def _rows(tensor: Tensor) -> Tensor:
    """[R, T, N, …] as [R, L, …]."""
    return tensor.flatten(1, 2)


# --- this library ----------------------------------------------------------------------------------------------------


def _ours(backend: str | None) -> dict[str, Build]:
    def logprob(i: Inputs) -> Call:
        return lambda: uct.ops.selected_logprob(i.hidden, i.weight, i.target, i.get("bias"), backend=backend)

    def loss(i: Inputs) -> Call:
        return lambda: uct.ops.grpo_loss(
            i.logp,
            i.old_logp,
            i.ref_logp,
            i.advantages,
            alpha=ALPHA,
            clip_low=CLIP,
            clip_high=CLIP,
            beta=BETA,
            backend=backend,
        )[0]

    def both(i: Inputs) -> Call:
        return lambda: uct.ops.maskgit_grpo_loss(
            i.hidden,
            i.weight,
            i.target,
            i.old_logp,
            i.ref_logp,
            i.advantages,
            i.get("bias"),
            hidden_uncond=i.get("hidden_uncond"),
            guidance_scale=i.case.guidance,
            alpha=ALPHA,
            clip_low=CLIP,
            clip_high=CLIP,
            beta=BETA,
            mask=i.get("mask"),
            with_entropy=False,
            backend=backend,
        )[0]

    def step(i: Inputs) -> Call:
        temperature = torch.full_like(i.mask_len, plain.STEP_TEMPERATURE, dtype=torch.float32)
        number = torch.full_like(i.mask_len, 3)
        return lambda: tuple(
            uct.ops.maskgit_step(
                i.logits,
                i.codes,
                mask_len=i.mask_len,
                temperature=temperature,
                seed=1,
                sample_ids=i.sample_ids,
                step=number,
                backend=backend,
            )
        )

    def rotary(i: Inputs) -> Call:
        tensors = [i.tensors[name] for name in ("q", "k", "cos", "sin", *QK[2:])]
        q, k, cos, sin, q_weight, q_bias, k_weight, k_bias = tensors
        return lambda: qk_norm_rotary(q, k, cos, sin, q_weight, q_bias, k_weight, k_bias, plain.QK_EPS, backend=backend)

    return {
        "selected_logprob": logprob,
        "grpo_loss": loss,
        "maskgit_grpo_loss": both,
        "maskgit_step": step,
        "qk_norm_rotary": rotary,
    }


# --- plain PyTorch, eager and compiled -------------------------------------------------------------------------------


def _eager(wrap: Callable[[Callable[..., object]], Callable[..., object]]) -> dict[str, Build]:
    def logprob(i: Inputs) -> Call:
        function = wrap(plain.selected_logprob)
        return lambda: function(i.hidden, i.weight, i.target, i.get("bias"))  # type: ignore[return-value]

    def loss(i: Inputs) -> Call:
        function = wrap(plain.grpo_loss)
        return lambda: function(i.logp, i.old_logp, i.ref_logp, i.advantages)  # type: ignore[return-value]

    def both(i: Inputs) -> Call:
        function = wrap(plain.maskgit_grpo_loss)
        hidden, weight, target, advantages = _upstream(i)
        rest = i.get("hidden_uncond"), i.case.guidance, i.get("mask"), i.get("bias")
        return lambda: function(hidden, weight, target, i.old_logp, i.ref_logp, advantages, *rest)  # type: ignore[return-value]

    def step(i: Inputs) -> Call:
        function = wrap(plain.maskgit_step)
        return lambda: function(i.logits, i.codes, i.mask_len)  # type: ignore[return-value]

    def rotary(i: Inputs) -> Call:
        function = wrap(plain.qk_norm_rotary)
        tensors = [i.tensors[name] for name in ("q", "k", "cos", "sin", *QK[2:])]
        return lambda: function(*tensors)  # type: ignore[return-value]

    return {
        "selected_logprob": logprob,
        "grpo_loss": loss,
        "maskgit_grpo_loss": both,
        "maskgit_step": step,
        "qk_norm_rotary": rotary,
    }


def _compiled(function: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(function, dynamic=False)


# --- other libraries -------------------------------------------------------------------------------------------------


def _with_plain_loss(logprob: Callable[[Tensor, Tensor, Tensor], Tensor]) -> dict[str, Build]:
    """A library's log-prob path alone, and with the plain loss behind it."""

    def alone(i: Inputs) -> Call:
        return lambda: logprob(i.hidden, i.weight, i.target)

    def both(i: Inputs) -> Call:
        return lambda: plain.grpo_loss(
            logprob(_guided(i), i.weight, i.target), i.old_logp, i.ref_logp, i.advantages, i.get("mask")
        )

    return {"selected_logprob": alone, "maskgit_grpo_loss": both}


def _trl(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    logits = torch.nn.functional.linear(_rows(hidden), weight)
    return selective_log_softmax(logits, _rows(target)).view_as(target)


def _cce(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, target, reduction="none").to(torch.float32)


def _liger_linear_logprob(i: Inputs) -> Call:
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return lambda: LigerFusedLinearPPOBase.chunk_forward(_rows(i.hidden), i.weight, _rows(i.target)).view_as(i.target)


def _liger_linear_loss(i: Inputs) -> Call:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    head = LigerFusedLinearGRPOLoss(
        beta=BETA, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="dr_grpo", max_completion_length=1, use_ref_model=True
    )
    mask = i.get("mask")
    counts = torch.ones_like(_rows(i.old_logp)) if mask is None else _rows(mask).to(torch.float32)
    target, old, ref = _rows(i.target), _rows(i.old_logp), _rows(i.ref_logp)

    def call() -> Tensor:
        hidden = _rows(_guided(i))
        loss = head(hidden, i.weight, target, counts, i.advantages, ref_per_token_logps=ref, old_per_token_logps=old)
        return ALPHA * loss[0]

    return call


def _liger_triton_loss(i: Inputs) -> Call:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    mask = i.get("mask")
    counts = None if mask is None else _rows(mask).to(torch.int32).contiguous()
    target, old, ref = (_rows(x).contiguous() for x in (i.target, i.old_logp, i.ref_logp))
    rows, _, width = _rows(i.hidden).shape
    spare = i.hidden.new_zeros(rows, 1, width)

    def call() -> Tensor:
        hidden = torch.cat([_rows(_guided(i)), spare], dim=1)
        loss = triton_grpo_loss(
            torch.nn.functional.linear(hidden, i.weight),
            old,
            ref,
            target,
            i.advantages,
            counts,
            temperature=1.0,
            beta=BETA,
            eps_low=CLIP,
            eps_high=CLIP,
            loss_type="dr_grpo",
            max_completion_length=1,
            reduce=True,
        )
        return ALPHA * loss[0]

    return call


# --- the floor -------------------------------------------------------------------------------------------------------

FLOOR_CHUNK_BYTES = 1 << 28


class _Products(torch.autograd.Function):
    """The products of a head over the tokens that count, in chunks of rows; the logits stand in for their gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, mask: Tensor | None, wanted: bool) -> Tensor:
        flat = hidden.flatten(0, -2) if mask is None else hidden[mask]
        size = max(1, FLOOR_CHUNK_BYTES // (len(weight) * hidden.element_size()))
        d_hidden, d_weight = torch.empty_like(flat) if wanted else None, torch.zeros_like(weight) if wanted else None
        buffer = flat.new_empty(min(size, len(flat)), len(weight))
        for start in range(0, len(flat), size):
            rows = flat[start : start + size]
            logits = torch.mm(rows, weight.T, out=buffer[: len(rows)])
            if d_hidden is not None and d_weight is not None:
                torch.mm(logits, weight, out=d_hidden[start : start + size])
                d_weight.addmm_(logits.T, rows)
        ctx.shape = hidden.shape
        ctx.save_for_backward(d_hidden, d_weight, mask)
        return buffer[0, 0].float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, mask = ctx.saved_tensors
        if mask is not None:
            full = d_hidden.new_zeros(ctx.shape)
            full[mask] = d_hidden
            d_hidden = full
        return d_hidden.view(ctx.shape), d_weight, None, None


def _products(i: Inputs) -> Call:
    hidden, mask = i.hidden, i.get("mask")
    return lambda: _Products.apply(hidden, i.weight, mask, torch.is_grad_enabled())


def peers() -> list[Peer]:
    """All sides, ours first; the order of the tables."""
    backends = {
        "reference": "the definition in plain torch, chunked",
        "cpu": "compiled core, vectorised",
        "triton": "Triton kernels and cuBLAS",
        "cuda": "CUDA core",
    }
    liger = "liger_kernel"
    compiled = "torch.compile of the plain PyTorch side, static shapes"
    return [
        *(Peer(f"ours-{name}", f"ours: {name}", what, _ours(name)) for name, what in backends.items()),
        Peer("eager", "plain PyTorch", "head, log-softmax in float32, gather, loss", _eager(lambda f: f)),
        Peer("compile", "torch.compile", compiled, _eager(_compiled)),
        Peer(
            "liger-linear",
            "Liger fused-linear GRPO",
            "LigerFusedLinearGRPOLoss, dr_grpo; for log-probs its chunked log-prob function",
            {"selected_logprob": _liger_linear_logprob, "maskgit_grpo_loss": _liger_linear_loss},
            module=liger,
            with_bias=False,
        ),
        Peer(
            "liger-triton",
            "Liger Triton GRPO",
            "a torch product, then triton_grpo_loss on logits with the spare row it wants, dr_grpo",
            {"maskgit_grpo_loss": _liger_triton_loss},
            module=liger,
            gpu_only=True,
            with_bias=False,
        ),
        Peer(
            "trl",
            "TRL",
            "a torch product, selective_log_softmax; the plain loss behind it",
            _with_plain_loss(_trl),
            "trl",
            with_bias=False,
        ),
        Peer(
            "cce",
            "cut-cross-entropy",
            "linear_cross_entropy with its default gradient filter; the plain loss behind it",
            _with_plain_loss(_cce),
            module="cut_cross_entropy",
            gpu_only=True,
            with_bias=False,
        ),
        Peer(
            "products",
            "matrix products alone",
            "the one (forward) or three products of the head and nothing else: the floor",
            {"selected_logprob": _products, "maskgit_grpo_loss": _products},
            exact=False,
        ),
    ]


def by_name(name: str) -> Peer:
    """The peer called `name`.

    Raises:
        UserError: there is none.
    """
    for peer in peers():
        if peer.name == name:
            return peer
    raise UserError(f"peer {name!r}: must be one of {', '.join(peer.name for peer in peers())}")
