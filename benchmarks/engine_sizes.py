"""What engine_gpu.py measures: the sizes of Show-o and of a smoke run, and a model of them with random weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyunictokens.models import MagvitConfig, Showo, ShowoConfig


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    config: ShowoConfig
    vq: MagvitConfig
    grid: tuple[int, int]
    small_grid: tuple[int, int]
    group: int = 9
    steps: int = 50
    few_steps: int = 4
    """Steps that the slow sides are timed over."""
    tokens: int = 100
    few_tokens: int = 4
    prompt: int = 120
    question: int = 32
    guidance: float = 5.0
    rounds: int = 2
    lever_steps: int = 4
    lever_rounds: int = 3
    grpo_steps: tuple[int, ...] = (10, 50)

    @property
    def codes(self) -> int:
        return self.grid[0] * self.grid[1]


FULL = Sizes(ShowoConfig(), MagvitConfig(), (32, 32), (16, 16))
SMOKE = Sizes(
    ShowoConfig(
        vocab_size=200 + 10 + 32 + 1,
        llm_vocab_size=200,
        codebook_size=32,
        num_vq_tokens=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=160,
        bos_token_id=198,
        eos_token_id=199,
        max_text=20,
    ),
    MagvitConfig(8, (1, 2), (1, 2), (1, 1), (1, 1), 5, 4),
    (4, 4),
    (2, 2),
    group=3,
    steps=4,
    few_steps=2,
    tokens=4,
    few_tokens=2,
    prompt=8,
    question=5,
    rounds=1,
    lever_steps=2,
    lever_rounds=1,
    grpo_steps=(2, 4),
)


def random_model(config: ShowoConfig, device: str, dtype: torch.dtype, seed: int = 0) -> Showo:
    """Random weights of a scale at which half precision stays finite; answers never end by themselves."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = Showo(config).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02)
        elif "layernorm.weight" not in name:
            parameter.zero_()
    model.showo.lm_head.bias[config.eos_token_id] = -1e4
    return model.to(dtype)
