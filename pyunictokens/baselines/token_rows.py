"""A concept's tokens in a language model of transformers: a few rows beside its frozen embedding and head.

Published recipes (Yo'LLaVA, MC-LLaVA, Yo'Chameleon) train both whole matrices and put all other rows back after each
step. AdamW treats every number by itself, so the rows alone give the same result with nothing to put back.

    DIR/tokens.safetensors      embed [n, D], head [n, D]; as metadata the tokens, in order

Letters: n rows, D width of the model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.checkpoint import load_tensors
from ..utils.errors import UserError
from ..utils.files import save_safetensors_atomic

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

FILE = "tokens.safetensors"


class LanguageModel(Protocol):
    """What is called of a model of transformers."""

    config: PretrainedConfig

    def get_input_embeddings(self) -> nn.Embedding: ...
    def get_output_embeddings(self) -> nn.Linear: ...
    def set_input_embeddings(self, value: nn.Module) -> None: ...
    def set_output_embeddings(self, value: nn.Module) -> None: ...
    def requires_grad_(self, requires_grad: bool = True) -> object: ...
    def resize_token_embeddings(self, new_num_tokens: int, *, mean_resizing: bool) -> object: ...


class TokenRows(nn.Module):
    """Rows for the tokens `ids` of `model`, put in place of those that its embedding and head have."""

    embed: nn.Parameter
    head: nn.Parameter

    def __init__(self, model: LanguageModel, tokens: Sequence[str], ids: Sequence[int]):
        super().__init__()
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        self.tokens, self.ids = list(tokens), list(ids)
        tied = head.weight is embedding.weight
        self.embed = nn.Parameter(embedding.weight.detach()[self.ids].clone())
        self.head = self.embed if tied else nn.Parameter(head.weight.detach()[self.ids].clone())
        model.requires_grad_(False)
        model.set_input_embeddings(_Embedding(embedding, self.ids, self.embed))
        model.set_output_embeddings(_Head(head, self.ids, self.head))

    def named(self) -> dict[str, nn.Parameter]:
        """What learns, by name; one table where embedding and head are tied."""
        return dict(self.named_parameters(remove_duplicate=True))

    def save(self, folder: Path) -> None:
        """Write DIR/tokens.safetensors, whole or not at all."""
        tensors = {"embed": self.embed, "head": self.head}
        save_safetensors_atomic(folder / FILE, tensors, {"tokens": json.dumps(self.tokens)})

    def restore(self, folder: Path) -> None:
        """Bring in what :meth:`save` wrote. Raises UserError for a file of other tokens or of another model."""
        file = folder / FILE
        tensors = load_tensors(file)
        with torch.no_grad():
            for name, value in (("embed", self.embed), ("head", self.head)):
                found = tensors.get(name)
                if found is None or found.shape != value.shape:
                    shape = "missing" if found is None else f"of shape {tuple(found.shape)}"
                    raise UserError(f"{file}: {name} is {shape}, the model needs {tuple(value.shape)}: another model?")
                value.copy_(found)


class _Embedding(nn.Module):
    """An embedding whose rows `ids` are a parameter of their own."""

    place: Tensor

    def __init__(self, base: nn.Embedding, ids: Sequence[int], rows: nn.Parameter):
        super().__init__()
        self.base, self.rows = base, rows
        place = torch.full((base.weight.shape[0],), -1, dtype=torch.int64, device=base.weight.device)
        place[list(ids)] = torch.arange(len(ids), device=place.device)
        self.register_buffer("place", place, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The frozen table; its rows of the concept are not used."""
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        place = self.place[ids]
        own = self.rows[place.clamp_min(0)]
        return torch.where((place >= 0)[..., None], own, self.base(ids))


class _Head(nn.Module):
    """A head whose rows `ids` are a parameter of their own."""

    ids: Tensor

    def __init__(self, base: nn.Linear, ids: Sequence[int], rows: nn.Parameter):
        super().__init__()
        self.base, self.rows = base, rows
        self.register_buffer("ids", torch.tensor(list(ids), device=base.weight.device), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The frozen table; its rows of the concept are not used."""
        return self.base.weight

    def forward(self, hidden: Tensor) -> Tensor:
        bias = None if self.base.bias is None else self.base.bias[self.ids]
        logits: Tensor = self.base(hidden)
        return logits.index_copy(-1, self.ids, F.linear(hidden, self.rows, bias))


def add_tokens(model: LanguageModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], seed: int) -> list[int]:
    """Ids of new `tokens`, after the tokenizer's own; their rows start from N(0, initializer_range), drawn by `seed`.

    Raises UserError where the tokenizer has one of them already: it would take another meaning.
    """
    taken = [token for token in tokens if token in tokenizer.get_vocab()]
    if taken:
        raise UserError(f"{taken[0]}: is a token of the model already: rename the concept")
    tokenizer.add_tokens(list(tokens))
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token] for token in tokens]
    table = model.get_input_embeddings().weight
    if max(ids) >= table.shape[0]:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    config = model.config.get_text_config()
    spread, generator = float(getattr(config, "initializer_range", 0.02)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            rows = torch.randn(len(ids), layer.weight.shape[1], generator=generator) * spread
            layer.weight[ids] = rows.to(layer.weight)
    return ids
