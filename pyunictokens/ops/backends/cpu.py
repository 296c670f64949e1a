"""The `cpu` backend: hands tensors to the compiled core (`pyunictokens._core`, csrc/) as addresses and sizes.

This is the last place that sees a tensor: everything that crosses has been checked by the public functions for shape,
dtype, device and range, and is made contiguous here. Without the compiled core the backend is marked unavailable, with
the reason.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TypedDict, cast

import torch
from torch import Tensor

from ..registry import Entry, mark_unavailable, offer

_core: ModuleType | None = None
try:
    _core = importlib.import_module("pyunictokens._core")
except ImportError as error:
    mark_unavailable("cpu", f"the compiled core cannot be imported ({error}); build it: pip install -e .")

level = ""
"""Instruction set to use (one of `_core.cpu_levels()`); empty: the best of this machine. Tests set it."""

_TYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NARROW = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the core reads as they are; float64 stays with the reference."""


def core() -> ModuleType | None:
    """The compiled core, or None where it cannot be imported."""
    return _core


class CudaInfo(TypedDict):
    """The CUDA part of the core."""

    device_count: int
    error: str


class BuildInfo(TypedDict):
    """What is asked of the core's own description."""

    cuda: CudaInfo | None


def build_info() -> BuildInfo | None:
    """What the compiled core contains and finds (compiler, CPU level, CUDA part); None without a core."""
    return None if _core is None else cast(BuildInfo, dict(_core.build_info()))


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
    """(codes, chosen, logp, masked) from the fused row kernel, which reads the logits in their own dtype."""
    assert _core is not None
    mask_len, sample_ids, step = mask_len.contiguous(), sample_ids.contiguous(), step.contiguous()
    per_sample = (mask_len, temperature.float().contiguous(), sample_ids, step)
    call = _StepCall(logits, codes, per_sample, seed, token_gumbel, rank_gumbel, stream)
    _core.maskgit_step(call.fields, torch.get_num_threads(), level)
    return call.results


