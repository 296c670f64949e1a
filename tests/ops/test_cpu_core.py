"""The CPU core's loss and head against float64: every instruction set, odd sizes, masks, threads, broken numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pyunictokens as uct
from pyunictokens.ops.backends import cpu as _native
from pyunictokens.ops.backends import cpu_head as _native_head

from . import naive

CORE = _native.core()
pytestmark = pytest.mark.skipif(CORE is None, reason="the compiled core is not built")
TOLERANCE = 1e-5  # relative, of float32 inputs against float64


def _loss_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    logp = -3 * torch.rand(shape)
    values = {
        "logp": logp,
        "old": logp + 0.3 * torch.randn(shape),
        "ref": logp + 0.1 * torch.randn(shape),
        "advantages": torch.randn(shape[0]),
    }
    values = {key: x.to(dtype) for key, x in values.items()}
    # Away from the kinks of the clipping, where one rounding decides about a whole gradient.
    ratio = (values["logp"].double() - values["old"].double()).exp()
    near = ((ratio - 0.9).abs() < 1e-4) | ((ratio - 1.2).abs() < 1e-4)
    values["old"] = torch.where(near, values["old"] - 1.0, values["old"])
    return values


LOSS_SHAPES = [(3, 5, 7), (1, 1), (64,), (2, 3, 2, 5), (7, 1031), (2, 4096), (3, 0), (1, 130)]


@pytest.mark.parametrize("shape", LOSS_SHAPES)
@pytest.mark.parametrize("kind", ["plain", "mask", "alpha", "no reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grpo_loss(level: str, shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    x = _loss_inputs(shape, dtype)
    exact = {key: value.double() for key, value in x.items()}
    mask = torch.rand(shape[1:]) > 0.4 if kind == "mask" else None
    alpha = torch.rand(shape) if kind == "alpha" else 0.6
    beta, ref = (0.0, None) if kind == "no reference" else (0.04, x["ref"])
    x["logp"].requires_grad_()
    exact["logp"].requires_grad_()
    whole_mask = None if mask is None else mask.expand(shape)
    loss, stats = uct.ops.grpo_loss(
        x["logp"], x["old"], ref, x["advantages"], alpha=alpha, beta=beta, mask=mask, clip_low=0.1, backend="cpu"
    )
    (grad,) = torch.autograd.grad(loss, x["logp"])
    if 0 in shape:
        assert loss.item() == 0.0
        assert [float(value) for value in stats[:4]] == [0.0] * 4
        return
    wanted, statistics = naive.loss(
        exact["logp"],
        exact["old"],
        None if ref is None else exact["ref"],
        exact["advantages"],
        alpha.double() if isinstance(alpha, Tensor) else alpha,
        0.1,
        0.2,
        beta,
        whole_mask,
    )
    (wanted_grad,) = torch.autograd.grad(wanted, exact["logp"])
    scale = wanted_grad.abs().sum() + 1e-30  # the terms may cancel; their sizes are those of the gradient
    assert (loss.double() - wanted).abs() <= TOLERANCE * (scale + wanted.abs())
    assert grad.dtype == dtype
    assert naive.relative(grad, wanted_grad) < {torch.float32: TOLERANCE}.get(dtype, 4e-3)  # one rounding
    for key, value in statistics.items():
        assert torch.allclose(getattr(stats, key).double(), value, rtol=TOLERANCE, atol=1e-8), key


def test_a_gradient_smaller_than_float16s_normal_numbers(level: str) -> None:
    logp = torch.full((1, 1), -1.0, dtype=torch.float16, requires_grad=True)
    old, alpha = logp.detach(), torch.full((1, 1), 2.6512e-6)
    loss, _ = uct.ops.grpo_loss(logp, old, None, torch.ones(1), alpha=alpha, beta=0.0, backend="cpu")
    (grad,) = torch.autograd.grad(loss, logp)
    assert abs(grad.item() + 2.6512e-6) <= 2**-25  # half of the spacing down there: 1 % of this gradient
    assert naive.relative(grad, -alpha.double()) < 4e-3


def test_grpo_loss_k3_keeps_its_precision_near_zero(level: str) -> None:
    # k3 of two policies that differ by 1e-4 is 5e-9: exp(gap) - gap - 1 in float32 would be noise alone.
    logp = -torch.rand(4, 100)
    ref = logp + 1e-4 * (1 + torch.rand(4, 100))
    _, stats = uct.ops.grpo_loss(logp, logp, ref, torch.zeros(4), backend="cpu")
    gap = ref.double() - logp.double()
    assert stats.kl.item() == pytest.approx((gap.exp() - gap - 1).mean().item(), rel=1e-4)


def test_grpo_loss_of_infinite_and_broken_numbers(level: str) -> None:
    logp = torch.full((1, 6), -1.0)
    old = torch.tensor([[-1.0, 200.0, -200.0, torch.inf, -1.0, -1.0]])
    mask = torch.tensor([[True, True, True, True, False, False]])
    logp[0, 4:] = torch.nan
    logp.requires_grad_()
    loss, stats = uct.ops.grpo_loss(logp, old, None, torch.ones(1), beta=0.0, mask=mask, backend="cpu")
    assert loss.item() == pytest.approx(-(1.0 + 0.0 + 1.2 + 0.0))
    assert stats.ratio_max.item() == torch.inf
    loss.backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == [[-1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    broken, stats = uct.ops.grpo_loss(logp.detach(), old, None, torch.ones(1), beta=0.0, backend="cpu")
    assert broken.isnan() and stats.ratio_max.isnan()  # where nothing is masked, NaN is seen


def _head(lead: tuple[int, ...], width: int, entries: int) -> dict[str, Tensor]:
    return {
        "hidden": torch.randn(*lead, width),
        "uncond": torch.randn(*lead, width),
        "weight": torch.randn(entries, width) / width**0.5,
        "bias": torch.randn(entries),
        "target": torch.randint(0, entries, lead),
    }


HEADS = [  # leading shape, D, K, guidance, temperature, with bias
    ((3, 5, 7), 13, 29, 5.0, 1.0, True),
    ((2, 75), 65, 201, 1.5, 1.0, True),
    ((33,), 130, 531, 0.0, 1.0, True),
    ((131,), 8, 64, 0.0, 0.7, True),
    ((2, 1), 5, 1, 2.5, 1.3, False),
    ((), 6, 17, 1.0, 1.0, True),
    ((0, 4), 6, 17, 0.0, 1.0, True),
    ((9,), 16, 4099, 0.0, 1.0, False),
]


@pytest.fixture(params=["one piece", "pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workspace as it is, where these shapes are one chunk and one block; and so small that they are many."""
    if request.param == "pieces":
        monkeypatch.setattr(_native_head, "TOKENS", (32, 32))
        monkeypatch.setattr(_native_head, "BLOCK_ELEMENTS", 1)
        monkeypatch.setattr(_native_head, "ROW_ELEMENTS", 1)


