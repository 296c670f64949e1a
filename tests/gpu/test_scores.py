"""Softmax statistics in the product's epilogue against the row kernel: one loss, one gradient, a measured choice."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pyunictokens as uct
from pyunictokens.ops.backends import triton as backend

SHAPES = {"cpu": (1, 130, 64, 331), "cuda": (2, 5000, 512, 8199)}
"""Rollouts, tokens of each, width, entries: several pieces on a GPU, parts and rows that do not come out even."""


def _run(device: str, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(3)
    rollouts, tokens, width, entries = SHAPES[device]
    hidden = torch.randn(rollouts, tokens, width).to(device, dtype).requires_grad_()
    weight = (torch.randn(entries, width) / width**0.5).to(device, dtype).requires_grad_()
    bias = torch.randn(entries).to(device, dtype).requires_grad_()
    target = torch.randint(0, entries, (rollouts, tokens)).to(device)
    old = torch.full((rollouts, tokens), -9.0, device=device)
    advantages, mask = torch.randn(rollouts).to(device), (torch.rand(rollouts, tokens) > 0.2).to(device)
    rest = {"mask": mask, "clip_low": 0.9, "clip_high": 1e6, "backend": "triton"}
    loss, logp, _ = uct.ops.maskgit_grpo_loss(hidden, weight, target, old, old, advantages, bias, **rest)
    return [loss.detach(), logp, *torch.autograd.grad(loss, (hidden, weight, bias))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_both_forms_agree_and_the_faster_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, dtype: torch.dtype
) -> None:
    if backend.objection() or (device == "cpu" and not backend._interpreted):
        pytest.skip(backend.objection() or "the triton backend runs on a CPU in the interpreter alone")
    if device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("TMA needs compute capability 9.0")
    settings = backend.engine().settings
    from pyunictokens.kernels import measured

    monkeypatch.setenv("PYUNICTOKENS_PLANS", str(tmp_path / "plans.json"))
    monkeypatch.setattr(measured, "_choices", {})
    found = {}
    for form in ("rows", "product"):
        monkeypatch.setattr(settings, "statistics", form)
        found[form] = _run(device, dtype)
    for one, other in zip(found["rows"], found["product"], strict=True):
        assert (one.double() - other.double()).norm() <= 5e-3 * one.double().norm()
    if device == "cuda":
        monkeypatch.setattr(settings, "statistics", None)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            chosen = _run(device, dtype)
        ((_, choice),) = measured.choices().items()
        print(choice)
        assert set(choice.seconds) == set(measured.FORMS)
        assert all(torch.equal(one, other) for one, other in zip(chosen, found[str(choice.form)], strict=True))
