"""Lumina-DiMOO: LLaDA's body with image codes behind its ids, a newline id after each row, and diffusers' VQModel.

    drawing   <system>…</system><user> text </user>  answer boi  codes, newline, codes, newline, …  eoi /answer

The folder is a published one: the body, its tokenizer, and `vqvae/`. Its loop masks again what is largest in
probability / temperature + Gumbel noise (`SamplingRule.remasking`). A square of codes is drawn: a model is told how
many there are, not their shape. It draws; its answers to questions are not here.

Source: Xin et al., "Lumina-DiMOO", 2025. Shape suffixes: B rows, N image codes, S positions of an image, D width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..utils.errors import UserError
from .amused import AmusedVQ
from .bundle import ModelBundle, Sources
from .checkpoint import resolve, whole_number
from .llada import read_words
from .llama_body import Body, BodyModel, filled, id_prefix, read_body, write_body
from .prefix import Prefix
from .registry import Family
from .sampling_rule import SamplingRule
from .tokenizer import TextTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BEFORE = "<system>Generate an image according to the text prompt.</system><user>"
AFTER = "</user>"
NOTHING = "<uncondition>"
"""What stands for the text in the unconditional prompt."""


@dataclass(frozen=True)
class Ids:
    """The ids around an image. The defaults are the published ones."""

    newline: int = 126084
    boi: int = 126349
    eoi: int = 126350
    answer: int = 126354
    answer_end: int = 126355


class PromptTokenizer(TextTokenizer):
    """A text is encoded together with the words around it, because pieces may reach over their borders."""

    def encode(self, text: str) -> list[int]:
        """Ids of the whole prompt of `text`; of an empty text none, which is the unconditional prompt."""
        return super().encode(BEFORE + text + AFTER) if text else []


class Dimoo(BodyModel):
    """Lumina-DiMOO behind `MaskedModel`."""

    family = "lumina-dimoo"
    rule = SamplingRule(
        "cosine", "constant", "added", steps=64, guidance_scale=4.0, temperature=1.0, remasking="most_sure"
    )

    def __init__(self, body: Body, words: PreTrainedTokenizerFast, ids: Ids, codebook: int, side: int, max_text: int):
        super().__init__()
        rows = body.config.vocab_size
        self.first_code = rows - codebook
        if not 0 <= max(ids.newline, ids.boi, ids.eoi, ids.answer, ids.answer_end) < self.first_code:
            raise UserError(f"codebook_size={codebook}: leaves {self.first_code} of {rows} ids, fewer than {ids} need")
        self.model, self.words, self.ids = body, words, ids
        self.codebook_size, self.width, self.grid = codebook, body.config.d_model, (side, side)
        self.max_text, self.num_text_ids, self.mask_id = max_text, self.first_code, body.config.mask_token_id
        self.prompt_mask_id = self.mask_id
        encode = words.backend_tokenizer.encode
        self._nothing = encode(BEFORE + NOTHING + AFTER, add_special_tokens=False).ids
        self._after = encode(AFTER, add_special_tokens=False).ids

    def prompt_ids(self, text_ids: Sequence[int]) -> list[int]:
        """The ids of a whole prompt (`PromptTokenizer`), at most max_text; a longer one keeps its end."""
        ids = list(text_ids) or self._nothing
        ids = ids if len(ids) <= self.max_text else [*ids[: self.max_text - len(self._after)], *self._after]
        return [*ids, self.ids.answer, self.ids.boi]

    def cut_ids(self, text_ids: Sequence[int]) -> int:
        over = len(text_ids) - self.max_text
        return over + len(self._after) if over > 0 else 0

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Prefix:
        return id_prefix(prompts, self.max_text + 2, self.device)

    def check_grid(self, grid: tuple[int, int]) -> None:
        if grid[0] != grid[1]:
            raise UserError(f"grid={grid}: this model draws squares here, as {self.grid}")
        need, room = self.max_text + 2 + grid[0] * (grid[1] + 1) + 2, self.model.config.max_sequence_length
        if need > room:
            raise UserError(
                f"grid={grid}: with max_text={self.max_text} it needs {need} positions, this model has {room}: use a "
                "smaller grid or a smaller max_text"
            )

    def image_hidden(
        self, codes_BN: Tensor, prefix: Prefix, prefix_of_row: Sequence[int], timestep_B: Tensor | None = None
    ) -> Tensor:
        rows, side = len(codes_BN), math.isqrt(codes_BN.shape[1])
        ids = torch.where(codes_BN < 0, self.mask_id, codes_BN + self.first_code).long().view(rows, side, side)
        lines = torch.cat([ids, ids.new_full((rows, side, 1), self.ids.newline)], dim=2).flatten(1)
        ends = ids.new_tensor([self.ids.eoi, self.ids.answer_end]).expand(rows, 2)
        own_BS = torch.cat([lines, ends], dim=1)
        hidden = self.model.after(prefix, prefix_of_row, own_BS, self.checkpoint_layers, slice(0, -2))
        return hidden.unflatten(1, (side, side + 1))[:, :, :-1].flatten(1, 2)

    def image_head(self) -> tuple[Tensor, None]:
        """The rows of the codes alone, the last of all, as a view of the published head."""
        return self.model.head()[self.first_code :], None

    # --- files -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Dimoo:
        """Load a published checkpoint with its tokenizer: a folder or hub id, whole or sharded."""
        folder, config, sizes, weights = read_body(path, "lumina-dimoo")
        ids = Ids(*(whole_number(config, f"{name}_id", usual, folder) for name, usual in vars(Ids()).items()))
        codebook, side, text = (
            whole_number(config, key, default, folder)
            for key, default in (("codebook_size", 8192), ("grid_side", 32), ("max_text", 512))
        )
        with torch.device("meta"):
            model = cls(Body(sizes), read_words(folder), ids, codebook, side, text)
        filled(model, weights, dtype, device, folder)
        return model

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write what :meth:`from_pretrained` reads, the tokenizer included; the image tokenizer is saved on its own."""
        about = {
            "architectures": [_ARCHITECTURE],
            "model_type": "llada",
            "codebook_size": self.codebook_size,
            "grid_side": self.grid[0],
            "max_text": self.max_text,
            **{f"{name}_id": value for name, value in vars(self.ids).items()},
        }
        write_body(self, self.model.config, Path(path), about)
        self.words.save_pretrained(str(path))


_ARCHITECTURE = "LLaDAForMultiModalGeneration"


def _recognises(config: Mapping[str, object]) -> bool:
    return config.get("architectures") == [_ARCHITECTURE]


def _load(sources: Sources, dtype: torch.dtype, device: torch.device) -> ModelBundle:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    assert sources.model is not None
    model = Dimoo.from_pretrained(sources.model, dtype, device)
    vq = AmusedVQ.from_pretrained(resolve(sources.vq or sources.model), device=device)
    if vq.codebook_size != model.codebook_size:
        raise UserError(
            f"the image tokenizer {sources.vq} has {vq.codebook_size} codes, the model {model.codebook_size}"
        )
    words = model.words
    end = str(words.eos_token)
    text = PromptTokenizer(words.backend_tokenizer, str(words.bos_token or end), end, len(words))
    return ModelBundle(model, vq, text, sources)


_PUBLISHED = Sources(*["Alpha-VLLM/Lumina-DiMOO"] * 3)
FAMILY = Family("lumina-dimoo", _recognises, _load, {"lumina-dimoo": _PUBLISHED}, holds=("vq", "tokenizer"))