@pytest.mark.parametrize(("lead", "width", "entries", "scale", "temperature", "with_bias"), HEADS)
def test_selected_logprob(
    level: str,
    pieces: None,
    lead: tuple[int, ...],
    width: int,
    entries: int,
    scale: float,
    temperature: float,
    with_bias: bool,
) -> None:
    x = _head(lead, width, entries)
    names = ["hidden", "weight", *["uncond"] * (scale > 0), *["bias"] * with_bias]
    exact = {key: value.double() if value.is_floating_point() else value for key, value in x.items()}
    for name in names:
        x[name].requires_grad_()
        exact[name].requires_grad_()
    wanted = naive.logprob(
        x["target"],
        naive.logits(
            exact["hidden"], exact["weight"], exact["bias"] if with_bias else None, exact["uncond"], scale, temperature
        ),
    )
    found = uct.ops.selected_logprob(
        x["hidden"],
        x["weight"],
        x["target"],
        x["bias"] if with_bias else None,
        hidden_uncond=x["uncond"],
        guidance_scale=scale,
        temperature=temperature,
        backend="cpu",
    )
    grad = torch.randn(lead)
    grads = torch.autograd.grad(found, [x[name] for name in names], grad)
    wanted_grads = torch.autograd.grad(wanted, [exact[name] for name in names], grad.double())
    assert found.shape == lead
    assert naive.relative(found.detach(), wanted.detach()) < TOLERANCE or entries == 1
    for name, got, want in zip(names, grads, wanted_grads, strict=True):
        # with one entry the gradient is 0, and what is left is the rounding of a product formed twice
        assert naive.relative(got, want) < TOLERANCE or (entries == 1 and got.abs().max() < 1e-4), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_widened(level: str, dtype: torch.dtype) -> None:
    x = {key: v.to(dtype) if v.is_floating_point() else v for key, v in _head((4, 9), 12, 77).items()}
    hidden, weight = x["hidden"].requires_grad_(), x["weight"].requires_grad_()
    found = uct.ops.selected_logprob(hidden, weight, x["target"], x["bias"], backend="cpu")
    wide = hidden.detach().double().requires_grad_()
    wanted = naive.logprob(
        x["target"], naive.logits(wide, weight.detach().double(), x["bias"].double(), None, 0.0, 1.0)
    )
    assert found.dtype == torch.float32
    assert naive.relative(found.detach(), wanted.detach()) < TOLERANCE
    found.sum().backward()
    wanted.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    assert naive.relative(hidden.grad, wide.grad) < 4e-3  # one rounding of the result


