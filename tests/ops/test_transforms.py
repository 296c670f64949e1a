"""What may wrap a call: autocast (casts like nn.Linear), torch.func and forward mode (refused), changing sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import pyunictokens as uct
from pyunictokens.utils.errors import UserError

R, N, D, K = 2, 5, 6, 11
OFFERED = [name for name, what in uct.ops.capabilities().items() if what["available"] and name != "cuda"]
ON_CPU = [name for name in ("reference", "cpu") if name in OFFERED]


def _inputs(dtype: torch.dtype = torch.float32, n: int = N) -> dict[str, Tensor]:
    return {
        "hidden": torch.randn(R, n, D, dtype=dtype, requires_grad=True),
        "uncond": torch.randn(R, n, D, dtype=dtype, requires_grad=True),
        "weight": torch.randn(K, D, dtype=dtype, requires_grad=True),
        "bias": torch.randn(K, dtype=dtype, requires_grad=True),
        "target": torch.randint(0, K, (R, n)),
        "old": -torch.rand(R, n, dtype=dtype),
        "advantages": torch.randn(R, dtype=dtype),
    }


def _logprob(x: dict[str, Tensor], backend: str | None = None) -> Tensor:
    return uct.ops.selected_logprob(
        x["hidden"],
        x["weight"],
        x["target"],
        x["bias"],
        hidden_uncond=x["uncond"],
        guidance_scale=2.0,
        backend=backend,
    )


def _fused(x: dict[str, Tensor], backend: str | None = None) -> Tensor:
    return uct.ops.maskgit_grpo_loss(
        x["hidden"],
        x["weight"],
        x["target"],
        x["old"],
        None,
        x["advantages"],
        x["bias"],
        hidden_uncond=x["uncond"],
        guidance_scale=2.0,
        clip_low=1.0,  # never clipped: a clipped loss would be the same for other log-probs
        clip_high=1e6,
        beta=0.0,
        backend=backend,
    )[0]


def _loss(x: dict[str, Tensor], backend: str | None = None) -> Tensor:
    return uct.ops.grpo_loss(x["hidden"][..., 0], x["old"], None, x["advantages"], beta=0.0, backend=backend)[0]


def _step(logits: Tensor, backend: str | None = None) -> Any:
    codes = torch.full(logits.shape[:2], uct.MASK)
    ids = torch.arange(len(logits))
    return uct.ops.maskgit_step(
        logits, codes, mask_len=2, temperature=1.0, seed=1, sample_ids=ids, step=0, backend=backend
    )


# --- autocast ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("call", [_logprob, _fused])
def test_autocast_casts_the_product_as_a_linear_layer_does(call: Callable[..., Tensor], backend: str) -> None:
    x = _inputs()
    leaves = [x[name] for name in ("hidden", "uncond", "weight", "bias")]
    with torch.autocast("cpu", torch.bfloat16):
        found = call(x, backend)
    by_hand = {key: x[key].to(torch.bfloat16) if key in ("hidden", "uncond", "weight") else x[key] for key in x}
    wanted = call(by_hand, backend)
    assert found.dtype == wanted.dtype == torch.float32
    assert torch.equal(found, wanted) and not torch.equal(found, call(x, backend))
    pairs = zip(
        torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves), leaves, strict=True
    )
    for got, want, leaf in pairs:
        assert got.dtype == leaf.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ON_CPU)
def test_autocast_is_as_close_to_the_truth_as_the_rounded_inputs_allow(backend: str) -> None:
    """The product of rounded inputs is summed in float32: no second rounding of the logits to bfloat16."""
    x = _inputs()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = _logprob(x, backend)
    rounded = {key: value.detach() for key, value in x.items()}
    for key in ("hidden", "uncond", "weight"):
        rounded[key] = rounded[key].to(torch.bfloat16)
    truth = _logprob({key: v.double() if v.is_floating_point() else v for key, v in rounded.items()}, "reference")
    assert torch.allclose(found.double(), truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", ON_CPU)
def test_autocast_leaves_loss_sampling_and_float64_alone(backend: str) -> None:
    x, logits = _inputs(), torch.randn(R, N, K)
    wanted_loss, wanted_step = _loss(x, backend), _step(logits, backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_loss(x, backend), wanted_loss)
        for got, want in zip(_step(logits, backend), wanted_step, strict=True):
            assert torch.equal(got, want)
        double = _inputs(torch.float64)
        assert _logprob(double).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        under = _logprob(double, "reference")
    assert torch.equal(under, _logprob(double, "reference"))


def test_autocast_under_compile() -> None:
    torch.compiler.reset()
    x = _inputs()
    compiled = torch.compile(lambda: _logprob(x, "reference"), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(), _logprob(x, "reference"))
    assert torch.equal(compiled(), _logprob(x, "reference"))


# --- torch.func, forward mode, second derivatives ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("selected_logprob", lambda hidden, x: _logprob({**x, "hidden": hidden}).sum()),
        ("maskgit_grpo_loss", lambda hidden, x: _fused({**x, "hidden": hidden})),
        ("grpo_loss", lambda hidden, x: _loss({**x, "hidden": hidden})),
        ("maskgit_step", lambda hidden, x: _step(hidden).logp.sum()),
    ],
)
def test_transforms_of_functions_are_refused_by_name(name: str, call: Callable[..., Tensor]) -> None:
    x = {key: value.detach() for key, value in _inputs().items()}
    with pytest.raises(UserError, match=f"{name}: not under torch.vmap; .* leading"):
        torch.vmap(lambda hidden: call(hidden, x))(torch.stack([x["hidden"], x["uncond"]]))
    with pytest.raises(UserError, match=f"{name}: not under torch.func .* torch.autograd.grad"):
        torch.func.grad(lambda hidden: call(hidden, x))(x["hidden"])
    with pytest.raises(UserError, match=f"{name}: not under .* forward-mode"), forward_ad.dual_level():
        call(forward_ad.make_dual(x["hidden"], torch.ones_like(x["hidden"])), x)


@pytest.mark.parametrize("call", [_logprob, _fused, _loss])
def test_second_derivatives_are_an_error_and_not_zero(call: Callable[..., Tensor]) -> None:
    x = _inputs()
    with pytest.raises(RuntimeError):
        (first,) = torch.autograd.grad(call(x).sum(), x["hidden"], create_graph=True)
        torch.autograd.grad(first.pow(2).sum(), x["hidden"])


# --- mixed precision, sizes ----------------------------------------------------------------------------------------


def test_one_half_of_guidance_in_another_dtype_is_refused() -> None:
    x = _inputs()
    x["uncond"] = x["uncond"].detach().to(torch.bfloat16)
    for call in (_logprob, _fused):
        with pytest.raises(UserError, match="hidden_uncond: dtype bfloat16, must be float32"):
            call(x)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_float64_goes_with_float64_only(name: str) -> None:
    x = _inputs()
    x[name] = x[name].detach().double()
    for call in (_logprob, _fused):
        with pytest.raises(UserError, match=f"{name}: dtype float64, but hidden is float32"):
            call(x)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("call", [_logprob, _fused, _loss])
def test_a_compiled_call_takes_other_lengths(call: Callable[..., Tensor], dynamic: bool | None) -> None:
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (N, 9, 4):
        x = _inputs(n=length)
        got, want = compiled(x), call(x)
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
        (d_got,), (d_want,) = (torch.autograd.grad(y.sum(), x["hidden"]) for y in (got, want))
        assert torch.allclose(d_got, d_want, rtol=1e-4, atol=1e-6)
