"""Tensors that all microbatches of an update share, cut from their graph: heads that learn, and prompts computed once.

A microbatch works on leaves; their gradients add up over the microbatches and go back through the graph once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models import Prefix


class Leaves:
    """Tensors cut from their graph. Calling it gives them for one microbatch of an update; `backward` sends what all
    microbatches asked of them back through the graph, once. Tensors without a graph are passed on as they are.

    Gradients add up in float32, whatever the tensors' own precision: hundreds of microbatches would drown in bfloat16.
    """

    def __init__(self, *tensors: Tensor):
        self._live = tensors
        self._sums = [t.detach().to(exact(t)).requires_grad_() if t.requires_grad else t for t in tensors]

    def __call__(self) -> list[Tensor]:
        """The tensors in their own precision, for one microbatch."""
        return [total.to(live.dtype) for live, total in zip(self._live, self._sums, strict=True)]

    @property
    def leaves(self) -> list[Tensor]:
        """Where the gradients of the microbatches add up."""
        return [total for live, total in zip(self._live, self._sums, strict=True) if live.requires_grad]

    def backward(self) -> None:
        pairs = [
            (live, total.grad.to(live.dtype))
            for live, total in zip(self._live, self._sums, strict=True)
            if live.requires_grad and total.grad is not None
        ]
        if pairs:
            torch.autograd.backward([live for live, _ in pairs], [gradient for _, gradient in pairs])


class PrefixLeaves:
    """:class:`Leaves` for the tensors of prompts, and for further tensors of the same graph."""

    def __init__(self, prefix: Prefix, *others: Tensor):
        self._prefix, self._own = prefix, len(prefix.tensors())
        self._leaves = Leaves(*prefix.tensors(), *others)

    def __call__(self) -> tuple[Prefix, list[Tensor]]:
        """(prompts, the other tensors) for one microbatch."""
        flat = self._leaves()
        return self._prefix.with_tensors(flat[: self._own]), flat[self._own :]

    @property
    def leaves(self) -> list[Tensor]:
        """Where the gradients of the microbatches add up."""
        return self._leaves.leaves

    def backward(self) -> None:
        self._leaves.backward()


def exact(tensor: Tensor) -> torch.dtype:
    """The precision in which sums over `tensor` are formed."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