def test_tokens_without_a_gradient_cost_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    x = _head((40,), 8, 33)
    hidden, weight = x["hidden"].requires_grad_(), x["weight"].requires_grad_()
    grad = torch.randn(40) * (torch.rand(40) > 0.5)
    rows = []
    chunks = _native_head._Head.chunks
    monkeypatch.setattr(_native_head._Head, "chunks", lambda self: rows.append(self.count) or chunks(self))
    out = {}
    for backend in ("cpu", "reference"):
        logp = uct.ops.selected_logprob(hidden, weight, x["target"], backend=backend)
        out[backend] = torch.autograd.grad(logp, [hidden, weight], grad)
    assert rows == [40, int((grad != 0).sum())]
    for got, want in zip(out["cpu"], out["reference"], strict=True):
        assert naive.relative(got, want) < TOLERANCE


def test_excluded_entries(level: str, pieces: None) -> None:
    """A logit of -inf has probability 0: no gradient, and no NaN in the entropy, even where it is a whole block's."""
    x = _head((2, 3, 5), 8, 144)
    bias = x["bias"].clone()
    bias[::3] = bias[:40] = bias[70:110] = -torch.inf
    x["target"] = x["target"] % 10 * 3 + 112
    hidden, weight = x["hidden"].requires_grad_(), x["weight"].requires_grad_()
    old, advantages = -torch.rand(2, 3, 5), torch.tensor([1.0, -1.0])
    out = {}
    for backend in ("cpu", "reference"):
        loss, logp, stats = uct.ops.maskgit_grpo_loss(
            hidden, weight, x["target"], old, old, advantages, bias, backend=backend
        )
        out[backend] = [loss, logp, stats.entropy, *torch.autograd.grad(loss, [hidden, weight])]
    for got, want in zip(out["cpu"], out["reference"], strict=True):
        assert torch.isfinite(got).all()
        assert naive.relative(got, want) < 3 * TOLERANCE
    assert (out["cpu"][4][bias == -torch.inf] == 0).all()
    logp = {name: uct.ops.selected_logprob(hidden, weight, x["target"], bias, backend=name) for name in out}
    assert naive.relative(logp["cpu"].detach(), logp["reference"].detach()) < TOLERANCE
    broken = torch.where(bias == -torch.inf, bias, torch.nan)
    assert uct.ops.selected_logprob(hidden, weight, x["target"], broken, backend="cpu").isnan().all()


def test_what_only_pads_a_panel_takes_no_part(level: str) -> None:
    """An infinite weight excludes every token here, so its row learns nothing; times a padding zero it is no number."""
    x = _head((37,), 9, 50)
    x["weight"][3] = torch.inf
    x["target"] = x["target"] % 40 + 10
    hidden, weight, grad = -x["hidden"].abs(), x["weight"].requires_grad_(), torch.randn(37)
    out = {}
    for backend in ("cpu", "reference"):
        logp = uct.ops.selected_logprob(hidden, weight, x["target"], backend=backend)
        (out[backend],) = torch.autograd.grad(logp, [weight], grad)
    assert (out["cpu"][3] == 0).all()
    assert naive.relative(out["cpu"], out["reference"]) < TOLERANCE


