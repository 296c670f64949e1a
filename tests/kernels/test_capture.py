"""What a capture would launch has been compiled by the warm-up before it. Launches are noted; no GPU is needed.

A kernel that Triton meets for the first time inside a capture is compiled and loaded there, which spoils the capture.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

import pyunictokens as uct
from experiments.kernel_table import SHAPES, Variant, _variant
from pyunictokens.ops.backends import triton as backend

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

SOME = {name: SHAPES[name] for name in ("Show-o 512²", "toy", "nothing round", "wide codebook")}


def _calls(shape: tuple[int, ...], dtype: torch.dtype, masked: bool, guided: bool) -> None:
    """Every operation, forward and backward, on tensors without memory."""
    engine = backend.engine()
    r, t, n, width, entries = shape

    def of(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    hidden, weight, target = of(r, t, n, width), of(entries, width), of(r, t, n, dtype=torch.int64)
    each, number = of(r, t, n, dtype=torch.float32), of(1, dtype=torch.float32).view(())
    advantages, bias = of(r, dtype=torch.float32), of(entries)
    mask = of(r, t, n, dtype=torch.bool) if masked else None
    uncond, scale = (hidden, 5.0) if guided else (None, 0.0)
    turned = of(r, 4, n, 16), of(r, 4, n, 16), of(n, 8), of(n, 8), *(of(16) for _ in range(4)), 1e-5
    engine.qk_norm_rotary(*turned)
    engine.qk_norm_rotary_backward(*turned[:2], *turned, True)
    engine.grpo_loss(each, each, each, advantages, number, mask, 0.2, 0.2, 0.01)
    engine.selected_logprob(hidden, weight, target, bias, uncond, scale, 1.0)
    engine.selected_logprob_backward(each, each, hidden, weight, target, bias, uncond, scale, 1.0, 15)
    for needs in (0, 15):
        engine.maskgit_grpo_loss(
            *(hidden, weight, target, each, each, advantages, number, bias, uncond, mask, scale, 1.0),
            *(0.2, 0.2, 0.01, needs, True),
        )


def _met(monkeypatch: pytest.MonkeyPatch, capturing: bool, *call: object) -> set[Variant]:
    from pyunictokens.kernels import engine
    from pyunictokens.kernels.launch import recording

    with monkeypatch.context() as patch:
        patch.setattr(engine, "capturing", lambda tensor: capturing)
        with recording() as launches:
            _calls(*call)  # type: ignore[arg-type]
    return {_variant(each) for each in launches}


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SOME)
def test_a_capture_meets_no_new_kernel(
    monkeypatch: pytest.MonkeyPatch, shape: str, dtype: torch.dtype, masked: bool, guided: bool
) -> None:
    monkeypatch.setattr(backend, "objection", lambda: "")
    call = SOME[shape], dtype, masked, guided
    with uct.ops.capture_warmup():
        warm = _met(monkeypatch, False, *call)
    captured = _met(monkeypatch, True, *call)
    assert captured <= warm, [variant.name for variant in captured - warm]
    usual = _met(monkeypatch, False, *call)
    assert (captured <= usual) == (not masked), "with a mask a usual call does not prepare a capture"


def test_the_warmup_leaves_the_settings_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "objection", lambda: "")
    settings = backend.engine().settings
    with pytest.raises(KeyError), uct.ops.capture_warmup():
        assert settings.counted is True
        raise KeyError
    assert settings.counted is None


def test_where_nothing_can_be_captured_the_warmup_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "objection", lambda: "no CUDA device is visible")
    monkeypatch.setattr(backend, "engine", lambda: pytest.fail("Triton was imported"))
    with uct.ops.capture_warmup():
        pass
