"""Embedding and head of the whole vocabulary for rows that speak of different concepts.

Every concept has ids of its own after the special ids, so a row's ids mean what they mean under its concept: text and
special ids, the concept's rows, then codes and the mask moved up by their number. The base weights are shared and not
copied; a concept is its few rows beside them.

Shape suffixes: B rows, C concepts, M most rows of a concept, D width, V base vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..concept_tokens import ConceptTokens

if TYPE_CHECKING:
    from .model import Showo

SKINNY_ROWS = 9
"""Up to so many rows a CPU goes through a large head faster as W·xᵀ than as x·Wᵀ (docs/measured-facts.md)."""


class TextVocabulary:
    """The vocabulary of `model` under each of `concepts` (None: without one). What it gives has no gradients.

    Hidden states are taken in at least float32; logits are as wide as the vocabulary of the largest concept, −inf past
    the end of a smaller one.
    """

    def __init__(self, model: Showo, concepts: Sequence[ConceptTokens | None]):
        self.model = model
        head = model.showo.lm_head
        self._weight, self._bias = _exact(head.weight.detach()), _exact(head.bias.detach())
        self._first = model.config.first_code_id
        counts = [0 if concept is None else concept.num_tokens for concept in concepts]
        most = max(counts)
        self.width = self._weight.shape[0] + most
        self._mixed = min(counts) != most
        device, shape = model.device, (len(counts), most)
        self._counts_C = torch.tensor(counts, device=device)
        self._embed_CMD = torch.zeros(*shape, model.config.hidden_size, dtype=model.dtype, device=device)
        self._weight_CMD = torch.zeros_like(self._embed_CMD, dtype=self._weight.dtype)
        self._bias_CM = torch.full(shape, -torch.inf, dtype=self._weight.dtype, device=device)
        for place, concept in enumerate(concepts):
            if concept is not None:
                rows = slice(0, concept.num_tokens)
                self._embed_CMD[place, rows] = concept.embed.detach().to(self._embed_CMD)
                self._weight_CMD[place, rows] = concept.head_weight.detach().to(self._weight_CMD)
                self._bias_CM[place, rows] = concept.head_bias.detach().to(self._bias_CM)
        self._source_CW = self._sources(counts) if self._mixed else None

    def _sources(self, counts: list[int]) -> Tensor:
        """Where each column comes from in [base, the concept's rows, −inf]."""
        base, most = self._weight.shape[0], self.width - self._weight.shape[0]
        rows = []
        for count in counts:
            own = torch.arange(base, base + count)
            past = torch.full((most - count,), base + most)
            rows.append(torch.cat([torch.arange(self._first), own, torch.arange(self._first, base), past]))
        return torch.stack(rows).to(self._weight.device)

    def embed(self, ids_B: Tensor, concept_B: Tensor) -> Tensor:
        """Embeddings [B, D] of ids int64 [B], each of its row's concept."""
        first, most = self._first, self._embed_CMD.shape[1]
        table = self.model.showo.model.embed_tokens
        if most == 0:
            return table(ids_B)
        count_B = self._counts_C[concept_B]
        moved = ids_B >= first + count_B
        base = table(torch.where(moved, ids_B - count_B, ids_B.clamp(max=first - 1)))
        own = self._embed_CMD[concept_B, (ids_B - first).clamp(0, most - 1)]
        return torch.where(((ids_B >= first) & ~moved)[:, None], own, base)

    def logits(self, hidden_BD: Tensor, concept_B: Tensor) -> Tensor:
        """Logits [B, V + M] of hidden states [B, D], each of its row's concept."""
        hidden = _exact(hidden_BD)
        if hidden.device.type == "cpu" and hidden.shape[0] <= SKINNY_ROWS:
            base = torch.addmm(self._bias[:, None], self._weight, hidden.T).T
        else:
            base = F.linear(hidden, self._weight, self._bias)
        if self.width == self._weight.shape[0]:
            return base
        own = torch.baddbmm(self._bias_CM[concept_B][:, None], hidden[:, None], self._weight_CMD[concept_B].mT)[:, 0]
        if self._source_CW is None:
            return torch.cat([base[:, : self._first], own, base[:, self._first :]], dim=1)
        end = base.new_full((base.shape[0], 1), -torch.inf)
        return torch.cat([base, own, end], dim=1).gather(1, self._source_CW[concept_B])


def _exact(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
