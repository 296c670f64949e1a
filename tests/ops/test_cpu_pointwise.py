"""q/k norm with rotary, and tanh-GELU, of the compiled core: values and gradients against float64, at every level."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyunictokens.ops import gelu, rotary
from pyunictokens.ops.backends import cpu as _native
from pyunictokens.utils.errors import UserError
from tests.kernels.check_rotary import NAMES, OWN_ANGLES, SHAPES, call, inputs
from tests.ops.naive import relative

CORE = _native.core()
pytestmark = pytest.mark.skipif(CORE is None, reason="the compiled core is not built")
DOUBLE = torch.float64
MANY = {**SHAPES, "several blocks": (3, 4, 53, 32, 16), "no rows": (0, 2, 5, 8, 4)}


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("shape", MANY)
def test_norm_and_rotary_against_float64(level: str, shape: str, split: bool) -> None:
    values = inputs(MANY[shape], torch.float32, own_angles=shape in OWN_ANGLES, split=split)
    grads = torch.randn_like(values["q"]), torch.randn(values["k"].mT.shape).mT  # of strides unlike those of q
    found, truth = call(values, torch.float32, grads, "cpu"), call(values, DOUBLE, grads, "reference")
    for name, mine, wanted in zip(("q out", "k out", *NAMES), found, truth, strict=True):
        assert mine.dtype == torch.float32 and mine.shape == wanted.shape, name
        assert relative(mine.detach(), wanted.detach()) < 2e-6, name
    assert found[2].stride() == torch.empty_like(values["q"]).stride()
    with torch.no_grad():  # another way in
        order = [values[name] for name in ("q", "k", "cos", "sin", *NAMES[2:])]
        for plain, mine in zip(rotary.qk_norm_rotary(*order, 1e-5), found, strict=False):
            assert torch.equal(plain, mine)


def test_entries_that_do_not_lie_side_by_side(level: str) -> None:
    values = inputs((2, 3, 5, 10, 6), torch.float32)
    values |= {name: values[name].mT.contiguous().mT for name in ("q", "k")}
    grads = torch.randn_like(values["q"]), torch.randn_like(values["k"])
    found, truth = call(values, torch.float32, grads, "cpu"), call(values, DOUBLE, grads, "reference")
    assert all(relative(mine.detach(), wanted.detach()) < 2e-6 for mine, wanted in zip(found, truth, strict=True))


def test_a_head_of_large_mean_keeps_its_variance(level: str) -> None:
    values = inputs((2, 2, 5, 10, 6), torch.float32)
    values["q"] += 3000
    grads = torch.randn_like(values["q"]), torch.randn_like(values["k"])
    found, truth = call(values, torch.float32, grads, "cpu"), call(values, DOUBLE, grads, "reference")
    assert (found[0] - truth[0]).abs().max() < 1e-2


def test_the_number_of_threads_changes_no_bit(threads: None) -> None:
    values = inputs((3, 4, 200, 32, 16), torch.float32)
    grads = torch.randn_like(values["q"]), torch.randn_like(values["k"])
    torch.set_num_threads(1)
    alone = call(values, torch.float32, grads, "cpu")
    torch.set_num_threads(3)
    assert all(map(torch.equal, alone, call(values, torch.float32, grads, "cpu")))
    x = torch.randn(30_000)
    torch.set_num_threads(1)
    once = gelu.tanh_gelu(x)
    torch.set_num_threads(3)
    assert torch.equal(once, gelu.tanh_gelu(x))


def test_frozen_parameters_get_no_sums(level: str) -> None:
    values = inputs((2, 2, 5, 10, 6), torch.float32)
    order = [values[name] for name in ("q", "k", "cos", "sin", *NAMES[2:])]
    found = _native.qk_norm_rotary_backward(values["q"], values["k"], *order, 1e-5, False)
    assert [each.numel() for each in found] == [values["q"].numel()] * 2 + [0] * 4


def _gelu(x: Tensor, grad: Tensor, ours: bool) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    made = gelu.tanh_gelu(leaf) if ours else F.gelu(leaf, approximate="tanh")
    return made.detach(), torch.autograd.grad(made, leaf, grad)[0]


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 13), (3, 5, 768), (9001,)])
def test_gelu_against_float64(level: str, shape: tuple[int, ...]) -> None:
    x, grad = torch.randn(shape) * 4, torch.randn(shape)
    found, truth = _gelu(x, grad, True), _gelu(x.double(), grad.double(), False)
    for mine, wanted in zip(found, truth, strict=True):
        assert mine.dtype == torch.float32 and mine.shape == wanted.shape
        assert torch.allclose(mine.double(), wanted, rtol=1e-6, atol=1e-6)
        assert relative(mine, wanted) < 1e-6 or mine.numel() < 2  # one number far below zero may be all there is
    with torch.no_grad():
        assert torch.equal(gelu.tanh_gelu(x), found[0])
    assert torch.equal(gelu.tanh_gelu(x.unsqueeze(-1).expand(*shape, 3))[..., 1], found[0])  # numbers that lie apart


def test_gelu_far_from_zero(level: str) -> None:
    x = torch.tensor([-1e15, -1e4, -40.0, -6.0, -1e-30, 0.0, 1e-30, 6.0, 40.0, 1e4, 1e15])
    found, truth = _gelu(x, torch.ones_like(x), True), _gelu(x.double(), torch.ones(len(x)).double(), False)
    for mine, wanted in zip(found, truth, strict=True):
        assert torch.allclose(mine.double(), wanted, rtol=1e-5, atol=1e-7), (mine, wanted)
    assert gelu.tanh_gelu(torch.tensor([float("nan")])).isnan()


def test_gradients_by_differences() -> None:
    """Which input a gradient belongs to; there is none of angles."""
    values = inputs((1, 2, 3, 6, 4), torch.float32)
    order = [values[name].requires_grad_(name in NAMES) for name in ("q", "k", "cos", "sin", *NAMES[2:])]

    def total(*leaves: Tensor) -> Tensor:
        q, k = rotary.qk_norm_rotary(*leaves, 1e-5, backend="cpu")
        return (gelu.tanh_gelu(q) * torch.arange(6)).sum() + (gelu.tanh_gelu(k) * torch.arange(6)).square().sum()

    learns = [leaf for leaf in order if leaf.requires_grad]
    gradients = iter(torch.autograd.grad(total(*order), learns))
    for place, leaf in enumerate(order):
        if not leaf.requires_grad:
            continue
        way = torch.randn_like(leaf)
        ends = [order[:place] + [leaf.detach() + step * way] + order[place + 1 :] for step in (1e-2, -1e-2)]
        slope = (total(*ends[0]) - total(*ends[1])).item() / 2e-2
        assert (next(gradients) * way).sum().item() == pytest.approx(slope, rel=2e-2, abs=2e-2)
    order[2].requires_grad_()
    with pytest.raises(UserError, match="cos, sin: get no gradient"):
        torch.autograd.grad(total(*order), order[2])


def test_gradients_of_gradients() -> None:
    values = inputs((1, 2, 3, 6, 4), torch.float32)
    found = []
    for dtype, backend in ((torch.float32, "cpu"), (DOUBLE, "reference")):
        order = [values[name].to(dtype).requires_grad_(name in NAMES) for name in ("q", "k", "cos", "sin", *NAMES[2:])]
        q, k = rotary.qk_norm_rotary(*order, 1e-5, backend=backend)
        learns = [leaf for leaf in order if leaf.requires_grad]
        once = torch.autograd.grad(gelu.tanh_gelu(q).sum() + k.pow(3).sum(), learns, create_graph=True)
        found.append(torch.autograd.grad(sum((each**2).sum() for each in once), learns))
    assert all(relative(mine, wanted) < 1e-4 for mine, wanted in zip(*found, strict=True))


def test_what_has_no_rule_here_takes_the_plain_lines() -> None:
    values = inputs((2, 2, 5, 10, 6), torch.float32)
    order = [values[name] for name in ("q", "k", "cos", "sin", *NAMES[2:])]

    def both(q: Tensor) -> Tensor:
        return gelu.tanh_gelu(rotary.qk_norm_rotary(q, *order[1:], 1e-5)[0])

    q = order[0]
    way, step = torch.randn_like(q), 1e-2
    _, slope = torch.func.jvp(both, (q,), (way,))
    assert relative(slope, (both(q + step * way) - both(q - step * way)).double() / (2 * step)) < 1e-2
    mapped = torch.vmap(both)(torch.stack([q, 2 * q]))
    assert relative(mapped[0], both(q).double()) < 1e-6
    compiled = torch.compile(both, backend="eager", fullgraph=True)
    assert relative(compiled(q), both(q).double()) < 1e-6


def test_other_dtypes_keep_torchs_gelu() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        x = torch.randn(50).to(dtype)
        assert torch.equal(gelu.tanh_gelu(x), F.gelu(x, approximate="tanh"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 2, 5, 8)}, "k: shape"),
        ({"cos": torch.zeros(5, 12)}, "cos: 12 entries"),
        ({"sin": torch.zeros(5, 4)}, "sin: shape"),
        ({"k_bias": torch.zeros(9)}, "k_bias: shape"),
        ({"q": torch.zeros(2, 2, 5, 10).half(), "k": torch.zeros(2, 2, 5, 10).half()}, "does not take float16"),
    ],
)
def test_bad_input(change: dict[str, Tensor], message: str) -> None:
    values = inputs((2, 2, 5, 10, 6), torch.float32) | change
    order = [values[name] for name in ("q", "k", "cos", "sin", *NAMES[2:])]
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, pytest.raises(UserError, match=message):
            rotary.qk_norm_rotary(*order, 1e-5, backend="cpu")
