"""Base weights of four bits (NF4 of bitsandbytes) under adapters of LoRA: an eighth of float32, a quarter of bfloat16.

The linear layers that adapters may go to are replaced by bitsandbytes' `Linear4bit`: blocks of 64 numbers share one
float32 scale, products are done in the precision the model had (QLoRA: Dettmers et al., 2023). Embeddings, norms and
heads keep their precision. The quantised weights are what adapters learn on and what the reference policy is.
"""

from __future__ import annotations

import torch
from torch import nn

from ..utils.errors import UserError, needs
from .base import MaskedModel

BITS = 4 + 32 / 64
"""Of one number, its share of the scale counted."""


def quantise_base(model: MaskedModel) -> None:
    """Put four bits in the place of each linear layer's weight that `model.lora_targets` names, on its device.

    Raises:
        MissingExtra: without bitsandbytes.
        UserError: a model that takes no adapters.
    """
    with needs("quant"):
        from bitsandbytes.nn import Linear4bit, Params4bit

    targets = [
        (parent, child, layer)
        for name, parent in model.named_modules()
        for child, layer in parent.named_children()
        if isinstance(layer, nn.Linear)
        and any(f".{name}.{child}".endswith(f".{target}") for target in model.lora_targets)
    ]
    if not targets:
        raise UserError(f"{model.family} takes no adapters, so its weights stay as they are: set lora.base=same")
    for parent, child, layer in targets:
        weight, sizes = layer.weight.data, (layer.in_features, layer.out_features)
        quantised = Linear4bit(*sizes, layer.bias is not None, compute_dtype=weight.dtype, device="meta")
        quantised.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False)
        quantised.bias = layer.bias
        setattr(parent, child, quantised.to(weight.device))
    model.__dict__["is_loaded_in_4bit"] = True  # peft's sign


def is_quantised(layer: nn.Module) -> bool:
    """Whether `layer` is one of those that :func:`quantise_base` made."""
    return type(layer).__name__ == "Linear4bit"


@torch.no_grad()
def unpacked(layer: nn.Linear) -> nn.Linear:
    """A plain layer with the weights that a quantised one computes with."""
    with needs("quant"):
        from bitsandbytes.functional import dequantize_4bit

    state = layer.weight.quant_state  # type: ignore[attr-defined]  # of bitsandbytes' kind of parameter
    weight = dequantize_4bit(layer.weight.data, state)
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = layer.bias
    return plain
