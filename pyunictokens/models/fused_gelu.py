"""A linear layer and its tanh-GELU in one product, where no gradient is formed: GELU in the product's epilogue.

torch has it as a private function, `torch._addmm_activation`: on a GPU the epilogue of cuBLASLt, with the GELU that
tanh approximates; on a CPU it computes the GELU of erf, another function. So before it is used on a device it is asked
for GELUs that are known, and where it is missing or gives others the two operations run one after the other; the log
and `pyunictokens doctor` say which. Besides the two passes over the inner width that it saves, it leaves out one
rounding: GELU is taken of the float32 sum, not of that sum in 16 bits.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..ops.gelu import tanh_gelu

log = logging.getLogger(__name__)

NEAR = 1e-3
"""How far its GELU may be from that of tanh besides rounding: a GPU's own tanh is good to 2⁻¹¹."""

_found: dict[tuple[torch.device, torch.dtype], str] = {}
"""What :func:`_what_is_wrong` found."""


def linear_gelu(layer: nn.Module, x: Tensor, fused: bool | None = None) -> Tensor:
    """tanh-GELU of layer(x): float [..., D] to [..., I]. In one product where that is possible, else in two steps.

    Gradients, and layers that are more than their weights (LoRA, fp8, four bits, spread over ranks, with hooks) take
    two steps; so does torch.compile, unless it is told by `fused` what :func:`is_fused` said before.
    """
    if is_fused(layer, x) if fused is None else fused:
        assert isinstance(layer, nn.Linear) and layer.bias is not None
        rows = x.reshape(-1, x.shape[-1])
        made: Tensor = _product_gelu(rows, layer.weight, layer.bias)
        return made.view(*x.shape[:-1], made.shape[-1])
    return tanh_gelu(layer(x))


def is_fused(layer: nn.Module, x: Tensor) -> bool:
    """Whether layer(x) and its GELU are one product."""
    return is_plain(layer, x) and _fused(x.device, x.dtype)


def _product_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # torch.compile would take torch's function apart into product and GELU
        return _opaque(x, weight, bias)
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


@torch.library.custom_op(
    "pyunictokens::product_gelu", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor bias) -> Tensor"
)
def _opaque(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


@_opaque.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def gelu_way(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> tuple[str, str]:
    """("fused" or "plain", why): how the first product of an MLP and its GELU run on `device` without gradients."""
    wrong = _what_is_wrong(device, dtype)
    return ("plain", wrong) if wrong else ("fused", "GELU is part of the product where no gradient is formed")


def is_plain(layer: nn.Module, x: Tensor) -> bool:
    """Whether layer(x) is x · weightᵀ + bias and nothing else, and no gradient is formed."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(layer) is not nn.Linear:
        return False
    changed = "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks
    weight, bias = layer.weight, layer.bias
    whole = bias is not None and type(weight.data) is type(x) and weight.dtype == bias.dtype == x.dtype
    return whole and not changed and x.numel() > 0


def _fused(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda":  # see above
        return False
    if (device, dtype) not in _found and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return False  # asking waits for the device; steps are run before they are captured, so this is met by no one
    return not _what_is_wrong(device, dtype)


def _what_is_wrong(device: torch.device, dtype: torch.dtype) -> str:
    """Why `torch._addmm_activation` cannot stand for product and tanh-GELU on `device`; empty if it can. Asked once."""
    if (device, dtype) in _found:
        return _found[device, dtype]
    try:
        with unset_fake_temporarily(), torch.no_grad():
            x, found = _asked(device, dtype)
    except Exception as error:
        reason = f"torch's product with GELU cannot be used ({type(error).__name__}: {str(error).splitlines()[0]})"
    else:
        wanted, other = F.gelu(x, approximate="tanh"), F.gelu(x)
        near = (found - wanted).abs() <= torch.finfo(dtype).eps * wanted.abs() + NEAR
        apart = (x > -3.5) & (x < -2.25)  # there the two GELUs differ by more than 16 bits round
        is_tanh = (found - wanted)[apart].abs().mean() < (found - other)[apart].abs().mean()
        reason = "" if bool(near.all() & is_tanh) else "torch's product with GELU computes another GELU here"
    if reason and device.type == "cuda":
        log.warning("%s: product and GELU run one after the other in %s", reason, dtype)
    _found[device, dtype] = reason
    return reason


def _asked(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x, what it gives for x), float64 on the host, for numbers from −4 to 4 that are exact in 16 bits."""
    values = torch.arange(-64, 64, device=device, dtype=dtype).reshape(8, 16) / 16
    identity, bias = torch.eye(16, device=device, dtype=dtype), torch.full((16,), 0.0625, device=device, dtype=dtype)
    found = torch._addmm_activation(bias, values, identity.t(), use_gelu=True)
    return values.double().cpu() + 0.0625, found.double().cpu()
