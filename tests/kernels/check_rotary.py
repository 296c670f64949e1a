"""Layer norm and partial rotary of q and k, interpreted: values and gradients against float64 and the plain path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyunictokens.kernels import rotary as kernels
from pyunictokens.ops import rotary
from pyunictokens.utils.errors import UserError
from tests.models.test_showo import small

from .problems import DOUBLE, close

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}
"""Relative error of a whole tensor: that of one rounding to the dtype, for everything before is float32."""
NAMES = ("q", "k", "q_weight", "q_bias", "k_weight", "k_bias")
SHAPES = {  # B, H, L, E, R
    "Show-o's head": (1, 2, 37, 64, 32),
    "one position": (2, 1, 1, 64, 32),
    "nothing round": (2, 2, 5, 10, 6),
    "odd rest": (2, 1, 33, 7, 2),
    "all turns": (1, 2, 4, 12, 12),
}
OWN_ANGLES = ("one position", "nothing round")
"""Shapes that are tried with angles of each row's own, and with heads before positions in memory."""


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, *, own_angles: bool = False, split: bool = True
) -> dict[str, Tensor]:
    """Random values of `dtype`; q and k as a layer makes them, heads behind positions (or contiguous: split=False)."""
    b, h, length, width, turned = shape
    made = {name: torch.randn(b, length, h, width) * 3 + 1 for name in ("q", "k")}
    if not split:
        made = {name: value.transpose(1, 2).contiguous().transpose(1, 2) for name, value in made.items()}
    made = {name: value.transpose(1, 2) for name, value in made.items()}
    made |= {name: torch.randn(width) for name in NAMES[2:]}
    angle = torch.rand((b, 1, length, turned) if own_angles else (length, turned)) * 6
    made |= {"cos": angle.cos(), "sin": angle.sin()}  # the two halves differ, which a model's do not
    return {name: value.to(dtype) for name, value in made.items()}


def call(values: dict[str, Tensor], dtype: torch.dtype, grads: tuple[Tensor, Tensor], backend: str) -> list[Tensor]:
    """q, k and the six gradients by one backend, in `dtype`."""
    leaves = {name: value.detach().to(dtype).requires_grad_(name in NAMES) for name, value in values.items()}
    order = ("q", "k", "cos", "sin", *NAMES[2:])
    q, k = rotary.qk_norm_rotary(*(leaves[name] for name in order), 1e-5, backend=backend)
    gradients = torch.autograd.grad((q, k), [leaves[name] for name in NAMES], [grad.to(dtype) for grad in grads])
    return [q, k, *gradients]


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: str, dtype: torch.dtype) -> None:
    own_angles = shape in OWN_ANGLES
    torch.manual_seed(len(shape))
    values = inputs(SHAPES[shape], dtype, own_angles=own_angles, split=not own_angles)
    grads = torch.randn_like(values["q"]), torch.randn_like(values["k"]).transpose(1, 2).contiguous().transpose(1, 2)
    found = call(values, dtype, grads, "triton")
    truth, plain = call(values, DOUBLE, grads, "reference"), call(values, dtype, grads, "reference")
    for name, mine, wanted, other in zip(("q out", "k out", *NAMES), found, truth, plain, strict=True):
        assert mine.dtype == dtype and mine.shape == wanted.shape, name
        error = (mine.double() - wanted).norm() / wanted.norm()
        assert error <= ROUNDING[dtype], f"{name}: relative error {error:.2g}"
        # The plain path rounds several times, the kernel once.
        assert torch.allclose(
            mine, other, rtol=16 * ROUNDING[dtype], atol=16 * ROUNDING[dtype] * float(wanted.detach().abs().max())
        )
    assert found[0].is_contiguous() and found[2].stride() == values["q"].stride()


def test_a_row_of_large_mean_keeps_its_variance() -> None:
    """The variance is of differences from the mean; a difference of two squares would be lost in float32."""
    values = inputs(SHAPES["nothing round"], torch.float32)
    values["q"] += 3000
    grads = torch.randn_like(values["q"]), torch.randn_like(values["k"])
    found, truth = (
        call(values, dtype, grads, name)[0] for dtype, name in ((torch.float32, "triton"), (DOUBLE, "reference"))
    )
    assert (found - truth).abs().max() < 1e-2


