"""Show-o among the families of models: its config.json, its published checkpoints, and how its parts are loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from ...utils.errors import UserError
from ..bundle import ModelBundle, Sources
from ..magvit import MagvitV2
from ..registry import Family
from ..tokenizer import TextTokenizer
from ..vision import SYSTEM, ClipVision
from ..weight_files import WEIGHTS, WeightFiles
from .model import Showo
from .sizes import ShowoConfig


def _recognises(config: Mapping[str, object]) -> bool:
    stated = "llm_vocab_size" in config and "model_type" not in config  # MMaDA's config.json holds both
    return config.get("_class_name") == "Showo" or stated


def _load(sources: Sources, dtype: torch.dtype, device: torch.device) -> ModelBundle:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sources.model is None or sources.vq is None or sources.tokenizer is None:
        missing = [name for name in ("vq", "tokenizer") if getattr(sources, name) is None]
        raise UserError(
            f"{sources.model}: {' and '.join(missing)} missing: give the image tokenizer and the language model's "
            f"tokenizer, or one of {', '.join(_WORDS)}"
        )
    tokenizer = TextTokenizer.from_pretrained(sources.tokenizer)
    model = Showo.from_pretrained(sources.model, dtype=dtype, device=device)
    if tokenizer.text_size != model.config.llm_vocab_size:
        raise UserError(
            f"the tokenizer {sources.tokenizer} has {tokenizer.text_size} text ids, the model {sources.model} expects "
            f"{model.config.llm_vocab_size}: give the tokenizer of the model's own language model"
        )
    vq = MagvitV2.from_pretrained(sources.vq, dtype=torch.float32, device=device)
    if vq.codebook_size != model.codebook_size:
        raise UserError(
            f"the image tokenizer {sources.vq} has {vq.codebook_size} codes, the model {model.codebook_size}"
        )
    if model.takes_features:
        where = sources.vision or _VISION
        model.look_through(lambda: ClipVision.from_pretrained(where, device), tokenizer.encode(SYSTEM))
    return ModelBundle(model, vq, tokenizer, sources)


_VISION = "hub:openai/clip-vit-large-patch14-336"
"""The image encoder that the CLIP-ViT variant was trained with."""

_WORDS = {
    "show-o-512": Sources("showlab/show-o-512x512", "showlab/magvitv2", "microsoft/phi-1_5"),
    "show-o-256": Sources("showlab/show-o", "showlab/magvitv2", "microsoft/phi-1_5"),
}

_SHOWO = "Apache-2.0, as Show-o's code"
_MODEL = (("config.json",), WEIGHTS)

FILES = (
    WeightFiles("Show-o, 512×512", "showlab/show-o-512x512", _MODEL, _SHOWO, gigabytes=5.79),
    WeightFiles("Show-o, 256×256", "showlab/show-o", _MODEL, _SHOWO),
    WeightFiles("MAGVIT-v2, the image tokenizer", "showlab/magvitv2", _MODEL, _SHOWO, gigabytes=0.38),
    WeightFiles(
        "the text tokenizer of Phi-1.5",
        "microsoft/phi-1_5",
        (("tokenizer.json",), ("tokenizer_config.json",)),
        "MIT",
        get="hf download microsoft/phi-1_5 tokenizer.json tokenizer_config.json --local-dir {folder}",
        gigabytes=0.002,
    ),
)


def published_config(source: str | None) -> ShowoConfig:
    """The sizes of a published Show-o by its hub id, where they are known; else those of the 512×512 one."""
    return ShowoConfig(num_vq_tokens=256) if (source or "").removeprefix("hub:") == "showlab/show-o" else ShowoConfig()


FAMILY = Family("show-o", _recognises, _load, _WORDS, FILES)
