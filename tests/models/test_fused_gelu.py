"""GELU within the product before it: when it is taken, what it computes, and what that does to log-probs.

A GPU's product is stood in for by one that does what its epilogue does: GELU of the float32 sum, rounded once.
"""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyunictokens import RolloutEngine
from pyunictokens.models import fp8, fused_gelu
from pyunictokens.models.fused_gelu import gelu_way, linear_gelu
from pyunictokens.train.trajectories import ImageTrajectories
from pyunictokens.train.update import image_logprobs
from tests.rollout.tiny import tiny_model
from tests.train.test_precision import ROOT_MEAN_SQUARE, deep

CPU = torch.device("cpu")
NARROW = [torch.bfloat16, torch.float16]
calls: list[tuple[int, ...]] = []


def epilogue(bias: Tensor, rows: Tensor, weight: Tensor, *, use_gelu: bool) -> Tensor:
    """As a GPU computes it."""
    assert use_gelu and rows.dim() == 2 and bias.dim() == 1
    calls.append(tuple(rows.shape))
    wide = torch.promote_types(rows.dtype, torch.float32)
    return F.gelu(torch.addmm(bias.to(wide), rows.to(wide), weight.to(wide)), approximate="tanh").to(rows.dtype)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU whose product does what a GPU's does."""
    monkeypatch.setattr(torch, "_addmm_activation", epilogue)
    monkeypatch.setattr(fused_gelu, "_found", {})
    monkeypatch.setattr(fused_gelu, "_fused", lambda device, dtype: gelu_way(device, dtype)[0] == "fused")
    calls.clear()


def layer(dtype: torch.dtype, width: int = 37, inner: int = 51) -> nn.Linear:
    generator = torch.Generator().manual_seed(1)
    made = nn.Linear(width, inner).requires_grad_(False)
    made.weight.copy_(torch.randn(inner, width, generator=generator) / width**0.5)
    made.bias.copy_(torch.randn(inner, generator=generator))
    return made.to(dtype)


def test_what_torch_computes_here_is_found_out():
    """On a CPU it is the GELU of erf, which the question tells from that of tanh in every dtype."""
    x, linear = torch.linspace(-4, 4, 37)[None], layer(torch.float32)
    here = torch._addmm_activation(linear.bias, x, linear.weight.t(), use_gelu=True)
    product = linear(x)
    assert (here - F.gelu(product)).abs().max() < 1e-6 < (here - F.gelu(product, approximate="tanh")).abs().max()
    for dtype in (torch.float32, torch.float64, *NARROW):
        assert gelu_way(CPU, dtype) == ("plain", "torch's product with GELU computes another GELU here")


def test_the_answer_for_a_gpu_and_for_a_torch_without_it(on_gpu, monkeypatch, caplog):
    for dtype in (torch.float32, *NARROW):
        assert gelu_way(CPU, dtype)[0] == "fused"
    monkeypatch.setattr(fused_gelu, "_found", {})
    monkeypatch.delattr(torch, "_addmm_activation")
    assert gelu_way(CPU)[0] == "plain" and "AttributeError" in gelu_way(CPU)[1]
    with caplog.at_level(logging.WARNING):
        way, why = gelu_way(torch.device("cuda", 99))
    assert way == "plain" and "cannot be used" in why and "run one after the other" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@torch.no_grad()
def test_values_against_float64(on_gpu, dtype):
    linear = layer(dtype)
    for shape in ((3, 5, 37), (1, 37), (37,), (2, 0, 37)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        truth = F.gelu(F.linear(x.double(), linear.weight.double(), linear.bias.double()), approximate="tanh")
        fused, plain = linear_gelu(linear, x), F.gelu(linear(x), approximate="tanh")
        assert fused.shape == plain.shape and fused.dtype == plain.dtype
        unit = torch.finfo(dtype).eps / 2
        assert ((fused.double() - truth).abs() <= unit * truth.abs() + 1e-5).all(), "rounded once"
        if dtype != torch.float32 and x.numel() > 37:
            assert ((plain.double() - truth).abs() > unit * truth.abs() + 1e-5).any(), "in two steps it is twice"
    assert calls[1:] == [(15, 37), (1, 37), (1, 37)], "nothing at all is multiplied where there is nothing"


def test_what_has_a_path_of_its_own_keeps_it(on_gpu):
    linear, x = layer(torch.bfloat16), torch.randn(4, 37).to(torch.bfloat16)
    with torch.no_grad():
        linear_gelu(linear, x)
    used = len(calls)
    assert used == 2, "the question, and the product"

    class Adapted(nn.Linear):
        """Stands for LoRA, four bits and whatever else is built upon nn.Linear."""

    adapted = Adapted(37, 51, dtype=torch.bfloat16)
    hooked, quantised, bare = layer(torch.bfloat16), layer(torch.bfloat16), nn.Linear(37, 51, False).bfloat16()
    hooked.register_forward_hook(lambda module, args, output: 2 * output)
    quantised.__dict__["forward"] = lambda x: fp8.product(x, fp8.quantised(quantised.weight), quantised.bias)
    with torch.no_grad():
        for other in (adapted, hooked, quantised, bare):
            assert torch.equal(linear_gelu(other, x), F.gelu(other(x), approximate="tanh"))
        assert torch.equal(linear_gelu(layer(torch.float32), x.float()), linear_gelu(layer(torch.float32), x.float()))
    counted = len(calls)
    for learns in (x.clone().requires_grad_(), x):
        out = linear_gelu(linear.requires_grad_(), learns)
        assert out.requires_grad
    assert len(calls) == counted, "gradients take two steps"


@pytest.mark.parametrize("scale", [0.0, 5.0])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_rollout_with_it_and_the_ratio_of_its_update(on_gpu, monkeypatch, dtype, scale):
    """The rollout rounds once less in each of 24 layers than the update, which forms gradients: log-probs stay within
    the bound of the precision itself."""
    model = deep(dtype)
    images = RolloutEngine(model).generate_images(
        [[5, 6], [7, 8, 9]], samples=3, steps=4, guidance_scale=scale, seed=1, decode=False
    )
    assert len(calls) > 4 * 24
    monkeypatch.setattr(fused_gelu, "_fused", lambda device, dtype: False)
    off = image_logprobs(model, ImageTrajectories.of(model, images)) - images.logp
    bound = ROOT_MEAN_SQUARE[dtype] * (1 + 2 * scale)
    assert 0 < off.square().mean().sqrt() < bound and off.abs().max() < 5 * bound
    assert off.exp().mean() == pytest.approx(1, abs=0.3 * bound)


def test_with_fp8_the_first_product_is_the_quantised_one(on_gpu):
    model, options = tiny_model(dtype=torch.bfloat16), {"steps": 2, "seed": 3, "guidance_scale": 0.0, "decode": False}
    RolloutEngine(model, products="fp8").generate_images([[5, 6]], **options)
    assert not calls
    RolloutEngine(model).generate_images([[5, 6]], **options)
    assert calls
