"""MMaDA: one bidirectional body that draws by Show-o's rule and writes by LLaDA's blocks.

    drawing      <|t2i|> bos text eos <|soi|> codes <|eoi|>           an unknown code or token is the mask id
    answering    <|mmu|> <|soi|> codes <|eoi|> bos question answer
    writing      text answer, the text in the tokenizer's chat template

Task ids are reserved ids of the tokenizer, from `first_reserved_id` on. The codes follow its last id: the published
loops add the tokenizer's length to them, although config.json and the embedding leave room for more text ids
(`llm_vocab_size`). The mask is one id for both.

Source: Yang et al., "MMaDA: Multimodal Large Diffusion Language Models", 2025.

Shape suffixes: B rows, N image codes, D width, K codebook.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..utils.errors import UserError
from .base import BlockAnsweringModel
from .bundle import ModelBundle, Sources
from .checkpoint import whole_number
from .llada import LlamaWriter, read_words, text_tokenizer
from .llama_body import Body, BodyModel, filled, id_prefix, read_body
from .magvit import MagvitV2
from .prefix import Prefix
from .registry import Family
from .sampling_rule import BlockRule, SamplingRule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FIRST_RESERVED = 126084
"""The published id of <|soi|>."""


@dataclass(frozen=True)
class Ids:
    """The ids of a sequence that are no text."""

    first_reserved: int
    first_code: int
    bos: int
    eos: int

    @property
    def soi(self) -> int:
        return self.first_reserved

    @property
    def eoi(self) -> int:
        return self.first_reserved + 1

    @property
    def t2i(self) -> int:
        return self.first_reserved + 4

    @property
    def mmu(self) -> int:
        return self.first_reserved + 5


class MmadaWriter(LlamaWriter):
    """MMaDA as a model of text, with the numbers of its published answers."""

    family = "mmada"
    blocks = BlockRule(length=1024, block=1024, steps=512, temperature=0.0)

    def __init__(self, body: Body, words: PreTrainedTokenizerFast, about: Mapping[str, object], drawing: Mmada):
        super().__init__(body, words)
        self.about = dict(about)
        """What config.json says beside the body's sizes."""
        self.__dict__["_drawing"] = drawing  # not a submodule: the body is one

    @property
    def drawing(self) -> Mmada:
        model: Mmada = self.__dict__["_drawing"]
        return model

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> MmadaWriter:
        """The writer of the MMaDA in a folder or hub id."""
        return Mmada.from_pretrained(path, dtype, device).writer


