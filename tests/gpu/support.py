"""What the tests on a GPU share: which backend can do what, inputs of odd shapes, and the truth in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import pyunictokens as uct
from pyunictokens.ops import registry as _dispatch
from pyunictokens.utils.errors import UserError
from tests.ops import naive

CLIP_LOW, CLIP_HIGH, BETA, ALPHA = 0.2, 0.3, 0.05, 0.6
SHAPES = {"cpu": (2, 2, 5, 7, 13), "cuda": (3, 4, 37, 67, 1001)}
"""R, T, N, D, K: odd on purpose, so that no block of a kernel fits."""
STEP_SHAPES = {"cpu": (2, 7, 19), "cuda": (5, 301, 1003)}
EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def need(operation: str, backend: str, device: str, dtype: torch.dtype = torch.float32) -> None:
    """Skip the test, with the library's own reason, where the backend does not do this."""
    try:
        _dispatch.choose(operation, backend, torch.device(device), dtype)
    except UserError as error:
        pytest.skip(str(error).partition("; use backend")[0])


@dataclass
class Head:
    """Inputs of the operations with a head, and the settings they are called with."""

    tensors: dict[str, Tensor]
    guidance: float = 0.0
    temperature: float = 1.0

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    @property
    def leaves(self) -> list[Tensor]:
        return [x for name in ("hidden", "weight", "bias", "uncond") if (x := self.tensors.get(name)) is not None]

    def double(self, noise: float = 0.0) -> Head:
        """The same numbers in float64 on the CPU; with `noise`, every leaf is off by that relative amount at random."""
        made = {}
        for name, value in self.tensors.items():
            value = value.detach().cpu()
            made[name] = value.double() if value.is_floating_point() else value
            if name in ("hidden", "weight", "bias", "uncond"):
                if noise:
                    made[name] = made[name] * (1 + noise * (torch.randint_like(made[name], 2) * 2 - 1))
                made[name].requires_grad_()
        return Head(made, self.guidance, self.temperature)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True, "temperature": 0.7},
    "guided": {"bias": True, "guided": 3.0},
    "masked": {"mask": 0.3},
    "masked guided": {"bias": True, "guided": 3.0, "mask": 0.1},
}


def head(
    device: str,
    dtype: torch.dtype,
    sizes: tuple[int, ...] | None = None,
    seed: int = 0,
    bias: bool = False,
    guided: float = 0.0,
    mask: float | None = None,
    temperature: float = 1.0,
) -> Head:
    """Fresh inputs; old and reference log-probs lie near the policy's own."""
    rollouts, steps, positions, width, entries = sizes or SHAPES[device]
    generator = torch.Generator().manual_seed(seed)
    shape = rollouts, steps, positions

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).to(device, dtype).requires_grad_()

    made = {"hidden": normal(*shape, width), "weight": normal(entries, width, scale=1.5 / width**0.5)}
    if bias:
        made["bias"] = normal(entries)
    if guided:
        with torch.no_grad():
            made["uncond"] = made["hidden"] + 0.2 * normal(*shape, width)
        made["uncond"].requires_grad_()
    made["target"] = torch.randint(0, entries, shape, generator=generator).to(device)
    result = Head(made, guided, temperature)
    logp = truth_logprob(result.double()).detach().float()
    for name in ("old", "ref"):
        made[name] = (logp + 0.2 * torch.randn(shape, generator=generator)).to(device)
    made["advantages"] = torch.randn(rollouts, generator=generator).to(device)
    made["upstream"] = torch.randn(shape, generator=generator).to(device)
    if mask is not None:
        made["mask"] = (torch.rand(shape, generator=generator) < mask).to(device)
    return result


def logprob(h: Head, backend: str | None) -> Tensor:
    """`selected_logprob` over the inputs."""
    return uct.ops.selected_logprob(
        h["hidden"],
        h["weight"],
        h["target"],
        h.get("bias"),
        hidden_uncond=h.get("uncond"),
        guidance_scale=h.guidance,
        temperature=h.temperature,
        backend=backend,
    )


def fused(h: Head, backend: str | None, **more: Any) -> tuple[Tensor, Tensor, Any]:
    """`maskgit_grpo_loss` over the inputs."""
    return uct.ops.maskgit_grpo_loss(
        h["hidden"],
        h["weight"],
        h["target"],
        h["old"],
        h["ref"],
        h["advantages"],
        h.get("bias"),
        hidden_uncond=h.get("uncond"),
        guidance_scale=h.guidance,
        temperature=h.temperature,
        alpha=ALPHA,
        clip_low=CLIP_LOW,
        clip_high=CLIP_HIGH,
        beta=BETA,
        mask=h.get("mask"),
        backend=backend,
        **more,
    )


def tokens_loss(logp: Tensor, h: Head, backend: str | None) -> Tensor:
    """`grpo_loss` over given log-probs."""
    return uct.ops.grpo_loss(
        logp,
        h["old"],
        h["ref"],
        h["advantages"],
        alpha=ALPHA,
        clip_low=CLIP_LOW,
        clip_high=CLIP_HIGH,
        beta=BETA,
        mask=h.get("mask"),
        backend=backend,
    )[0]


def truth_logprob(h: Head) -> Tensor:
    scores = naive.logits(h["hidden"], h["weight"], h.get("bias"), h.get("uncond"), h.guidance, h.temperature)
    return naive.logprob(h["target"], scores)


def truth_loss(logp: Tensor, h: Head) -> Tensor:
    constants = ALPHA, CLIP_LOW, CLIP_HIGH, BETA
    return naive.loss(logp, h["old"], h["ref"], h["advantages"], *constants, h.get("mask"))[0]


def truth_fused(h: Head) -> Tensor:
    return truth_loss(truth_logprob(h), h)


def gradients(result: Tensor, h: Head, leaves: list[Tensor] | None = None) -> list[Tensor]:
    """Of a scalar, or of the result under the case's upstream gradient."""
    upstream = h["upstream"].to(result.dtype) if result.dim() else None
    return list(torch.autograd.grad(result, leaves or h.leaves, upstream))


@dataclass
class Step:
    """Inputs of `maskgit_step`."""

    logits: Tensor
    arguments: dict[str, Any]

    def __call__(self, backend: str | None, **more: Any) -> Any:
        return uct.ops.maskgit_step(self.logits, **{**self.arguments, "backend": backend, **more})


def step(device: str, dtype: torch.dtype, sizes: tuple[int, ...] | None = None, seed: int = 0) -> Step:
    """Every row at a step, a length and a temperature of its own."""
    batch, positions, entries = sizes or STEP_SHAPES[device]
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(batch, positions, entries, generator=generator)).to(device, dtype)
    given = torch.randint(0, entries, (batch, positions), generator=generator)
    codes = torch.where(torch.rand(batch, positions, generator=generator) < 0.7, uct.MASK, given).to(device)
    rows = torch.arange(batch)
    return Step(
        logits,
        {
            "codes": codes,
            "mask_len": (rows * positions // (2 * batch)).to(device),
            "temperature": torch.linspace(0, 2, batch).to(device),
            "seed": 11,
            "sample_ids": (7 + 3 * rows).to(device),
            "step": (rows % 5).to(device),
        },
    )
