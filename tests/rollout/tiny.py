"""A tiny random Show-o with logits far from flat, a stand-in for the image tokenizer, noise that can be replayed."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from pyunictokens import RolloutEngine, ops
from pyunictokens.models import ImageTokenizer, Showo, ShowoConfig

CONFIG = ShowoConfig(
    vocab_size=50 + 10 + 24 + 1,
    llm_vocab_size=50,
    codebook_size=24,
    num_vq_tokens=9,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=128,
    bos_token_id=40,
    eos_token_id=41,
    max_text=12,
)
MAX_TEXT = CONFIG.max_text


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Showo:
    generator = torch.Generator().manual_seed(seed)
    model = Showo(dataclasses.replace(CONFIG, **changes)).to(dtype).requires_grad_(False)
    for name, parameter in sorted(model.named_parameters()):
        scale = 0.5 if name.startswith("showo.lm_head") else 0.25
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
        parameter.copy_(noise + (1.0 if "layernorm.weight" in name else 0.0))
    return model


class CodesAsPixels(ImageTokenizer):
    """Stands in for MagvitV2: a picture whose every pixel is its code, so that a scorer can read the codes back."""

    downsampling, codebook_size = 1, CONFIG.codebook_size

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.decoded = 0

    def decode(self, codes: Tensor, shape: tuple[int, int]) -> Tensor:
        assert int(codes.min()) >= 0, "an unknown code reached the tokenizer"
        self.decoded += len(codes)
        return codes.float().unflatten(1, shape)[:, None].expand(-1, 3, -1, -1)

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels[:, 0].flatten(1).long()


def tiny_engine(model: Showo | None = None, **options: Any) -> RolloutEngine:
    return RolloutEngine(model or tiny_model(), CodesAsPixels(), **options)


def philox_noise(seed: int, sample_ids: list[int], count: int, entries: int) -> Any:
    """step → the Gumbel numbers that the engine draws for these ids, for the plain loop to use."""

    def noise(step: int) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(sample_ids).repeat_interleave(count)
        steps = torch.full_like(rows, step)
        places = torch.arange(count).repeat(len(sample_ids))
        token = ops.philox.gumbel(seed, rows, steps, places, entries, ops.philox.STREAM_TOKEN)
        rank = ops.philox.gumbel(seed, rows, steps, places, 1, ops.philox.STREAM_RANK)
        return token.view(-1, count, entries), rank.view(-1, count)

    return noise
