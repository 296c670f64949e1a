"""LLaDA: text by unmasking. Its codes are the ids of its vocabulary, so engine and update treat text as they do images.

    config.json, model*.safetensors     the body (llama_body.py)
    tokenizer.json, tokenizer_config.json     words, and the chat template that a prompt is put into

`LlamaWriter` is the model of text over a body; LLaDA is one with files of its own, MMaDA has one inside.

Source: Nie et al., "Large Language Diffusion Models", 2025.

Shape suffixes: B rows, L tokens, D width, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..utils.errors import UserError, needs
from .base import ImageTokenizer, WritingModel
from .bundle import ModelBundle, Sources
from .llama_body import Body, BodyModel, filled, id_prefix, read_body, write_body
from .prefix import Prefix
from .registry import Family
from .sampling_rule import BlockRule
from .tokenizer import TextTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TURN = "<|eot_id|>"


class LlamaWriter(BodyModel, WritingModel):
    """A body that writes text. Tokens are ids of the whole vocabulary, as published."""

    family = "llada"
    blocks = BlockRule(length=128, block=32, steps=128, temperature=0.0)
    about: Mapping[str, object] = {"architectures": ["LLaDAModelLM"], "model_type": "llada"}

    def __init__(self, body: Body, words: PreTrainedTokenizerFast):
        super().__init__()
        self.model, self.words = body, words
        config = body.config
        self.codebook_size, self.width = config.vocab_size, config.d_model
        self.grid = (1, self.blocks.length)
        self.max_positions = config.max_sequence_length
        self.mask_id = self.prompt_mask_id = config.mask_token_id
        self.max_text, self.num_text_ids = config.max_sequence_length, config.vocab_size
        turn = words.get_vocab().get(END_OF_TURN)
        self.end_ids = (config.eos_token_id,) if turn is None else (config.eos_token_id, turn)

    def asked(self, text: str) -> str:
        """The text in the tokenizer's chat template, the answer's turn opened; as it is where there is no template."""
        if not self.words.chat_template:
            return text
        said = [{"role": "user", "content": text}]
        return str(self.words.apply_chat_template(said, add_generation_prompt=True, tokenize=False))

    def prompt_ids(self, text_ids: Sequence[int]) -> list[int]:
        """The ids as they are. There is no unconditional prompt: [] is the end token alone."""
        return list(text_ids)[: self.max_text] or [self.end_ids[0]]

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Prefix:
        return id_prefix(prompts, self.max_positions, self.device)

    def image_hidden(
        self, codes_BN: Tensor, prefix: Prefix, prefix_of_row: Sequence[int], timestep_B: Tensor | None = None
    ) -> Tensor:
        """[B, L, D] at tokens int [B, L] (−1 unknown) after the prompts."""
        return self.block_hidden(codes_BN, prefix, prefix_of_row, slice(None))

    def block_hidden(self, codes_BN: Tensor, prefix: Prefix, prefix_of_row: Sequence[int], place: slice) -> Tensor:
        ids = torch.where(codes_BN < 0, self.mask_id, codes_BN).long()
        return self.model.after(prefix, prefix_of_row, ids, self.checkpoint_layers, place)

    def image_head(self) -> tuple[Tensor, None]:
        return self.model.head(), None

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> LlamaWriter:
        """Load a published checkpoint with its tokenizer: a folder or hub id, whole or sharded."""
        folder, _, sizes, weights = read_body(path, "llada")
        words = read_words(folder)
        with torch.device("meta"):
            model = cls(Body(sizes), words)
        filled(model, weights, dtype, device, folder)
        return model

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a folder that :meth:`from_pretrained` reads, the tokenizer included."""
        write_body(self, self.model.config, Path(path), self.about)
        self.words.save_pretrained(str(path))


class NoImages(ImageTokenizer):
    """In place of an image tokenizer where a model knows text alone."""

    codebook_size, downsampling = 0, 1

    def encode(self, pixels: Tensor) -> Tensor:
        raise UserError("llada reads text alone: for images use mmada or show-o")

    def decode(self, codes: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        raise UserError("llada writes text and draws nothing: use RolloutEngine.write, or mmada or show-o for images")


def read_words(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in `folder`. Raises UserError where there is none, or it has no end token."""
    with needs("train"):
        from transformers import PreTrainedTokenizerFast

    try:
        words = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # many kinds, for files that are absent or damaged
        raise UserError(f"{folder}: no tokenizer here that can be read ({error}): give the whole folder") from error
    if words.eos_token is None:
        raise UserError(f"{folder}: its tokenizer names no eos_token: name it in tokenizer_config.json")
    return words


def text_tokenizer(words: PreTrainedTokenizerFast) -> TextTokenizer:
    """The same words as the engine takes them; no id is added."""
    end = str(words.eos_token)
    return TextTokenizer(words.backend_tokenizer, str(words.bos_token or end), end, len(words))


def _recognises(config: Mapping[str, object]) -> bool:
    return config.get("model_type") == "llada" or config.get("architectures") == ["LLaDAModelLM"]


def _load(sources: Sources, dtype: torch.dtype, device: torch.device) -> ModelBundle:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    assert sources.model is not None
    model = LlamaWriter.from_pretrained(sources.model, dtype, device)
    return ModelBundle(model, NoImages(), text_tokenizer(model.words), sources)


_WORDS = {
    "llada-8b": Sources(*["GSAI-ML/LLaDA-8B-Instruct"] * 3),
    "llada-8b-base": Sources(*["GSAI-ML/LLaDA-8B-Base"] * 3),
}
FAMILY = Family("llada", _recognises, _load, _WORDS, holds=("vq", "tokenizer"))
