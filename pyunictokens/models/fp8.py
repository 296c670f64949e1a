"""Rollouts with products in 8-bit floats: the linear layers of a model's blocks multiply in e4m3, sums are float32.

    x ≈ x8 · a,  W ≈ w8 · c,  y = (x8 · w8ᵀ) · a · cᵀ + b        a, c: one float32 scale for each row of x and of W

Where it is on, the policy that draws is the quantised one, and the log-probs that a rollout records are its own. The
update computes log-probs in the model's precision and takes the recorded ones for `old_logp`, so its ratio
exp(logp − old_logp) is the importance weight between the policy that learns and the one that drew: what fp8 moves is
corrected there, and clipped where it is large. Attention, norms, embeddings and heads keep their precision.

On a GPU of compute capability 8.9 or newer the products are `torch._scaled_mm`; elsewhere operands are rounded to e4m3
in the same way and multiplied in float32, which is no faster.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from ..utils.errors import UserError
from .base import MaskedModel

E4M3: Final = torch.float8_e4m3fn
LARGEST: Final = torch.finfo(E4M3).max
"""448: a row is scaled so that its largest number becomes this."""


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 [..., D], float32 scales [..., 1]) of x [..., D]: x ≈ e4m3 · scale, to 1/16 of each number that is above
    1/2²⁷ of its row's largest."""
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=1e-12)
    return (wide / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def product(x: Tensor, weight: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
    """x [..., D] times the transpose of a quantised weight [K, D], plus bias [K]: [..., K] in the dtype of x."""
    (w8, w_scale), (x8, x_scale) = weight, quantised(x.reshape(-1, x.shape[-1]))
    if x.is_cuda:
        y = torch._scaled_mm(x8, w8.t(), scale_a=x_scale, scale_b=w_scale.t(), out_dtype=torch.bfloat16).to(x.dtype)
    else:
        y = ((x8.float() @ w8.float().t()) * x_scale * w_scale.t()).to(x.dtype)
    return (y if bias is None else y + bias).unflatten(0, x.shape[:-1])


class Fp8Products:
    """A context in which the linear layers of `model`'s blocks multiply in e4m3; it gives no gradients.

    Entering it quantises the weights as they are then, into buffers that stay where they are: captured steps read them.
    Adapters of LoRA keep their precision.

    Raises:
        UserError: on entering, for a GPU without 8-bit products, a model without known blocks, layers whose sizes are
            no multiples of 16 (on a GPU), or weights that are spread over ranks or already quantised.
    """

    def __init__(self, model: MaskedModel):
        self.model = model
        self._weights: dict[str, tuple[Tensor, Tensor]] = {}
        self._depth = 0

    def layers(self) -> dict[str, nn.Linear]:
        """The layers whose products are done in e4m3, by name."""
        found = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
            and any(f".{target}." in f".{name}." for target in self.model.lora_targets)
            and "lora_" not in name
        }
        if not found:
            raise UserError(
                f"{self.model.family} names no linear layers for fp8 products: use the model's own precision"
            )
        return found

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        try:
            for name, layer in self.layers().items():
                self._refresh(name, layer)
                layer.__dict__["forward"] = partial(product, weight=self._weights[name], bias=layer.bias)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            for layer in self.layers().values():
                layer.__dict__.pop("forward", None)

    @torch.no_grad()
    def _refresh(self, name: str, layer: nn.Linear) -> None:
        weight = layer.weight
        if type(weight.data) is not Tensor or not weight.is_floating_point():
            raise UserError(
                f"{name}: fp8 products need its whole weight in floating point, found {type(weight.data).__name__} of "
                f"{str(weight.dtype).removeprefix('torch.')}; use shard=none or optimizer, and no quantised base"
            )
        if weight.is_cuda:
            _check_device(weight.device)
            if any(size % 16 for size in weight.shape):
                raise UserError(f"{name}: a weight of {tuple(weight.shape)}: fp8 products need multiples of 16")
        new = quantised(weight)
        held = self._weights.get(name)
        if held is None or held[0].device != weight.device:
            self._weights[name] = new
            return
        for kept, value in zip(held, new, strict=True):
            kept.copy_(value)


def _check_device(device: torch.device) -> None:
    found = torch.cuda.get_device_capability(device)
    if found < (8, 9):
        raise UserError(
            f"fp8 products need a GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell), this one has "
            f"{found[0]}.{found[1]}: use the model's own precision"
        )
