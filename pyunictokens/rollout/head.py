"""The head of the codes in a rollout: logits in float32 from hidden states of the model's precision, guidance included.

    float32   (W·((1 + s)·h − s·u) + b): hidden states are widened and guided, then one float32 product
    16bit     (1 + s)·(W·h) − s·(W·u) + b: two products of the 16-bit numbers as they are, summed in float32

h are the hidden states with the prompt, u those without. Both are the same numbers up to the order of float32 sums,
because a product of two 16-bit numbers is exact in float32: with D the width and ε = 2⁻²⁴, either is within
(D + 4)·ε·((1 + s)·Σ|W||h| + s·Σ|W||u| + |b|) of the truth. On a GPU 16-bit products run on tensor cores, float32 ones
do not; a CPU has no 16-bit product with a float32 result, so there the first form is the fast one.

Shape suffixes: B rows, G rows that are guided (the first ones), N image codes, D width, K codebook.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import MaskedModel
from ..utils.errors import UserError

HeadKind = Literal["auto", "float32", "16bit"]
HEADS: Final = ("auto", "float32", "16bit")
NARROW: Final = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class GuidedStates:
    """Hidden states of some rows as the model gives them, and how they are guided."""

    cond_BND: Tensor
    uncond_GND: Tensor | None = None
    """Without the prompt, of the first G rows; None where no row is guided."""
    strength: float | Tensor = 0.0
    """s in (1 + s)·cond − s·uncond: of all G rows, or float64 [G] on the host, one a row."""

    def __len__(self) -> int:
        return len(self.cond_BND)

    def part(self, start: int, stop: int) -> GuidedStates:
        """Rows start … stop − 1."""
        uncond = None if self.uncond_GND is None else self.uncond_GND[start:stop]
        strength = self.strength[start:stop] if isinstance(self.strength, Tensor) else self.strength
        return GuidedStates(self.cond_BND[start:stop], uncond if uncond is not None and len(uncond) else None, strength)

    def scales(self) -> tuple[float | Tensor, float | Tensor]:
        """(1 + s, s), as numbers or as [G, 1, 1] in the precision of :func:`exact`, on the device."""
        if not isinstance(self.strength, Tensor):
            return 1 + self.strength, self.strength
        s, like = self.strength[:, None, None], self.cond_BND
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return (1 + s).to(like.device, dtype), s.to(like.device, dtype)


class CodeHead:
    """Logits [B, N, K] of the codes, at least float32, by one of the forms above.

    Args:
        model: whose `image_head` it is.
        kind: "float32", "16bit", or "auto": 16bit where model and head are of 16 bits and lie on a GPU.
        keep: hold the weights as they are now, converted once; otherwise they are read anew at every call, as a
            captured step must.

    Raises:
        UserError: an unknown kind, or "16bit" for a model of another precision.
    """

    def __init__(self, model: MaskedModel, kind: str = "auto", *, keep: bool = False):
        self.kind = check_head(model, kind)
        weight = model.image_head()[0]
        narrow = weight.dtype in NARROW and weight.dtype == model.dtype
        self.narrow = kind == "16bit" or (kind == "auto" and narrow and weight.is_cuda)
        self.entries = len(weight)
        self._model = model
        self._kept = self._read() if keep else None

    def _read(self) -> tuple[Tensor, Tensor | None]:
        """(weight, bias): the weight as the products take it, the bias in the precision of the logits."""
        weight, bias = (None if part is None else part.detach() for part in self._model.image_head())
        assert weight is not None
        return weight if self.narrow and weight.is_cuda else exact(weight), None if bias is None else exact(bias)

    def __call__(self, states: GuidedStates) -> Tensor:
        weight, bias = self._kept or self._read()
        cond, uncond = states.cond_BND, states.uncond_GND
        more, less = states.scales()
        if not self.narrow:
            hidden = exact(cond)
            if uncond is not None:
                guided = more * hidden[: len(uncond)] - less * exact(uncond)
                hidden = guided if len(uncond) == len(hidden) else torch.cat([guided, hidden[len(uncond) :]])
            return F.linear(hidden, weight, bias)
        rows, count, width = cond.shape
        if uncond is None:
            logits = _product(cond.reshape(-1, width), weight)
        elif len(uncond) == rows and not isinstance(more, Tensor) and not isinstance(less, Tensor):
            logits = _product(uncond.reshape(-1, width), weight)
            _add_product(logits, cond.reshape(-1, width), weight, beta=-less, alpha=more)
        else:
            logits = _product(cond.reshape(-1, width), weight)
            without = _product(uncond.reshape(-1, width), weight)
            logits.unflatten(0, (rows, count))[: len(uncond)].mul_(more).sub_(
                without.unflatten(0, (len(uncond), count)).mul_(less)
            )
        if bias is not None:
            logits += bias
        return logits.unflatten(0, (rows, count))


def check_head(model: MaskedModel, kind: str) -> HeadKind:
    """`kind`, if this model's head can be applied so."""
    if kind not in HEADS:
        raise UserError(f"head={kind!r}: must be one of {', '.join(HEADS)}")
    dtypes = {model.dtype, model.image_head()[0].dtype} if kind == "16bit" else set()
    if len(dtypes) > 1 or not dtypes <= set(NARROW):
        found = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise UserError(f"head=16bit: this model computes in {found}; load it in bfloat16, or use head=auto")
    return cast(HeadKind, kind)


def exact(values: Tensor) -> Tensor:
    """At least float32: guidance, head and softmax of half-precision models run there."""
    return values if values.dtype == torch.float64 else values.float()


def _product(x_MD: Tensor, weight_KD: Tensor) -> Tensor:
    """x·Wᵀ, 16-bit numbers summed in float32, to float32 [M, K]. On a CPU the weight comes widened already."""
    if x_MD.is_cuda:
        return torch.mm(x_MD, weight_KD.t(), out_dtype=torch.float32)
    return x_MD.float() @ weight_KD.t()


def _add_product(out_MK: Tensor, x_MD: Tensor, weight_KD: Tensor, beta: float, alpha: float) -> None:
    """out = beta·out + alpha·x·Wᵀ in place: on a GPU guidance is part of the product's epilogue."""
    if x_MD.is_cuda:
        torch.addmm(out_MK, x_MD, weight_KD.t(), out_dtype=torch.float32, beta=beta, alpha=alpha, out=out_MK)
    else:
        out_MK.addmm_(x_MD.float(), weight_KD.t(), beta=beta, alpha=alpha)
