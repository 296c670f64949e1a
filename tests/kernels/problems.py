"""Random inputs for the checks of the kernels, and the truth about them in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.ops import naive

DOUBLE = torch.float64
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
"""Relative error of values and gradients: for 16 bits, what the roundings of guided rows, of the gradient of a row and
of the result explain, enlarged by a guidance scale of 2."""


@dataclass
class Problem:
    """Arguments of maskgit_grpo_loss by name, in float64 but with the values of `dtype`."""

    values: dict[str, Any]
    dtype: torch.dtype

    def leaves(self, dtype: torch.dtype) -> dict[str, Any]:
        """The arguments as fresh leaves: head inputs in `dtype`, the rest in float32 (or float64)."""
        other = DOUBLE if dtype == DOUBLE else torch.float32
        made = {}
        for name, value in self.values.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                head = name in ("hidden", "weight", "bias", "hidden_uncond")
                value = value.to(dtype if head else other).requires_grad_(head)
            made[name] = value
        return made


def problem(
    dtype: torch.dtype,
    shape: tuple[int, int, int, int, int] = (2, 3, 5, 12, 37),
    *,
    guidance: float = 0.0,
    temperature: float = 1.0,
    bias: bool = True,
    ref: bool = True,
    alpha: str = "number",
    mask: str = "none",
) -> Problem:
    """Random inputs whose ratios keep away from the kinks of the clipping, so that rounding cannot cross one."""
    *tokens, width, entries = shape

    def rounded(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, dtype=DOUBLE) * scale).to(dtype).to(DOUBLE)

    keep = torch.rand(tokens) > 0.4
    values: dict[str, Any] = {
        "hidden": rounded(*tokens, width),
        "weight": rounded(entries, width, scale=width**-0.5),
        "bias": rounded(entries) if bias else None,
        "hidden_uncond": rounded(*tokens, width) if guidance else None,
        "target": torch.randint(0, entries, tokens),
        "advantages": torch.randn(tokens[0], dtype=DOUBLE),
        "alpha": {"number": 0.6, "tensor": torch.rand(tokens, dtype=DOUBLE), "step": torch.rand(tokens[1], 1).double()}[
            alpha
        ],
        "mask": {
            "none": None,
            "some": keep,
            "rows": torch.arange(tokens[0]).view(-1, 1, 1) % 2 == 1,
            "all": torch.ones(tokens, dtype=torch.bool),
            "empty": torch.zeros(tokens, dtype=torch.bool),
        }[mask],
        "guidance_scale": guidance,
        "temperature": temperature,
    }
    logp = truth_logp(values)
    gap = torch.rand(tokens, dtype=DOUBLE) * 0.1
    gap = torch.where(torch.rand(tokens) < 0.4, gap + 0.35, gap) * torch.randn(tokens).sign()
    values["old_logp"] = (logp + gap).float().double()
    values["ref_logp"] = (logp + 0.2 * torch.randn(tokens)).float().double() if ref else None
    values["beta"] = 0.05 if ref else 0.0
    return Problem(values, dtype)


def truth_logp(v: dict[str, Any]) -> Tensor:
    """Log-probs in the dtype of the values, with every logit."""
    scores = naive.logits(
        v["hidden"], v["weight"], v["bias"], v["hidden_uncond"], v["guidance_scale"], v["temperature"]
    )
    return naive.logprob(v["target"], scores)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype, what: str, ill: float = 1.0) -> None:
    """Relative error of the whole tensor within what `dtype` allows, `ill` times as much where a sum cancels."""
    assert found.shape == wanted.shape, what
    if not wanted.any():
        assert not found.any(), what
        return
    error = naive.relative(found.detach(), wanted.detach())
    assert error <= ill * TOLERANCE[dtype], f"{what}: relative error {error:.2g}"