def test_parameter_gradients_have_one_order_and_programs_share_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = inputs(SHAPES["odd rest"], torch.float32)
    grads = torch.randn_like(values["q"]), torch.randn_like(values["k"])
    truth = call(values, DOUBLE, grads, "reference")
    monkeypatch.setattr(kernels, "MOST_PROGRAMS", 3)  # of four blocks
    first, second = (call(values, torch.float32, grads, "triton") for _ in range(2))
    for mine, again, wanted in zip(first, second, truth, strict=True):
        assert torch.equal(mine, again)
        close(mine, wanted, torch.float32, "three programs")


def test_frozen_parameters_get_no_sums() -> None:
    values = inputs(SHAPES["nothing round"], torch.float32)
    order = [values[name] for name in ("q", "k", "cos", "sin", *NAMES[2:])]
    found = torch.ops.pyunictokens.qk_norm_rotary_backward(values["q"], values["k"], *order, 1e-5, False)
    assert [each.numel() for each in found] == [values["q"].numel()] * 2 + [0] * 4


def test_opcheck() -> None:
    values = inputs(SHAPES["nothing round"], torch.float32)
    order = [values[name].requires_grad_(name in NAMES) for name in ("q", "k", "cos", "sin", *NAMES[2:])]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(rotary._qk_norm_rotary, (*order, 1e-5), test_utils=checks)
    grads = torch.randn_like(values["q"]).detach(), torch.randn_like(values["k"]).detach()
    for wanted in (False, True):
        arguments = (*grads, *(each.detach() for each in order), 1e-5, wanted)
        torch.library.opcheck(rotary._qk_norm_rotary_backward, arguments, test_utils=checks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 2, 5, 8)}, "k: shape"),
        ({"k": torch.zeros(2, 2, 5, 10).half()}, "k: dtype float16"),
        ({"q": torch.zeros(3, 5, 10)}, r"q: shape \(3, 5, 10\), must be \[B, H, L, E\]"),
        ({"cos": torch.zeros(4, 6)}, "cos: shape .* with B = 2, L = 5"),
        ({"cos": torch.zeros(5, 5)}, "cos: 5 entries of a head turn, must be an even number from 2 to E = 10"),
        ({"cos": torch.zeros(5, 12)}, "cos: 12 entries"),
        ({"sin": torch.zeros(5, 4)}, "sin: shape"),
        ({"k_bias": torch.zeros(9)}, "k_bias: shape"),
    ],
)
def test_bad_input(change: dict[str, Tensor], message: str) -> None:
    values = inputs(SHAPES["nothing round"], torch.float32) | change
    order = [values[name] for name in ("q", "k", "cos", "sin", *NAMES[2:])]
    with pytest.raises(UserError, match=message):
        rotary.qk_norm_rotary(*order, 1e-5, backend="triton")


def test_angles_get_no_gradient() -> None:
    values = inputs(SHAPES["all turns"], torch.float32)
    order = [values[name] for name in ("q", "k", "cos", "sin", *NAMES[2:])]
    order[2].requires_grad_()
    q, _ = rotary.qk_norm_rotary(*order, 1e-5, backend="triton")
    with pytest.raises(UserError, match="cos, sin: get no gradient"):
        q.sum().backward()


def test_a_model_goes_through_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and gradients of a whole model, with layers recomputed on the way back."""
    kept, launched, launch = {}, [], kernels.launch

    def noted(kernel: Any, *rest: Any, **options: Any) -> None:
        launched.append(kernel)
        launch(kernel, *rest, **options)

    monkeypatch.setattr(kernels, "launch", noted)
    for name in ("reference", "triton"):
        monkeypatch.setattr(rotary, "choose", lambda *_, _name=name: _name)
        model = small(dtype=torch.float32, num_hidden_layers=1, num_attention_heads=2).requires_grad_()
        model.checkpoint_layers = 1
        logits = model(torch.arange(5)[None])
        logits.square().sum().backward()
        kept[name] = {"logits": logits} | {key: value.grad for key, value in model.named_parameters()}
        assert len(launched) == (4 if name == "triton" else 0)  # forward twice, q and k on the way back
    for key, wanted in kept["reference"].items():
        mine = kept["triton"][key]
        assert (mine is None) == (wanted is None)
        if wanted is not None:
            close(mine, wanted, torch.float32, key, ill=10)
