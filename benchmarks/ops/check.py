"""Holds a side against float64 on a small shape before it is timed: one that computes something else is worthless.

A step draws random noise, and sides draw it differently: there the plain side is given the noise of this library, and
of ours the log-probs are compared, given the codes it chose.
"""

from __future__ import annotations

import torch
from torch import Tensor

import pyunictokens as uct

from . import plain
from .cases import QK, Case, Inputs, make, small
from .peers import Peer
from .schema import Check

LIMITS = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest ‖found − wanted‖ / ‖wanted‖ by dtype of the inputs, values and gradients, without guidance."""


def relative(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖; NaN counts as infinitely far."""
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    distance = ((found - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()
    return distance if distance == distance else float("inf")


def truth(inputs: Inputs) -> Tensor | tuple[Tensor, ...]:
    """The result in float64, from plain PyTorch."""
    i = inputs
    if i.case.operation == "selected_logprob":
        return plain.selected_logprob(i.hidden, i.weight, i.target, i.get("bias"))
    if i.case.operation == "qk_norm_rotary":
        return plain.qk_norm_rotary(*(i.tensors[name] for name in ("q", "k", "cos", "sin", *QK[2:])))
    if i.case.operation == "grpo_loss":
        return plain.grpo_loss(i.logp, i.old_logp, i.ref_logp, i.advantages)
    return plain.maskgit_grpo_loss(
        i.hidden,
        i.weight,
        i.target,
        i.old_logp,
        i.ref_logp,
        i.advantages,
        i.get("hidden_uncond"),
        i.case.guidance,
        i.get("mask"),
        i.get("bias"),
    )


def backward(inputs: Inputs, result: Tensor | tuple[Tensor, ...]) -> None:
    """The gradients of `result`, under the upstream gradient of the case where it is no scalar."""
    if isinstance(result, tuple):
        torch.autograd.backward(result, [inputs.upstream_q, inputs.upstream_k])
        return
    result.backward(inputs.upstream.to(result.dtype) if result.dim() else None)


def check(peer: Peer, case: Case, device: str, dtype: torch.dtype) -> Check:
    """How far `peer` is from float64 on a small case of the same kind.

    Raises:
        AssertionError: farther than LIMITS.
    """
    inputs = make(small(case), device, dtype, seed=7)
    result = peer.builds[case.operation](inputs)
    gradient = None
    if case.operation == "maskgit_step":
        value = _step(peer, inputs)
    else:
        exact = inputs.double()
        wanted = truth(exact)
        backward(exact, wanted)
        found = result()
        backward(inputs, found)
        value = max(map(relative, _each(found), _each(wanted)))
        pairs = zip(inputs.leaves, exact.leaves, strict=True)
        gradient = max(
            float("inf") if mine.grad is None else relative(mine.grad, theirs.grad)  # type: ignore[arg-type]
            for mine, theirs in pairs
        )
    worst = max(value, gradient or 0.0)
    allowed = LIMITS[dtype] * (1 + case.guidance / 2)  # a difference of two rounded states has more rounding in it
    if not worst <= allowed:
        raise AssertionError(f"wrong: {worst:.1e} from float64, allowed {allowed:.0e}")
    return Check(case.operation, peer.name, str(dtype).removeprefix("torch."), value, gradient)


def _each(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _step(peer: Peer, inputs: Inputs) -> float:
    exact = inputs.double()
    batch, positions, entries = inputs.logits.shape
    if peer.name in ("eager", "compile"):  # the plain sequence, fed with this library's noise, must choose alike
        generator = torch.Generator().manual_seed(3)
        noise = [
            -torch.log(-torch.log(torch.rand(shape, generator=generator, dtype=torch.float64)))
            for shape in ((batch, positions, entries), (batch, positions))
        ]
        given = iter(noise)
        found = plain.maskgit_step(exact.logits, exact.codes, exact.mask_len, lambda like: next(given))
        wanted = uct.ops.maskgit_step(
            exact.logits,
            exact.codes,
            mask_len=exact.mask_len,
            temperature=plain.STEP_TEMPERATURE,
            seed=1,
            sample_ids=exact.sample_ids,
            step=3,
            token_gumbel=noise[0],
            rank_gumbel=noise[1],
            backend="reference",
        )
        same = all(torch.equal(found[at], wanted[at]) for at in (0, 1, 3))
        return relative(found[2], wanted[2]) if same else float("inf")
    codes, chosen, logp, masked = peer.builds["maskgit_step"](inputs)()
    assert torch.equal(codes, torch.where(masked, uct.MASK, chosen))
    assert masked.sum(-1).tolist() == inputs.mask_len.tolist()
    reference = uct.ops.maskgit_step(
        inputs.logits,
        inputs.codes,
        mask_len=inputs.mask_len,
        temperature=plain.STEP_TEMPERATURE,
        seed=1,
        sample_ids=inputs.sample_ids,
        step=3,
        backend="reference",
    )
    alike = (chosen == reference.chosen).double().mean().item()
    assert alike > 0.95, f"wrong: {alike:.0%} of the codes are those of the reference"
    at = chosen.cpu()[..., None]
    return relative(logp, torch.log_softmax(exact.logits, -1).gather(-1, at)[..., 0])
