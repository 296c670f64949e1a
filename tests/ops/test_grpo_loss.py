"""grpo_loss against the equation in float64: values, gradients, statistics, masks, weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pyunictokens as uct
from pyunictokens.utils.errors import UserError

from . import naive


def _inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logp = -3 * torch.rand(shape, dtype=dtype)
    return (
        logp,
        logp + 0.3 * torch.randn(shape, dtype=dtype),
        logp + 0.3 * torch.randn(shape, dtype=dtype),
        torch.randn(shape[0], dtype=dtype),
    )


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1), (4,), (2, 3, 2, 5)])
@pytest.mark.parametrize("with_ref", [True, False])
@pytest.mark.parametrize("with_mask", [True, False])
def test_values_gradients_and_statistics(shape: tuple[int, ...], with_ref: bool, with_mask: bool) -> None:
    logp, old, ref, advantages = _inputs(shape)
    ref, beta = (ref, 0.04) if with_ref else (None, 0.0)
    mask = torch.rand(shape) > 0.4 if with_mask else None
    logp.requires_grad_()
    wanted, statistics = naive.loss(logp, old, ref, advantages, 0.6, 0.1, 0.25, beta, mask)
    (wanted_grad,) = torch.autograd.grad(wanted, logp)
    loss, stats = uct.ops.grpo_loss(
        logp, old, ref, advantages, alpha=0.6, clip_low=0.1, clip_high=0.25, beta=beta, mask=mask
    )
    (grad,) = torch.autograd.grad(loss, logp)
    assert torch.allclose(loss, wanted)
    assert torch.allclose(grad, wanted_grad)
    for key, value in statistics.items():
        assert torch.allclose(getattr(stats, key), value), key
        assert not getattr(stats, key).requires_grad
    assert stats.entropy is None


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 4099), (1, 1)])
def test_without_a_gradient_the_rest_is_the_same_and_none_is_formed(
    shape: tuple[int, ...], masked: bool, backend: str
) -> None:
    logp, old, ref, advantages = _inputs(shape, torch.float32)
    mask = torch.rand(shape) > 0.4 if masked else None
    leaf = logp.clone().requires_grad_()

    def both(of: Tensor) -> tuple[Tensor, Tensor]:
        loss, stats = uct.ops.grpo_loss(of, old, ref, advantages, alpha=0.6, beta=0.04, mask=mask, backend=backend)
        return loss, torch.stack([stats.clip_fraction, stats.kl, stats.ratio_max, stats.ratio_mean])

    wanted, statistics = both(leaf)
    assert wanted.requires_grad
    with torch.no_grad():
        quiet = both(leaf)
    for loss, stats in (quiet, both(logp)):
        assert torch.equal(loss, wanted) and torch.equal(stats, statistics) and not loss.requires_grad
    constants = old, ref, advantages, torch.tensor(0.6), mask, 0.2, 0.2, 0.04
    *rest, slopes = torch.ops.pyunictokens.grpo_loss(logp, *constants, False, backend)
    assert slopes.numel() == 0 and torch.equal(rest[0], wanted)
    loss, *_ = torch.ops.pyunictokens.grpo_loss(leaf, *constants, False, backend)
    with pytest.raises(UserError, match="gradient=False, so there is none"):
        loss.backward()


def test_golden_loss_and_gradient(showo_cases: dict[str, Tensor], showo_meta: dict) -> None:
    setting = showo_meta["grpo"]
    logp = showo_cases["grpo.logps"].clone().requires_grad_()
    loss, _ = uct.ops.grpo_loss(
        logp,
        showo_cases["grpo.old_logps"],
        showo_cases["grpo.ref_logps"],
        showo_cases["grpo.advantages"],
        alpha=setting["alpha_gen"],
        beta=setting["beta"],
        clip_low=setting["clip"],
        clip_high=setting["clip"],
    )
    assert loss.item() == pytest.approx(showo_cases["grpo.loss"].item(), rel=1e-5)


def test_gradcheck() -> None:
    logp, old, ref, advantages = _inputs((3, 4))
    # Keep away from the two kinks of the clipping, where a difference quotient means nothing.
    ratio = torch.tensor([0.5, 0.9, 1.1, 1.6], dtype=torch.float64).expand(3, 4)
    old = logp - ratio.log()
    logp.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: uct.ops.grpo_loss(x, old, ref, advantages, alpha=0.3)[0], (logp,))


@pytest.mark.parametrize("alpha_shape", [(), (1,), (7,), (5, 1), (3, 5, 7), (3, 1, 1)])
def test_alpha_broadcasts(alpha_shape: tuple[int, ...]) -> None:
    logp, old, ref, advantages = _inputs((3, 5, 7))
    alpha = torch.rand(alpha_shape, dtype=torch.float64)
    loss, _ = uct.ops.grpo_loss(logp, old, ref, advantages, alpha=alpha)
    assert torch.allclose(loss, naive.loss(logp, old, ref, advantages, alpha, 0.2, 0.2, 0.01, None)[0])


def test_tokens_outside_the_mask_have_no_effect_even_if_nan() -> None:
    logp, old, ref, advantages = _inputs((2, 6))
    mask = torch.tensor([1, 1, 0, 1, 0, 1])
    broken = logp.clone()
    broken[:, [2, 4]] = torch.nan
    broken.requires_grad_()
    loss, stats = uct.ops.grpo_loss(broken, old, ref, advantages, mask=mask)
    keep = mask.bool()
    wanted, statistics = naive.loss(logp[:, keep], old[:, keep], ref[:, keep], advantages, 1.0, 0.2, 0.2, 0.01, None)
    assert torch.allclose(loss, wanted)
    assert torch.allclose(stats.kl, statistics["kl"])
    assert torch.allclose(stats.ratio_max, statistics["ratio_max"])
    loss.backward()
    assert broken.grad is not None
    assert (broken.grad[:, ~keep] == 0).all()
    assert torch.isfinite(broken.grad).all()


def test_an_empty_mask_gives_zero_everywhere() -> None:
    logp, old, ref, advantages = _inputs((2, 6))
    logp.requires_grad_()
    loss, stats = uct.ops.grpo_loss(logp, old, ref, advantages, mask=torch.zeros(2, 6, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert [float(x) for x in stats[:4]] == [0.0] * 4
    assert logp.grad is not None
    assert (logp.grad == 0).all()


def test_no_length_normalisation_and_no_division_by_the_std() -> None:
    # At ratio 1 and beta 0 the loss is −alpha/R · Σ advantage · tokens.
    logp = torch.zeros(4, 10)
    advantages = torch.tensor([3.0, -1.0, 5.0, 1.0])
    loss, _ = uct.ops.grpo_loss(logp, logp, None, advantages, alpha=0.5, beta=0.0)
    assert loss.item() == pytest.approx(-0.5 / 4 * 8.0 * 10)


def test_low_precision_is_computed_in_float32() -> None:
    logp, old, ref, advantages = _inputs((3, 50), torch.bfloat16)
    logp.requires_grad_()
    loss, stats = uct.ops.grpo_loss(logp, old, ref, advantages, beta=0.1)
    wanted, _ = naive.loss(
        logp.detach().double(), old.double(), ref.double(), advantages.double(), 1.0, 0.2, 0.2, 0.1, None
    )
    assert loss.dtype == stats.kl.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-4)
    loss.backward()
    assert logp.grad is not None
    assert logp.grad.dtype == torch.bfloat16


def test_the_gradient_of_the_loss_scales_it() -> None:
    logp, old, ref, advantages = _inputs((2, 3))
    logp.requires_grad_()
    loss = uct.ops.grpo_loss(logp, old, ref, advantages)[0]
    (one,) = torch.autograd.grad(loss, logp, retain_graph=True)
    (three,) = torch.autograd.grad(3 * loss, logp)
    assert torch.allclose(three, 3 * one)
