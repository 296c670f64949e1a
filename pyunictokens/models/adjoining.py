"""Several linear layers of one input as one product, where no gradient is formed: the input is read once.

Their weights lie one behind another in memory, each parameter a view of its own rows, so nothing is stored twice and
nothing has to be kept in step: what an optimizer, a loaded checkpoint or a moving average writes into the parameters is
what the product reads, in captured steps too. Names, shapes and files of parameters stay as they are. Where something
has put parameters elsewhere, or a layer is more than its weights, the layers multiply one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fused_gelu import is_plain

Whole: TypeAlias = tuple[Tensor, Tensor]
"""(weight [ΣK, D], bias [ΣK]) of several layers."""

DEVICES = ("cuda",)
"""Types of devices where layers multiply together. On a CPU little is gained (docs/measured-facts.md), and a rollout's
log-probs there are to be rounded as those of the update."""


@torch.no_grad()
def adjoin(layers: Sequence[nn.Module]) -> None:
    """Put the weights of `layers` one behind another, and their biases; numbers and parameters stay the same.

    Layers that are no plain `nn.Linear` of one width, dtype and device with a bias, or whose weights are no plain
    tensors, stay as they are.
    """
    plain = [layer for layer in layers if type(layer) is nn.Linear]
    if len(plain) < len(layers) or not all(type(part) is Tensor for layer in plain for part in _parts(layer)):
        return
    if len({(layer.weight.dtype, layer.weight.device, layer.in_features) for layer in plain}) > 1:
        return
    if plain[0].weight.is_meta or together(plain) is not None:
        return
    sizes = [layer.out_features for layer in plain]
    for name in ("weight", "bias"):
        made = torch.cat([getattr(layer, name).data for layer in plain])
        for layer, rows in zip(plain, made.split(sizes), strict=True):
            getattr(layer, name).data = rows


def _parts(layer: nn.Linear) -> tuple[Tensor | None, Tensor | None]:
    return layer.weight.data, None if layer.bias is None else layer.bias.data


def together(layers: Sequence[nn.Linear]) -> Whole | None:
    """(weight [ΣK, D], bias [ΣK]) of all layers, as views of their parameters; None where these do not adjoin."""
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    if not (_adjoin(weights) and _adjoin(biases)):
        return None
    rows = sum(len(weight) for weight in weights)
    return (
        torch.as_strided(weights[0].detach(), (rows, weights[0].shape[1]), weights[0].stride()),
        torch.as_strided(biases[0].detach(), (rows,), (1,)),
    )


def _adjoin(tensors: Sequence[Tensor]) -> bool:
    """Whether contiguous tensors lie one behind another in one storage."""
    storage, place = tensors[0].untyped_storage()._cdata, tensors[0].storage_offset()
    for tensor in tensors:
        if tensor.untyped_storage()._cdata != storage or tensor.storage_offset() != place or not tensor.is_contiguous():
            return False
        place += tensor.numel()
    return True


def all_of(layers: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """layer(x) of each layer: float [..., D] to [..., K]. In one product where that is possible, as views of it."""
    whole = whole_of(layers, x)
    return tuple(layer(x) for layer in layers) if whole is None else in_one(layers, x, whole)


def whole_of(layers: Sequence[nn.Module], x: Tensor) -> Whole | None:
    """The layers as one, where their products with `x` may be one."""
    if x.device.type not in DEVICES or not all(is_plain(layer, x) for layer in layers):
        return None
    return together([layer for layer in layers if isinstance(layer, nn.Linear)])


def in_one(layers: Sequence[nn.Module], x: Tensor, whole: Whole) -> tuple[Tensor, ...]:
    """layer(x) of each layer from the one product with all of them."""
    return F.linear(x, *whole).split([layer.out_features for layer in layers if isinstance(layer, nn.Linear)], dim=-1)
