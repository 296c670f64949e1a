"""The llama-shaped body that LLaDA and MMaDA share: bidirectional, without biases, over one vocabulary of ids.

Module names are those of the published checkpoints (`model.transformer.…`), so their state dicts load key by key. Every
position sees every other, so the states of a prompt change with what follows it and are never kept: a prompt is its
ids, and each call computes whole sequences. Rows whose prompts differ in length are padded on the left and the padding
is hidden; positions are rotary, so only distances count and padding changes nothing.

Source: Nie et al., "Large Language Diffusion Models", 2025. What texts and images are made of is told in llada.py and
mmada.py.

Shape suffixes: B rows, L positions, P prompt positions, D width, H heads, E head width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..utils.errors import UserError
from ..utils.files import save_safetensors_atomic, write_json
from .base import MaskedModel
from .checkpoint import assign, load_state_dict, read_config, real_number, resolve, whole_number
from .costs import Cost, ModelCosts
from .prefix import Prefix
from .sdpa import attend

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj")
"""ff_out is left out: the head has the same name, and is read as a plain tensor."""
_KEY = "model.transformer."


@dataclass(frozen=True)
class BodyConfig:
    """Sizes and ids by the names of the published config.json. The defaults are LLaDA-8B's."""

    vocab_size: int = 126464
    """Rows of the embedding and of the head."""
    d_model: int = 4096
    n_heads: int = 32
    n_kv_heads: int = 32
    n_layers: int = 32
    mlp_hidden_size: int = 12288
    max_sequence_length: int = 4096
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    mask_token_id: int = 126336
    eos_token_id: int = 126081
    weight_tying: bool = False

    def __post_init__(self) -> None:
        if self.d_model % self.n_heads or self.n_heads % self.n_kv_heads or self.d_model // self.n_heads % 2:
            raise UserError(
                f"d_model={self.d_model}: must be n_heads={self.n_heads} times an even width, and n_heads a multiple "
                f"of n_kv_heads={self.n_kv_heads}"
            )
        for name, found in (("mask_token_id", self.mask_token_id), ("eos_token_id", self.eos_token_id)):
            if not 0 <= found < self.vocab_size:
                raise UserError(f"{name}={found}: must be an id below vocab_size={self.vocab_size}")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @classmethod
    def from_checkpoint(
        cls, config: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]], folder: Path
    ) -> BodyConfig:
        """Sizes from the weights' shapes; what shapes cannot say from config.json."""
        try:
            rows, width = shapes[f"{_KEY}wte.weight"]
            inner = shapes[f"{_KEY}blocks.0.ff_proj.weight"][0]
            keys = shapes[f"{_KEY}blocks.0.k_proj.weight"][0]
            layers = 1 + max(int(key.split(".")[3]) for key in shapes if key.startswith(f"{_KEY}blocks."))
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(f"{folder}: not a checkpoint of LLaDA's layout: {error} is missing") from None
        heads = whole_number(config, "n_heads", 32, folder)
        if width % heads or keys % (width // heads):
            raise UserError(f"{folder}: n_heads={heads} does not divide the width {width} of the weights")
        return cls(
            rows,
            width,
            heads,
            keys // (width // heads),
            layers,
            inner,
            whole_number(config, "max_sequence_length", 4096, folder),
            real_number(config, "rope_theta", 500000.0, folder),
            real_number(config, "rms_norm_eps", 1e-5, folder),
            whole_number(config, "mask_token_id", 126336, folder, least=0),
            whole_number(config, "eos_token_id", 126081, folder, least=0),
            weight_tying=f"{_KEY}ff_out.weight" not in shapes,
        )


class RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = _exact(x)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Block(nn.Module):
    def __init__(self, config: BodyConfig):
        super().__init__()
        width, narrow, inner = config.d_model, config.n_kv_heads * config.head_dim, config.mlp_hidden_size
        self.heads, self.groups = config.n_heads, config.n_heads // config.n_kv_heads
        self.head_dim = config.head_dim
        self.attn_norm, self.ff_norm = (RmsNorm(width, config.rms_norm_eps) for _ in range(2))
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, narrow, bias=False) for _ in range(2))
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(inner, width, bias=False)

    def forward(
        self, x_BLD: Tensor, cos: Tensor, sin: Tensor, allowed: Tensor | None, wanted: slice | None = None
    ) -> Tensor:
        """Of the positions `wanted`, all of them where it is None; every position is attended to in either case."""
        own = slice(None) if wanted is None else wanted
        h = self.attn_norm(x_BLD)
        q, k, v = (
            proj(its).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj, its in ((self.q_proj, h[:, own]), (self.k_proj, h), (self.v_proj, h))
        )
        q, k = _rotate(q, cos[own], sin[own]), _rotate(k, cos, sin)
        if self.groups > 1:
            k, v = (each.repeat_interleave(self.groups, dim=1) for each in (k, v))
        seen = attend(q, k, v, allowed)
        x = x_BLD[:, own] + self.attn_out(seen.transpose(1, 2).flatten(2))
        h = self.ff_norm(x)
        gate, up = self.ff_proj(h), self.up_proj(h)
        if torch.is_grad_enabled():
            return x + self.ff_out(F.silu(gate) * up)
        return self.ff_out(F.silu(gate, inplace=True).mul_(up)).add_(x)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class _Transformer(nn.Module):
    def __init__(self, config: BodyConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layers)])
        self.ln_f = RmsNorm(config.d_model, config.rms_norm_eps)
        if not config.weight_tying:
            self.ff_out = nn.Linear(config.d_model, config.vocab_size, bias=False)


