"""Weights of six bits a number, with a scale a row: three eighths of half precision, for models that a package carries.

    NAME.packed  uint8 [3 · ceil(n / 4)]   four numbers in three bytes, the first in the lowest bits
    NAME.scale   float16 [rows]            a number is (bits − 31) · scale of its row
    NAME.shape   int64 [dims]

Rows are those of the first dimension. Tensors of one dimension, and small ones, stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..utils.errors import UserError

_MIDDLE = 31
_LEAST = 1024
"""Tensors of fewer numbers are not packed."""
_ENDS = (".packed", ".scale", ".shape")


def pack(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` as a file holds them; what is not packed becomes float16 where it is a floating number."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        if value.ndim < 2 or value.numel() < _LEAST or not value.is_floating_point():
            found[name] = value.half() if value.is_floating_point() else value
            continue
        rows = value.detach().float().flatten(1)
        scale = (rows.abs().amax(1) / _MIDDLE).clamp(min=1e-7).half()
        bits = ((rows / scale.float()[:, None]).round().clamp(-_MIDDLE, _MIDDLE) + _MIDDLE).to(torch.uint8).flatten()
        four = torch.nn.functional.pad(bits, (0, -len(bits) % 4)).view(-1, 4).int()
        whole = four[:, 0] | four[:, 1] << 6 | four[:, 2] << 12 | four[:, 3] << 18
        three = torch.stack([whole & 255, whole >> 8 & 255, whole >> 16], 1).to(torch.uint8)
        found |= {
            f"{name}.packed": three.flatten(),
            f"{name}.scale": scale,
            f"{name}.shape": torch.tensor(value.shape),
        }
    return found


def unpack(tensors: Mapping[str, Tensor], origin: object) -> dict[str, Tensor]:
    """The weights that :func:`pack` was given, to six bits, packed ones as float32. Raises UserError naming `origin`
    where parts of one are missing or do not fit each other."""
    names = [name.removesuffix(".packed") for name in tensors if name.endswith(".packed")]
    found = {key: value for key, value in tensors.items() if not any(key == n + end for n in names for end in _ENDS)}
    for name in names:
        packed, scale, shape = (tensors.get(name + end) for end in _ENDS)
        if scale is None or shape is None:
            raise UserError(f"{origin}: {name}: its scale or shape is missing")
        if shape.is_floating_point() or shape.is_complex():
            raise UserError(f"{origin}: {name}: its shape must be whole numbers, is {shape.dtype}")
        sizes = [int(size) for size in shape.flatten()[:8]]
        count = math.prod(sizes)
        fits = packed is not None and packed.dtype == torch.uint8 and len(sizes) > 1 and min(sizes) > 0
        if packed is None or not fits or packed.numel() != 3 * -(-count // 4) or scale.numel() != sizes[0]:
            raise UserError(f"{origin}: {name}: its packed numbers do not fit its shape {sizes}")
        three = packed.flatten().view(-1, 3).int()
        whole = three[:, 0] | three[:, 1] << 8 | three[:, 2] << 16
        four = torch.stack([whole & 63, whole >> 6 & 63, whole >> 12 & 63, whole >> 18], 1)
        rows = (four.flatten()[:count].view(sizes[0], -1) - _MIDDLE).float() * scale.float().view(-1, 1)
        found[name] = rows.view(sizes)
    return found