@pytest.mark.parametrize("mask_kind", ["none", "some", "rows", "all false"])
@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_maskgit_grpo_loss(level: str, pieces: None, mask_kind: str, scale: float) -> None:
    shape = (3, 2, 11)
    x = _head(shape, 9, 37)
    x.update(old=-3 - torch.rand(shape), ref=-3 - torch.rand(shape), advantages=torch.randn(3))
    mask = {
        "none": None,
        "some": torch.rand(shape) > 0.5,
        "rows": torch.tensor([True, False, True]).view(3, 1, 1),
        "all false": torch.zeros(shape, dtype=torch.bool),
    }[mask_kind]
    kept = torch.ones(shape, dtype=torch.bool) if mask is None else mask.expand(shape)
    alpha = torch.rand(shape)
    names = ["hidden", "weight", "bias", *["uncond"] * (scale > 0)]

    def call(values: dict[str, Tensor], backend: str, asked: bool = True) -> tuple[Any, ...]:
        leaves = {name: values[name].detach().requires_grad_() for name in names}
        loss, logp, stats = uct.ops.maskgit_grpo_loss(
            leaves["hidden"],
            leaves["weight"],
            values["target"],
            values["old"],
            values["ref"],
            values["advantages"],
            leaves["bias"],
            hidden_uncond=leaves.get("uncond"),
            guidance_scale=scale,
            temperature=0.9,
            alpha=alpha.to(values["old"].dtype),
            mask=mask,
            with_entropy=asked,
            backend=backend,
        )
        return loss, logp, stats, torch.autograd.grad(loss, [leaves[name] for name in names])

    exact = {key: value.double() if value.is_floating_point() else value for key, value in x.items()}
    broken = dict(x)
    for name in ("hidden", "old"):
        broken[name] = torch.where(kept[..., None] if name == "hidden" else kept, x[name], torch.nan)
    loss, logp, stats, grads = call(broken, "cpu")
    wanted_loss, wanted_logp, wanted_stats, wanted_grads = call(exact, "reference")
    assert loss.item() == pytest.approx(wanted_loss.item(), rel=1e-4, abs=1e-5)
    assert naive.relative(logp, wanted_logp) < TOLERANCE
    assert (logp[~kept] == 0).all()
    for got, want in zip(stats, wanted_stats, strict=True):
        assert got.item() == pytest.approx(want.item(), rel=TOLERANCE, abs=1e-6)
    for name, got, want in zip(names, grads, wanted_grads, strict=True):
        assert naive.relative(got, want) < 2 * TOLERANCE, name
    without = call(broken, "cpu", asked=False)
    assert without[2].entropy is None
    assert torch.equal(without[0], loss)


def test_the_number_of_threads_changes_nothing(level: str, threads: None) -> None:
    """Bit for bit: a piece's result does not depend on who forms it, and every sum has one order."""
    x, head = _loss_inputs((5, 9001)), _head((300,), 40, 230)
    hidden, weight, bias = (head[name].requires_grad_() for name in ("hidden", "weight", "bias"))
    grad = torch.randn(300)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out, d_logp = _native.loss_over_tokens(
            x["logp"], x["old"], x["ref"], x["advantages"], 9001, torch.ones(()), None, 5, 0.2, 0.2, 0.01
        )
        logp = uct.ops.selected_logprob(hidden, weight, head["target"], bias, temperature=0.8, backend="cpu")
        results.append([out, d_logp, logp, *torch.autograd.grad(logp, [hidden, weight, bias], grad)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("whole_rows", [False, True])
def test_few_tokens_for_many_threads(level: str, threads: None, whole_rows: bool) -> None:
    """Bit for bit too where every product is shared among threads, not the tokens; over blocks and parts of blocks."""
    head = _head((70,), 40, 1301)
    hidden, weight = (head[name].requires_grad_() for name in ("hidden", "weight"))
    old, advantages, grad = -torch.rand(1, 70), torch.ones(1), torch.randn(70)
    results = []
    for count in (1, 40):
        torch.set_num_threads(count)
        if whole_rows:
            loss, logp, _ = uct.ops.maskgit_grpo_loss(
                hidden[None], weight, head["target"][None], old, old, advantages, head["bias"], backend="cpu"
            )
            results.append([logp, *torch.autograd.grad(loss, [hidden, weight])])
        else:
            logp = uct.ops.selected_logprob(hidden, weight, head["target"], head["bias"], backend="cpu")
            results.append([logp, *torch.autograd.grad(logp, [hidden, weight], grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_blocks_that_are_no_multiple_of_the_cores_own(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native_head, "BLOCK_ELEMENTS", 64 * 700)  # parts of 512 and 188 entries; the last block of 101
    x = _head((50,), 33, 1501)
    hidden, weight = x["hidden"].requires_grad_(), x["weight"].requires_grad_()
    grad = torch.randn(50)
    out = {}
    for backend in ("cpu", "reference"):
        logp = uct.ops.selected_logprob(hidden, weight, x["target"], x["bias"], backend=backend)
        out[backend] = [logp.detach(), *torch.autograd.grad(logp, [hidden, weight], grad)]
    for got, want in zip(out["cpu"], out["reference"], strict=True):
        assert naive.relative(got, want) < TOLERANCE


def test_selected_logprob_holds_a_tenth_of_what_eager_holds() -> None:
    tokens, entries = 4096, 4096
    eager = 3 * 4 * tokens * entries  # log-softmax, its gradient and that of the scores
    hidden, weight, target = torch.empty(tokens, 512), torch.empty(entries, 512), torch.zeros(tokens, dtype=torch.int64)
    head = _native_head._Head(hidden, weight, None, None, 0.0, 1.0, target, None, 15, False)
    assert 4 * (head.scores.numel() + head.packed.numel()) <= 0.05 * eager