class Body(nn.Module):
    """Ids to hidden states, and the head over all ids."""

    def __init__(self, config: BodyConfig):
        super().__init__()
        self.config = config
        self.transformer = _Transformer(config)

    def head(self) -> Tensor:
        """[V, D] of the last linear layer, which has no bias."""
        layer = self.transformer.wte if self.config.weight_tying else self.transformer.ff_out
        return layer.weight

    def encode(
        self,
        ids_BL: Tensor,
        hidden_BL: Tensor | None = None,
        recomputed: bool | int = 0,
        wanted: slice | None = None,
    ) -> Tensor:
        """Final hidden states [B, L, D] of ids int64 [B, L]. `hidden_BL` bool: padding that nobody sees. `recomputed`:
        how many layers are computed again in the backward pass, True for all. `wanted`: the positions to give, all
        where it is None; the last layer computes no others."""
        length, config = ids_BL.shape[1], self.config
        if length > config.max_sequence_length:
            raise UserError(
                f"a sequence of {length} positions: this model has {config.max_sequence_length}; use a shorter prompt, "
                "fewer new tokens or a smaller grid"
            )
        x = self.transformer.wte(ids_BL)
        rotation = _angles(length, config, x)
        allowed = None if hidden_BL is None else ~hidden_BL[:, None, None, :]
        again = config.n_layers if recomputed is True else int(recomputed)
        for place, block in enumerate(self.transformer.blocks):
            own = wanted if place == config.n_layers - 1 else None
            if place < again and torch.is_grad_enabled():
                x = checkpoint(block, x, *rotation, allowed, own, use_reentrant=False)
            else:
                x = block(x, *rotation, allowed, own)
        return self.transformer.ln_f(x)

    def after(
        self,
        prompts: Prefix,
        prompt_of_row: Sequence[int],
        own_BL: Tensor,
        recomputed: bool | int = 0,
        place: slice | None = None,
    ) -> Tensor:
        """Hidden states [B, L, D] at ids int64 [B, L] that follow each row's prompt of :func:`id_prefix`; of those in
        `place` alone where one is given."""
        device, rows = own_BL.device, [prompts.parts[prompt][0] for prompt in prompt_of_row]
        longest = max(len(row) for row in rows)
        first, end, _ = (place or slice(None)).indices(own_BL.shape[1])
        wanted = slice(longest + first, longest + end)
        if all(len(row) == longest for row in rows):
            ids = torch.cat([torch.stack(rows).to(device), own_BL], dim=1)
            return self.encode(ids, None, recomputed, wanted)
        before = torch.zeros(len(rows), longest, dtype=torch.int64, device=device)
        hidden = torch.zeros(len(rows), longest + own_BL.shape[1], dtype=torch.bool, device=device)
        for number, row in enumerate(rows):
            before[number, longest - len(row) :] = row
            hidden[number, : longest - len(row)] = True
        return self.encode(torch.cat([before, own_BL], dim=1), hidden, recomputed, wanted)

    def costs(self, codebook: int, count: int) -> WholeSequenceCosts:
        """A guess by the number of parameters, with the body's own depth. The embedding multiplies nothing."""
        config, weight = self.config, self.transformer.wte.weight
        total = sum(parameter.numel() for parameter in self.parameters()) - weight.numel()
        return WholeSequenceCosts(total, config.n_layers, config.d_model, codebook, count, weight.element_size())


