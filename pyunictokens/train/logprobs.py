"""Log-probs of tokens under the heads, formed so that small trainables stay small, and heads cut from their graph.

The text head is the base head with a concept's rows in the middle. Gluing them together would need a gradient of the
whole vocabulary to train 25 rows; here the two parts meet in their log-sum-exp instead. A head that learns is cut into
leaves, so that the pieces of an update add to one gradient and go back through the graph once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..models import PromptKV, Showo


class Leaves:
    """Tensors cut from their graph. Calling it gives them for one piece of an update; `backward` sends what all pieces
    asked of them back through the graph, once. Tensors without a graph are passed on as they are.

    Gradients add up in float32, whatever the tensors' own precision: hundreds of pieces would drown in bfloat16.
    """

    def __init__(self, *tensors: Tensor):
        self._live = tensors
        self._sums = [t.detach().to(exact(t)).requires_grad_() if t.requires_grad else t for t in tensors]

    def __call__(self) -> list[Tensor]:
        """The tensors in their own precision, for one piece."""
        return [total.to(live.dtype) for live, total in zip(self._live, self._sums, strict=True)]

    @property
    def leaves(self) -> list[Tensor]:
        """Where the gradients of the pieces add up."""
        return [total for live, total in zip(self._live, self._sums, strict=True) if live.requires_grad]

    def backward(self) -> None:
        pairs = [
            (live, total.grad.to(live.dtype))
            for live, total in zip(self._live, self._sums, strict=True)
            if live.requires_grad and total.grad is not None
        ]
        if pairs:
            torch.autograd.backward([live for live, _ in pairs], [gradient for _, gradient in pairs])


class PromptLeaves:
    """:class:`Leaves` for the keys and values of prompts, and for further tensors of the same graph."""

    def __init__(self, prompts: PromptKV, *others: Tensor):
        self._prompts, self._layers = prompts, len(prompts.keys[0])
        flat = [tensor for part in (prompts.keys, prompts.values) for layers in part for tensor in layers]
        self._leaves = Leaves(*flat, *others)

    def __call__(self) -> tuple[PromptKV, list[Tensor]]:
        """(keys and values, the other tensors) for one piece."""
        flat = self._leaves()
        count, layers = len(self._prompts), self._layers
        rows = [flat[start * layers : (start + 1) * layers] for start in range(2 * count)]
        return PromptKV(rows[:count], rows[count:], self._prompts.next_position), flat[2 * count * layers :]

    @property
    def leaves(self) -> list[Tensor]:
        """Where the gradients of the pieces add up."""
        return self._leaves.leaves

    def backward(self) -> None:
        self._leaves.backward()


def exact(tensor: Tensor) -> torch.dtype:
    """The precision in which sums over `tensor` are formed."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def text_parts(model: Showo) -> tuple[Tensor, Tensor, Tensor, Tensor] | tuple[Tensor, Tensor]:
    """(weight [V, D], bias [V]) of the base head and, with a concept attached, its (weight [n, D], bias [n])."""
    head = model.showo.lm_head
    if model.concept is None:
        return head.weight, head.bias
    return head.weight, head.bias, model.concept.head_weight, model.concept.head_bias


def text_logprob(
    model: Showo, hidden: Tensor, target: Tensor, *, temperature: float = 1.0, parts: tuple[Tensor, ...] | None = None
) -> Tensor:
    """log p(target) under the full distribution of text, special, concept and code tokens; fp32, shaped like `target`.

    hidden [..., D], target int64 [...] of the model's own ids (the concept's in their place). Equals
    ``log_softmax(F.linear(hidden, *model.text_head()) / temperature)[target]``.
    """
    weight, bias, *new = text_parts(model) if parts is None else parts
    if not new:
        return ops.selected_logprob(hidden, weight, target, bias, temperature=temperature)
    new_weight, new_bias = new
    first, count = model.config.first_code_id, new_weight.shape[0]
    is_new = (target >= first) & (target < first + count)
    base = torch.where(is_new, 0, torch.where(target >= first + count, target - count, target))
    precise = hidden if hidden.dtype == torch.float64 else hidden.float()
    logit = (precise * F.embedding(base, weight).to(precise.dtype)).sum(-1) + bias[base].to(precise.dtype)
    logit = logit / temperature
    base_logp = ops.selected_logprob(hidden, weight, base, bias, temperature=temperature)
    new_logits = F.linear(precise, new_weight.to(precise.dtype), new_bias.to(precise.dtype)) / temperature
    total = torch.logaddexp(logit - base_logp, new_logits.logsumexp(-1))
    own = new_logits.gather(-1, (target - first).clamp(0, count - 1)[..., None])[..., 0]
    return torch.where(is_new, own, logit) - total
