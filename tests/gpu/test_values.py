"""Every backend against float64: values, gradients, statistics, in every dtype, at odd shapes.

float32 must lie within 1e-5 relative. For bfloat16 and float16 the allowance is what one rounding of the inputs does to
the truth itself (twice that), plus one rounding of the result: nothing that rounding does not explain passes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pyunictokens as uct
from pyunictokens.ops import philox
from tests.ops import naive

from . import support
from .support import EPSILON, VARIANTS, Head

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _near(found: Tensor, wanted: Tensor, shaken: Tensor, dtype: torch.dtype, what: str) -> None:
    """`shaken` is the truth of inputs that are off by one rounding."""
    found, wanted, shaken = (x.detach().cpu().double() for x in (found, wanted, shaken))
    assert found.isfinite().all(), f"{what}: not finite"
    if dtype == torch.float32:
        allowed = 1e-5 * wanted.norm()
    else:
        allowed = 2 * (shaken - wanted).norm() + EPSILON[dtype] * wanted.norm()
    distance = (found - wanted).norm()
    assert distance <= allowed + 1e-12, f"{what}: {distance:.2e} from float64, allowed {allowed:.2e}"


def _compare(
    h: Head, dtype: torch.dtype, result: Tensor, truth: Callable[[Head], Tensor], result_is_sum: bool = False
) -> None:
    exact, off = h.double(), h.double(noise=EPSILON[dtype] / 2)
    wanted, shaken = truth(exact), truth(off)
    if result_is_sum:  # terms cancel in a sum, so it is held to the size of its parts
        scale = truth_parts(exact)
        allowed = (1e-5 if dtype == torch.float32 else 4 * EPSILON[dtype]) * scale + 2 * (shaken - wanted).abs().item()
        assert abs(result.item() - wanted.item()) <= allowed, (result.item(), wanted.item(), allowed)
    else:
        _near(result, wanted, shaken, dtype, "value")
    found, right, rough = (
        support.gradients(value, each) for value, each in ((result, h), (wanted, exact), (shaken, off))
    )
    names = [name for name in ("hidden", "weight", "bias", "uncond") if h.get(name) is not None]
    for name, mine, theirs, other in zip(names, found, right, rough, strict=True):
        assert mine.dtype == dtype
        _near(mine, theirs, other, dtype, f"gradient of {name}")


def truth_parts(exact: Head) -> float:
    """Sum of the absolute terms of the loss."""
    logp = support.truth_logprob(exact).detach()
    keep = exact.get("mask")
    total = 0.0
    for row in range(len(logp)):
        alone = torch.zeros_like(logp, dtype=torch.bool)
        alone[row] = True if keep is None else keep[row]
        terms = {**exact.tensors, "mask": alone}
        total += abs(support.truth_loss(logp, Head(terms)).item())
    return max(total, 1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["plain", "bias", "guided"])
def test_selected_logprob(device: str, backend: str, dtype: torch.dtype, variant: str) -> None:
    support.need("selected_logprob", backend, device, dtype)
    h = support.head(device, dtype, **VARIANTS[variant])
    result = support.logprob(h, backend)
    assert result.dtype == torch.float32
    _compare(h, dtype, result, support.truth_logprob)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_maskgit_grpo_loss(device: str, backend: str, dtype: torch.dtype, variant: str) -> None:
    support.need("maskgit_grpo_loss", backend, device, dtype)
    h = support.head(device, dtype, **VARIANTS[variant])
    loss, logp, stats = support.fused(h, backend)
    _compare(h, dtype, loss, support.truth_fused, result_is_sum=True)
    exact = h.double()
    wanted = support.truth_logprob(exact).detach()
    keep = torch.ones_like(wanted, dtype=torch.bool) if h.get("mask") is None else h["mask"].cpu()
    assert (logp.cpu()[~keep] == 0).all()
    shaken = support.truth_logprob(h.double(noise=EPSILON[dtype] / 2))
    _near(logp.cpu()[keep], wanted[keep], shaken[keep], dtype, "logp")
    if dtype == torch.float32:
        constants = support.ALPHA, support.CLIP_LOW, support.CLIP_HIGH, support.BETA
        _, right = naive.loss(wanted, exact["old"], exact["ref"], exact["advantages"], *constants, exact.get("mask"))
        for name, value in right.items():
            assert getattr(stats, name).item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
        scores = naive.logits(
            exact["hidden"], exact["weight"], exact.get("bias"), exact.get("uncond"), h.guidance, h.temperature
        )
        entropy = torch.distributions.Categorical(logits=scores.detach()[keep]).entropy().mean().item()
        assert stats.entropy.item() == pytest.approx(entropy, rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["plain", "masked"])
def test_grpo_loss(device: str, backend: str, dtype: torch.dtype, variant: str) -> None:
    support.need("grpo_loss", backend, device, dtype)
    h = support.head(device, torch.float32, **VARIANTS[variant])
    logp = (h["old"] + 0.15 * h["upstream"]).to(dtype).requires_grad_()
    for name in ("old", "ref"):
        h.tensors[name] = h[name].to(dtype)
    loss = support.tokens_loss(logp, h, backend)
    (found,) = torch.autograd.grad(loss, logp)
    exact, twin = h.double(), logp.detach().cpu().double().requires_grad_()
    wanted = support.truth_loss(twin, exact)
    (right,) = torch.autograd.grad(wanted, twin)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-5)
    _near(found, right, right, dtype, "gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maskgit_step(device: str, backend: str, dtype: torch.dtype) -> None:
    support.need("maskgit_step", backend, device, dtype)
    s = support.step(device, dtype)
    found = s(backend)
    a = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in s.arguments.items()}
    batch, positions, entries = s.logits.shape
    exact = torch.log_softmax(s.logits.cpu().double(), -1)
    at = torch.arange(positions).repeat(batch)
    rows = [a[name].repeat_interleave(positions) for name in ("sample_ids", "step")]
    noise = philox.gumbel(a["seed"], *rows, at, entries, philox.STREAM_TOKEN).view(batch, positions, entries)
    scores, unknown, chosen = exact + noise.double(), a["codes"] < 0, found.chosen.cpu()
    mine = scores.gather(-1, chosen[..., None])[..., 0]
    assert (scores.amax(-1) - mine)[unknown].max() < 1e-5, "chose an entry that is not the best, nor as good"
    assert torch.equal(chosen[~unknown], a["codes"][~unknown])
    right = exact.gather(-1, chosen[..., None])[..., 0]
    assert naive.relative(found.logp.cpu(), right) < 1e-5
    rank = philox.gumbel(a["seed"], *rows, at, 1, philox.STREAM_RANK).view(batch, positions).double()
    confidence = torch.where(unknown, right + a["temperature"].double()[:, None] * rank, torch.inf)
    masked, wanted = found.masked.cpu(), torch.minimum(a["mask_len"], unknown.sum(-1))
    assert masked.sum(-1).tolist() == wanted.tolist() and not (masked & ~unknown).any()
    for row in range(batch):
        if 0 < wanted[row] < unknown[row].sum():
            highest, lowest = confidence[row][masked[row]].max(), confidence[row][~masked[row]].min()
            assert highest <= lowest + 1e-5, "a more confident code was put back"
    assert torch.equal(found.codes.cpu(), torch.where(masked, uct.MASK, chosen))


def test_every_backend_chooses_the_same(device: str) -> None:
    """Choices of all backends that run here: equal but where two scores are as good as equal."""
    s = support.step(device, torch.float32, seed=4)
    names = [n for n in ("cpu", "cuda") if n in _offered(device)]
    if not names:
        pytest.skip("the reference is the only backend of maskgit_step here")
    wanted = s("reference")
    for name in names:
        found = s(name)
        assert (found.chosen != wanted.chosen).sum() <= 1 and (found.masked != wanted.masked).sum() <= 2


def _offered(device: str) -> list[str]:
    from pyunictokens.ops import registry as _dispatch
    from pyunictokens.utils.errors import UserError

    found = []
    for name in ("cpu", "triton", "cuda"):
        try:
            found.append(_dispatch.choose("maskgit_step", name, torch.device(device), torch.float32))
        except UserError:
            continue
    return found