class BodyModel(MaskedModel):
    """What all models over a :class:`Body` share."""

    model: Body
    lora_targets = LORA_TARGETS

    def shardable_layers(self) -> nn.ModuleList:
        return self.model.transformer.blocks

    @property
    def costs(self) -> ModelCosts:
        return self.model.costs(self.codebook_size, math.prod(self.grid))

    def identity(self) -> dict[str, object]:
        return {**super().identity(), "layers": self.model.config.n_layers}


class WholeSequenceCosts(ModelCosts):
    """:class:`ModelCosts` where each step computes its prompt again."""

    def prefill(self, tokens: int) -> Cost:
        return Cost()

    def image_step(self, rows: int, prompt: int, count: int, guided: bool) -> Cost:
        return super().image_step(rows, prompt, prompt + count, guided)

    def scoring_bytes(self, prompt: int, count: int, guided: bool) -> float:
        return super().scoring_bytes(prompt, prompt + count, guided)

    def activation_bytes(
        self, prompt: int, count: int, guided: bool, trainable: str, checkpointed_layers: int = 0
    ) -> float:
        return super().activation_bytes(prompt, prompt + count, guided, trainable, checkpointed_layers)


def id_prefix(prompts: Sequence[Sequence[int]], limit: int, device: torch.device) -> Prefix:
    """Prompts as their ids, at most `limit` each: nothing of them can be computed before what follows is known."""
    for prompt in prompts:
        if not 0 < len(prompt) <= limit:
            raise UserError(f"a prompt of {len(prompt)} ids: must have 1 to {limit}")
    return Prefix([[torch.tensor(list(prompt), device=device)] for prompt in prompts], [len(each) for each in prompts])


def read_body(
    path: str | os.PathLike[str], family: str
) -> tuple[Path, dict[str, object], BodyConfig, dict[str, Tensor]]:
    """(folder, config.json, sizes, weights) of a checkpoint of this layout: a folder or hub id, whole or sharded.
    Raises UserError where its config.json is of another family than `family`."""
    from .registry import refuse_others

    folder = resolve(path)
    refuse_others(folder, family)
    config: dict[str, object] = dict(read_config(folder))
    weights = load_state_dict(folder)
    sizes = BodyConfig.from_checkpoint(config, {key: tuple(each.shape) for key, each in weights.items()}, folder)
    return folder, config, sizes, weights


def filled(
    model: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype, device: str | torch.device, folder: Path
) -> None:
    """Put `weights` into `model`, which was made on the meta device; frozen and in eval mode."""
    assign(model, {key: value.to(device=device, dtype=dtype) for key, value in weights.items()}, folder)
    model.requires_grad_(False).eval()


def write_body(model: nn.Module, config: BodyConfig, folder: Path, about: Mapping[str, object]) -> None:
    """Write config.json with what it says `about` the model beside the sizes, and model.safetensors."""
    save_safetensors_atomic(folder / "model.safetensors", dict(model.state_dict()))
    write_json(folder / "config.json", {**about, **asdict(config), "embedding_size": config.vocab_size})


def _angles(length: int, config: BodyConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [L, E] in at least float32."""
    place = torch.arange(length, device=like.device, dtype=torch.float64)
    inverse = config.rope_theta ** (
        torch.arange(0, config.head_dim, 2, device=like.device, dtype=torch.float64) / -config.head_dim
    )
    angle = (place[:, None] * inverse).repeat(1, 2)
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return angle.cos().to(wide), angle.sin().to(wide)


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