class Mmada(BodyModel, BlockAnsweringModel):
    """MMaDA behind `MaskedModel`: its codes are those of an image; `writer` is the same body as a model of text."""

    family = "mmada"
    rule = SamplingRule("cosine", "product", "added", steps=15, guidance_scale=3.5, temperature=1.0)

    def __init__(self, body: Body, words: PreTrainedTokenizerFast, ids: Ids, codebook: int, count: int, max_text: int):
        super().__init__()
        rows = body.config.vocab_size
        if ids.first_reserved + 9 > ids.first_code or ids.first_code + codebook > rows:
            raise UserError(
                f"first_code_id={ids.first_code}: must follow the task ids, which begin at {ids.first_reserved}, and "
                f"leave room for {codebook} codes in {rows} ids"
            )
        self.model, self.ids = body, ids
        self.codebook_size, self.width, self.max_text = codebook, body.config.d_model, max_text
        side = math.isqrt(count)
        self.grid = (side, side) if side * side == count else (1, count)
        self.num_text_ids, self.mask_id = ids.first_code, body.config.mask_token_id
        self.prompt_mask_id = self.mask_id
        about = {
            "architectures": ["MMadaModelLM"],
            "model_type": "mmada",
            "codebook_size": codebook,
            "num_vq_tokens": count,
            "max_text": max_text,
            "first_code_id": ids.first_code,
            "first_reserved_id": ids.first_reserved,
        }
        self.__dict__["_writer"] = MmadaWriter(body, words, about, self)  # not a submodule: the body is one

    @property
    def writer(self) -> MmadaWriter:
        made: MmadaWriter = self.__dict__["_writer"]
        made.checkpoint_layers = self.checkpoint_layers
        return made

    # --- images ----------------------------------------------------------------------------------------------------

    def prompt_ids(self, text_ids: Sequence[int]) -> list[int]:
        """<|t2i|> bos text eos, at most max_text + 1 ids; a longer one is cut and closed with eos."""
        ids, text = self.ids, list(text_ids)
        made = [ids.t2i, *([] if text[:1] == [ids.bos] else [ids.bos]), *text, ids.eos]
        return made if len(made) <= self.max_text + 1 else [*made[: self.max_text], ids.eos]

    def cut_ids(self, text_ids: Sequence[int]) -> int:
        own = 2 if list(text_ids[:1]) == [self.ids.bos] else 3
        return max(0, len(text_ids) + own - (self.max_text + 1))

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Prefix:
        return id_prefix(prompts, self.max_text + 1, self.device)

    def check_grid(self, grid: tuple[int, int]) -> None:
        room = self.model.config.max_sequence_length
        if self.max_text + 1 + math.prod(grid) + 2 > room:
            raise UserError(
                f"grid={grid}: with max_text={self.max_text} its codes need {self.max_text + 3 + math.prod(grid)} "
                f"positions, this model has {room}: use a smaller grid or a smaller max_text"
            )

    def image_hidden(
        self, codes_BN: Tensor, prefix: Prefix, prefix_of_row: Sequence[int], timestep_B: Tensor | None = None
    ) -> Tensor:
        codes = torch.where(codes_BN < 0, self.mask_id, codes_BN + self.ids.first_code).long()
        ends = torch.tensor([self.ids.soi, self.ids.eoi], device=codes.device).expand(len(codes), 2)
        own = torch.cat([ends[:, :1], codes, ends[:, 1:]], dim=1)
        return self.model.after(prefix, prefix_of_row, own, self.checkpoint_layers, slice(1, -1))

    def image_head(self) -> tuple[Tensor, None]:
        """The rows of the codes alone, as a view of the published head."""
        return self.model.head()[self.ids.first_code : self.ids.first_code + self.codebook_size], None

    # --- text ------------------------------------------------------------------------------------------------------

    def question_text(self, question: str) -> str:
        """The published wording; its `<eot_id>` is no token of the tokenizer, but what the model was trained with."""
        return (
            f"<|start_header_id|>user<|end_header_id|>\n{question}<eot_id>"
            "<|start_header_id|>assistant<|end_header_id|>\n"
        )

    def question_prompt(self, codes_N: Sequence[int], question_ids: Sequence[int]) -> list[int]:
        ids = self.ids
        codes = [code + ids.first_code for code in codes_N]
        return [ids.mmu, ids.soi, *codes, ids.eoi, ids.bos, *question_ids]

    # --- files -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Mmada:
        """Load a published checkpoint with its tokenizer: a folder or hub id, whole or sharded."""
        folder, config, sizes, weights = read_body(path, "mmada")
        words = read_words(folder)
        if words.bos_token_id is None:
            raise UserError(f"{folder}: its tokenizer names no bos_token: name it in tokenizer_config.json")
        ids = Ids(
            whole_number(config, "first_reserved_id", FIRST_RESERVED, folder),
            whole_number(config, "first_code_id", len(words), folder),
            int(words.bos_token_id),
            sizes.eos_token_id,
        )
        codebook, count, text = (
            whole_number(config, key, usual, folder)
            for key, usual in (("codebook_size", 8192), ("num_vq_tokens", 1024), ("max_text", 512))
        )
        with torch.device("meta"):
            model = cls(Body(sizes), words, ids, codebook, count, text)
        filled(model, weights, dtype, device, folder)
        return model

    def identity(self) -> dict[str, object]:
        return {**super().identity(), "first_code_id": self.ids.first_code}

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a folder that :meth:`from_pretrained` reads, the tokenizer included."""
        self.writer.save_pretrained(path)


def _recognises(config: Mapping[str, object]) -> bool:
    like_llada = config.get("model_type") == "llada" and "codebook_size" in config
    return config.get("model_type") == "mmada" or config.get("architectures") == ["MMadaModelLM"] or like_llada


def _load(sources: Sources, dtype: torch.dtype, device: torch.device) -> ModelBundle:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sources.model is None or sources.vq is None:
        raise UserError(f"{sources.model}: vq missing: give the image tokenizer (showlab/magvitv2), or mmada-8b")
    model = Mmada.from_pretrained(sources.model, dtype, device)
    vq = MagvitV2.from_pretrained(sources.vq, dtype=torch.float32, device=device)
    if vq.codebook_size != model.codebook_size:
        raise UserError(
            f"the image tokenizer {sources.vq} has {vq.codebook_size} codes, the model {model.codebook_size}"
        )
    return ModelBundle(model, vq, text_tokenizer(model.writer.words), sources)


def _published(name: str) -> Sources:
    return Sources(f"Gen-Verse/{name}", "showlab/magvitv2", f"Gen-Verse/{name}")


_WORDS = {"mmada-8b": _published("MMaDA-8B-MixCoT"), "mmada-8b-base": _published("MMaDA-8B-Base")}
FAMILY = Family("mmada", _recognises, _load, _WORDS, holds=("tokenizer",))
