"""A whole training world in miniature: random Show-o and MAGVIT-v2, 4×4 codes, a word tokenizer, experts of colour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyunictokens.data.folder import load_concept
from pyunictokens.models import ConceptTokens, MagvitConfig, MagvitV2, Showo, ShowoConfig, TextTokenizer
from pyunictokens.rewards import Ensemble, RewardBatch
from pyunictokens.train import GrpoConfig, StageConfig
from tests.data.conftest import Folder

TEXTS = (
    "a photo of is the dog red ball blue basket with its toy asleep in bed hiding from what it fears favourite afraid "
    "vacuum cleaner information request which fits user assistant here yes no small s"
)
WORDS = TEXTS.split()


def tiny_tokenizer() -> TextTokenizer:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = {word: place for place, word in enumerate(["<unk>", "<bos>", "<eos>", *".,:?'", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return TextTokenizer(tokenizer, "<bos>", "<eos>")


def tiny_model(seed: int = 0, layers: int = 2, width: int = 32) -> Showo:
    tokenizer = tiny_tokenizer()
    text = tokenizer.text_size
    config = ShowoConfig(
        vocab_size=text + 10 + 32 + 1,
        llm_vocab_size=text,
        codebook_size=32,
        num_vq_tokens=16,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=160,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        max_text=24,
    )
    model = Showo(config).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        scale = 0.5 if name.startswith("showo.lm_head") else 0.2
        noise = torch.randn(parameter.shape, generator=generator) * scale
        parameter.copy_(noise + (1.0 if "layernorm.weight" in name else 0.0))
    return model


def tiny_vq(seed: int = 0) -> MagvitV2:
    torch.manual_seed(seed)
    config = MagvitConfig(
        ch=8,
        encoder_ch_mult=(1, 1, 2),
        decoder_ch_mult=(1, 1, 2),
        encoder_res_blocks=(1, 1, 1),
        decoder_res_blocks=(1, 1, 1),
        z_channels=5,
        norm_groups=4,
    )
    return MagvitV2(config).requires_grad_(False).eval()


class Colour:
    """How much of one colour a drawing has; it differs from drawing to drawing, as a reward must."""

    def __init__(self, channel: int):
        self.channel = channel

    def score(self, batch: RewardBatch) -> Tensor:
        return batch.images[:, self.channel].mean(dim=(1, 2)) * 0.5 + 0.5


class Brevity:
    """Short answers score more."""

    def score(self, batch: RewardBatch) -> Tensor:
        return torch.tensor([1.0 / (1 + len(answer.split())) for answer in batch.answers])


def experts() -> Ensemble:
    return Ensemble({"tier": Brevity(), "ber": Colour(0), "der": Colour(2)})


def red_preview(prompts: Sequence[str]) -> Callable[[Tensor, Tensor], Tensor]:
    def scorer(pixels: Tensor, prompt_index: Tensor) -> Tensor:
        assert len(pixels) == len(prompt_index)
        return pixels[:, 0].mean(dim=(1, 2)) * 0.5 + 0.5

    return scorer


@dataclass
class World:
    model: Showo
    vq: MagvitV2
    tokenizer: TextTokenizer
    data: Any
    concept: ConceptTokens

    def fresh(self) -> dict[str, Any]:
        """Arguments of train_grpo with a model and concept as they were in the beginning."""
        return {
            "model": tiny_model(),
            "vq": self.vq,
            "tokenizer": self.tokenizer,
            "concept_data": self.data,
            "rewards": experts(),
            "preview_scorer": red_preview,
            "concept": tiny_concept(),
        }


def tiny_concept() -> ConceptTokens:
    concept = ConceptTokens("bo", 32, num_understanding=3, num_generation=2, seed=5)
    with torch.no_grad():
        concept.embed.mul_(10)
    return concept.requires_grad_(False)


def world(root: Path) -> World:
    Folder(root)
    return World(tiny_model(), tiny_vq(), tiny_tokenizer(), load_concept(root, "bo"), tiny_concept())


def grpo_config(**changes: Any) -> GrpoConfig:
    settings: dict[str, Any] = {
        "steps": 4,
        "group_size": 3,
        "groups": 1,
        "lr": 1e-3,
        "timesteps": 4,
        "guidance_scale": 2.0,
        "max_new_tokens": 5,
        "checkpoint_every": 2,
        "sample_every": 0,
        "micro_rows": 2,
        "micro_timesteps": 2,
    }
    return GrpoConfig(**{**settings, **changes})


def stage_config(**changes: Any) -> StageConfig:
    settings: dict[str, Any] = {
        "num_understanding": 3,
        "num_generation": 2,
        "num_extra": 2,
        "epochs": 2,
        "generated_images": 2,
        "generated_timesteps": 4,
        "generated_guidance": 1.0,
    }
    return StageConfig(**{**settings, **changes})