class _StepCall:
    """The fields of csrc/include/maskgit_step.h and the tensors behind them, which live as long as this object."""

    def __init__(
        self,
        logits: Tensor,
        codes: Tensor,
        per_sample: tuple[Tensor, Tensor, Tensor, Tensor],
        seed: int,
        token_gumbel: Tensor | None,
        rank_gumbel: Tensor | None,
        stream: int,
    ):
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        codes = codes.contiguous()
        mask_len, temperature, sample_ids, step = per_sample
        token_gumbel = None if token_gumbel is None else token_gumbel.float().contiguous()
        rank_gumbel = None if rank_gumbel is None else rank_gumbel.float().contiguous()
        out_codes, chosen = torch.empty_like(codes), torch.empty_like(codes)
        logp, masked = torch.empty_like(codes, dtype=torch.float32), torch.empty_like(codes, dtype=torch.bool)
        self.results = (out_codes, chosen, logp, masked)
        self.inputs = (logits, codes, *per_sample, token_gumbel, rank_gumbel)
        self.strides = tuple(x.stride(0) if len(x) > 1 else 0 for x in per_sample)
        self.fields = (
            logits.data_ptr(),
            _TYPE[logits.dtype],
            *logits.shape,
            logits.stride(0),
            logits.stride(1),
            codes.data_ptr(),
            mask_len.data_ptr(),
            temperature.data_ptr(),
            seed,
            sample_ids.data_ptr(),
            step.data_ptr(),
            stream,
            0 if token_gumbel is None else token_gumbel.data_ptr(),
            0 if rank_gumbel is None else rank_gumbel.data_ptr(),
            out_codes.data_ptr(),
            chosen.data_ptr(),
            logp.data_ptr(),
            masked.data_ptr(),
        )


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
    """(loss, the four statistics, d loss/d logp) in one pass; inputs of 16 bits are widened tile by tile. Without
    `gradient` none is formed, and it is empty."""
    tokens_per_rollout = max(logp.numel() // logp.shape[0], 1)
    if mask is not None:
        mask = mask.expand(logp.shape)
    alpha = alpha.expand(logp.shape) if alpha.numel() > 1 else alpha
    out, d_logp = loss_over_tokens(
        logp,
        old_logp,
        ref_logp,
        advantages,
        tokens_per_rollout,
        alpha,
        mask,
        logp.shape[0],
        clip_low,
        clip_high,
        beta,
        gradient,
    )
    return out[0].clone(), out[1:].clone(), d_logp.to(logp.dtype)


def loss_over_tokens(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    advantages: Tensor,
    tokens_per_advantage: int,
    alpha: Tensor,
    mask: Tensor | None,
    rollouts: int,
    clip_low: float,
    clip_high: float,
    beta: float,
    gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """The call behind `grpo_loss`: (loss and statistics as one vector, d loss/d logp in float32, shaped like logp, or
    empty where no `gradient` is wanted).

    Token j, counted over all dimensions, has advantage j // tokens_per_advantage. alpha: one number or one a token.
    """
    assert _core is not None
    logp, old_logp, ref_logp = _readable(logp), _readable(old_logp), None if ref_logp is None else _readable(ref_logp)
    advantages, alpha = advantages.float().contiguous(), alpha.float().contiguous()
    mask = None if mask is None else mask.contiguous()
    out, d_logp = torch.empty(5), torch.empty(logp.shape if gradient else 0)
    _core.grpo_loss(
        logp.data_ptr(),
        _TYPE[logp.dtype],
        old_logp.data_ptr(),
        _TYPE[old_logp.dtype],
        0 if ref_logp is None else ref_logp.data_ptr(),
        0 if ref_logp is None else _TYPE[ref_logp.dtype],
        logp.numel(),
        tokens_per_advantage,
        advantages.data_ptr(),
        alpha.data_ptr(),
        int(alpha.numel() > 1),
        0 if mask is None else mask.data_ptr(),
        rollouts,
        clip_low,
        clip_high,
        beta,
        d_logp.data_ptr() if gradient else 0,
        out.data_ptr(),
        torch.get_num_threads(),
        level,
    )
    out[3] = torch.where(out[4].isnan(), out[4], out[3])  # the largest ratio leaves NaN out, the mean does not
    return out, d_logp


class _NormRotary:
    """One tensor of csrc/include/norm_rotary.h, q or k, and the tensors behind its fields."""

    def __init__(self, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, bias: Tensor, eps: float):
        assert _core is not None
        x = x if x.stride(-1) == 1 else x.contiguous()
        cos, sin, weight, bias = (each.float().contiguous() for each in (cos, sin, weight, bias))
        rows, heads, length, width = x.shape
        own_angles = cos.dim() == 4 and cos.shape[0] > 1
        self.core, self.x, self.tensors = _core, x, (x, cos, sin, weight, bias)
        self.fields = (
            x.data_ptr(),
            x.stride()[:3],
            *(rows, heads, length, width, cos.shape[-1]),
            cos.data_ptr(),
            sin.data_ptr(),
            length * cos.shape[-1] if own_angles else 0,
            weight.data_ptr(),
            bias.data_ptr(),
            eps,
        )

    def forward(self) -> Tensor:
        out = torch.empty(self.x.shape)
        self.core.norm_rotary(self.fields, out.data_ptr(), out.stride()[:3], torch.get_num_threads(), level)
        return out

    def backward(self, grad: Tensor, d_x: Tensor, parameters: bool) -> tuple[Tensor, Tensor]:
        """Write the gradient of x; returns those of weight and bias, empty where they are not wanted."""
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        made = torch.empty(2, self.x.shape[-1] if parameters else 0)
        sums = torch.empty(self.core.norm_rotary_sums(self.fields) if parameters else 0)
        self.core.norm_rotary_backward(
            self.fields,
            *(grad.data_ptr(), grad.stride()[:3]),
            *(d_x.data_ptr(), d_x.stride()[:3]),
            made.data_ptr() if parameters else 0,
            sums.data_ptr(),
            torch.get_num_threads(),
            level,
        )
        return made[0].clone(), made[1].clone()  # an operation's results must not share memory


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
    return (
        _NormRotary(q, cos, sin, q_weight, q_bias, eps).forward(),
        _NormRotary(k, cos, sin, k_weight, k_bias, eps).forward(),
    )


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
) -> tuple[Tensor, ...]:
    """Gradients of q, k and the four parameters in their order; those of the parameters empty where not wanted."""
    made, of_parameters = [], []
    for grad, x, weight, bias in ((grad_q, q, q_weight, q_bias), (grad_k, k, k_weight, k_bias)):
        d_x = torch.empty_like(x)
        target = d_x if d_x.stride(-1) == 1 else torch.empty(x.shape)
        its = _NormRotary(x, cos, sin, weight, bias, eps).backward(grad, target, parameters)
        of_parameters += [each.to(like.dtype) for each, like in zip(its, (weight, bias), strict=True)]
        made.append(d_x if target is d_x else d_x.copy_(target))
    return *made, *of_parameters


def tanh_gelu(x: Tensor) -> tuple[Tensor]:
    """GELU of `tanh`, from one exponential."""
    return (_gelu(x, None),)


def tanh_gelu_backward(grad: Tensor, x: Tensor) -> tuple[Tensor]:
    """The gradient of x."""
    return (_gelu(x, grad.contiguous()),)


def _gelu(x: Tensor, grad: Tensor | None) -> Tensor:
    assert _core is not None
    x, out = x.contiguous(), torch.empty(x.shape)
    address = 0 if grad is None else grad.data_ptr()
    _core.gelu(x.data_ptr(), address, x.numel(), out.data_ptr(), torch.get_num_threads(), level)
    return out


def _readable(values: Tensor) -> Tensor:
    return (values if values.dtype in NARROW else values.float()).contiguous()


def head_padded(count: int) -> int:
    """`count` tokens or columns rounded up to whole panels, as csrc/include/head.h wants its workspaces."""
    assert _core is not None
    panel = int(_core.HEAD_PANEL)
    return -(-count // panel) * panel


def head_packed(tokens: int, width: int, block: int, weight_learns: bool) -> int:
    """Float32 numbers of the second workspace of a HeadChunk."""
    assert _core is not None
    return head_padded(width) * (min(block, int(_core.HEAD_BLOCK)) + head_padded(tokens) * (2 if weight_learns else 1))


class HeadChunk:
    """One chunk of tokens for csrc/include/head.h.

    guided_mD float32; head: weight_KD of any NARROW dtype and contiguous, bias_K float32 or None, temperature; target_m
    contiguous int64; workspace: entries of a block, buffers of block·padded(m) and `head_packed` float32 numbers.
    """

    def __init__(
        self,
        guided_mD: Tensor,
        head: tuple[Tensor, Tensor | None, float],
        target_m: Tensor,
        workspace: tuple[int, Tensor, Tensor],
    ):
        assert _core is not None
        guided_mD, (weight_KD, bias_K, temperature), (block, scores, packed) = guided_mD.contiguous(), head, workspace
        self.core, self.shape, self.tensors = _core, guided_mD.shape, (guided_mD, weight_KD, bias_K, target_m)
        self.fields = (
            guided_mD.data_ptr(),
            *guided_mD.shape,
            weight_KD.data_ptr(),
            _TYPE[weight_KD.dtype],
            len(weight_KD),
            0 if bias_K is None else bias_K.data_ptr(),
            1.0 / temperature,
            target_m.data_ptr(),
            block,
            scores.data_ptr(),
            packed.data_ptr(),
        )

    def logprob(self, lse_m: Tensor, logp_m: Tensor, entropy_m: Tensor | None) -> None:
        """Write log-sum-exp, log-probability of the target and entropy of every row. All float32 and contiguous."""
        pointers = [0 if x is None else x.data_ptr() for x in (lse_m, logp_m, entropy_m)]
        self.core.head_logprob(self.fields, *pointers, torch.get_num_threads(), level)

    def backward(self, lse_m: Tensor, slope_m: Tensor, held: bool, gradients: tuple[Tensor, Tensor, Tensor]) -> None:
        """Of Σ slope·logp: write the gradient of the hidden states, add to those of weight and bias; not to empty ones.

        held: the scores are still in the workspace, where `logprob` of a block of all entries left them.
        """
        pointers = [x.data_ptr() if x.numel() else 0 for x in gradients]
        self.core.head_backward(
            self.fields, lse_m.data_ptr(), slope_m.data_ptr(), held, *pointers, torch.get_num_threads(), level
        )


if _core is not None:
    offer("maskgit_step", "cpu", Entry(maskgit_step, devices=("cpu",), dtypes=NARROW))
    offer("grpo_loss", "cpu", Entry(grpo_loss, devices=("cpu",), dtypes=NARROW))
    offer("qk_norm_rotary", "cpu", Entry(qk_norm_rotary, qk_norm_rotary_backward, ("cpu",), (torch.float32,)))
    offer("tanh_gelu", "cpu", Entry(tanh_gelu, tanh_gelu_backward, ("cpu",), (torch.float32,)))
