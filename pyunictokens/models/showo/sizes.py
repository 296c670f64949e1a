"""Show-o's sizes and ids, and how a published config.json tells them.

A checkpoint's config.json names the language model it was built on and leaves the sizes to that one's config; where
neither is at hand they are those of Phi-1.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...utils.errors import UserError
from ..checkpoint import read_config, real_number, whole_number

NUM_SPECIAL = 10
"""Special ids after the text ids: pad, soi, eoi, sov, eov, t2i, mmu, t2v, v2v, lvg."""

_PHI_1_5 = {"num_attention_heads": 32, "max_position_embeddings": 2048, "bos_token_id": 50256, "eos_token_id": 50256}


@dataclass(frozen=True)
class ShowoConfig:
    """Sizes and ids, without a concept. Defaults are those of Show-o 512×512 on Phi-1.5."""

    vocab_size: int = 58498
    llm_vocab_size: int = 50295
    codebook_size: int = 8192
    num_vq_tokens: int = 1024
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    partial_rotary_factor: float = 0.5
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    qk_layernorm: bool = True
    w_clip_vit: bool = False
    bos_token_id: int = 50256
    eos_token_id: int = 50256
    max_text: int = 128
    """Text positions of an image prompt."""

    def __post_init__(self) -> None:
        if self.max_text < 3:
            raise UserError(f"max_text={self.max_text}: must be ≥ 3 to hold the task token, sot and eot")
        if self.vocab_size != self.llm_vocab_size + NUM_SPECIAL + self.codebook_size + 1:
            raise UserError(
                f"vocab_size={self.vocab_size}: must be llm_vocab_size + {NUM_SPECIAL} special ids + codebook_size + "
                f"mask = {self.llm_vocab_size + NUM_SPECIAL + self.codebook_size + 1}"
            )
        if not 0 < self.partial_rotary_factor <= 1:
            raise UserError(f"partial_rotary_factor={self.partial_rotary_factor}: must be above 0 and at most 1")
        if self.hidden_size < 1 or self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size={self.hidden_size}: must be a multiple of num_attention_heads={self.num_attention_heads}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        return int(self.partial_rotary_factor * self.head_dim)

    @property
    def first_code_id(self) -> int:
        """Id of code 0 when no concept is attached."""
        return self.llm_vocab_size + NUM_SPECIAL

    @classmethod
    def from_checkpoint(
        cls, config: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]], folder: Path
    ) -> ShowoConfig:
        """Sizes from the weights' shapes; what shapes cannot say from config.json and the language model's config."""
        norm = shapes.get("showo.model.layers.0.self_attn.q_layernorm.weight")
        try:
            vocab, hidden = shapes["showo.model.embed_tokens.weight"]
            inner = shapes["showo.model.layers.0.mlp.fc1.weight"][0]
            layers = 1 + max(int(key.split(".")[3]) for key in shapes if key.startswith("showo.model.layers."))
            heads = hidden // norm[0] if norm is not None else 0
        except KeyError as error:
            raise UserError(f"{folder}: not a Show-o checkpoint: the weight {error} is missing") from None
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise UserError(f"{folder}: not a Show-o checkpoint: its weights have other shapes ({error})") from None
        phi = {**_PHI_1_5, **_language_config(config, folder)}
        if config.get("num_vq_tokens") is None:
            raise UserError(
                f"{folder}: config.json has no num_vq_tokens, and weights do not say it: add the number of codes in an "
                "image, which is 256 for the Show-o of 256×256 pixels and 1024 for the one of 512×512"
            )
        text = config.get("llm_vocab_size")
        rest = vocab - NUM_SPECIAL - 1 - text if isinstance(text, int) else 8192
        codebook = whole_number(config, "codebook_size", rest, folder)
        stated = whole_number(config, "vocab_size", vocab, folder)
        if stated != vocab:
            raise UserError(f"{folder}: config.json says vocab_size={stated}, the embedding has {vocab} rows")
        return cls(
            vocab_size=vocab,
            llm_vocab_size=whole_number(config, "llm_vocab_size", vocab - NUM_SPECIAL - codebook - 1, folder),
            codebook_size=codebook,
            num_vq_tokens=whole_number(config, "num_vq_tokens", 0, folder),
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads or whole_number(phi, "num_attention_heads", 32, folder),
            partial_rotary_factor=real_number(phi, "partial_rotary_factor", 0.5, folder),
            max_position_embeddings=whole_number(phi, "max_position_embeddings", 2048, folder),
            layer_norm_eps=real_number(phi, "layer_norm_eps", 1e-5, folder),
            rope_theta=real_number(phi, "rope_theta", 10000.0, folder),
            qk_layernorm=norm is not None,
            w_clip_vit="mm_projector.0.weight" in shapes,
            bos_token_id=whole_number(phi, "bos_token_id", 50256, folder, least=0),
            eos_token_id=whole_number(phi, "eos_token_id", 50256, folder, least=0),
            max_text=whole_number(config, "max_text", 128, folder, least=3),
        )


def _language_config(config: Mapping[str, object], folder: Path) -> dict[str, object]:
    """What the language model's own config says: its keys in config.json, else `llm_model_path` beside it."""
    known = set(ShowoConfig.__dataclass_fields__) - {"vocab_size"}
    found = {key: value for key, value in config.items() if key in known}
    name = config.get("llm_model_path")
    if isinstance(name, str) and name:
        for place in (folder / name, folder.parent / Path(name).name, Path(name)):
            if (place / "config.json").is_file():
                content = read_config(place)
                found = {**{k: v for k, v in content.items() if k in known}, **found}
                break
    return {key: value for key, value in found.items() if value is not None}
